"""The command line: `unite-fast COMMAND`. The commands themselves are in `commands/`."""

import sys

import typer

from unite_fast.commands import checkpoints, data, evaluation, gallery, guidance, images, training
from unite_fast.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train UNITE, one network that is image tokenizer and latent denoiser, and use it.",
)
for part in (training, images, evaluation, guidance, gallery, data, checkpoints):
    app.add_typer(part.app)


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        app()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        # A file of the user's that the system refuses: a folder in its place, no permission, a full disk.
        sys.exit(_complain(f"{error.filename or 'a file'}: {error.strerror or error}"))


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2
