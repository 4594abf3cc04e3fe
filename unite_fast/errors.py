"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a corrupt checkpoint.

    The message is one line that names what is wrong and how to mend it. The command line prints it without a
    traceback and exits with status 2; a library caller catches it like any exception.
    """
