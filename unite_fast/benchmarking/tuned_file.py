"""The file that `unite-fast tune` writes and `--tuned FILE` reads: the settings that won, as YAML."""

from pathlib import Path

import yaml

from unite_fast.benchmarking.candidate import OK
from unite_fast.benchmarking.tune import Found, describe
from unite_fast.errors import UserError
from unite_fast.utils.files import atomic_write, writing


def check(path: Path) -> None:
    """Before minutes are spent.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"--out is {path}, a folder; name a file, for example {path / 'tuned.yaml'}")


def write(path: Path, found: Found, command: str) -> None:
    """The best settings, with what they were measured on and against as comments."""
    row = found.best.row
    about = [
        command,
        f"{row['date']}, {row['gpus']} x {row['card']}, torch {row['torch']}, CUDA {row['cuda'] or 'none'}, "
        f"triton {row['triton'] or 'none'}, commit {row['commit']}",
        *(
            f"{trial.images_per_s:.1f} images/s: {describe(trial.settings)}"
            for trial in found.trials
            if trial.status == OK
        ),
    ]
    tree: dict = {}
    for key, value in found.best.settings.items():
        group, dot, name = key.partition(".")
        if dot:
            tree.setdefault(group, {})[name] = value
        else:
            tree[key] = value
    with atomic_write(path) as partial:
        partial.write_text("".join(f"# {line}\n" for line in about) + yaml.safe_dump(tree, sort_keys=False))
