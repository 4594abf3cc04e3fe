"""The YAML file of the fastest settings, written by `unite-fast tune` and read by `--tuned FILE`."""

from pathlib import Path

import yaml

from unite_fast.benchmarking.candidate import OK
from unite_fast.benchmarking.tune import RATE, TuneResult, describe, outcome
from unite_fast.errors import UserError
from unite_fast.utils.files import check_not_read, check_replaceable, save_text, writing

COMMENT = "# unite-fast tune "
"""The file begins with the command that wrote it."""


def check(path: Path, recipe: str = "") -> None:
    """Check the file before the search, which takes minutes.

    Raises:
        UserError: the file cannot be written; it is the recipe, or another file that `unite-fast tune` did not write.
    """
    if path.is_dir():
        raise UserError(f"--out is {path}, a folder; name a file, for example {path / 'tuned.yaml'}")
    if Path(recipe).is_file():  # not the name of a recipe in the package
        check_not_read(path, recipe)
    check_replaceable(path, COMMENT.encode())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def write(path: Path, result: TuneResult, command: str, rate: str = RATE) -> None:
    """Write the fastest settings, with the machine and the other candidates as comments."""
    row = result.best.row
    assert row is not None  # the best trial is OK
    comments = [
        command,
        f"{row['date']}, {row['gpus']} x {row['card']}, torch {row['torch']}, CUDA {row['cuda'] or 'none'}, "
        f"triton {row['triton'] or 'none'}, commit {row['commit']}",
        *(f"{outcome(trial, rate)}: {describe(trial.settings)}" for trial in result.trials if trial.status == OK),
    ]
    tree: dict = {}
    for key, value in result.best.settings.items():
        group, dot, name = key.partition(".")
        if dot:
            tree.setdefault(group, {})[name] = value
        else:
            tree[key] = value
    save_text("".join(f"# {line}\n" for line in comments) + yaml.safe_dump(tree, sort_keys=False), path)
