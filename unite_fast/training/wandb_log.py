"""Metrics on Weights & Biases (`train.wandb`)."""

import re
from contextlib import suppress
from pathlib import Path

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import to_tree
from unite_fast.training.side_outputs import SideOutputs
from unite_fast.utils.files import make_folder, read_small, save_text

LONGEST_ID = 200
"""Bytes of the file wandb_run."""
RUN_ID = re.compile(r"[\w.-]{1,128}")


class WandbLog:
    """One run on Weights & Biases per run folder; resuming the folder resumes it. With WANDB_MODE=offline in the
    environment everything stays in the folder until `wandb sync`."""

    def __init__(self, config: Config, folder: Path, sides: SideOutputs | None = None):
        """If wandb cannot start (no key, no network), the run goes on without it; see `SideOutputs`.

        Raises:
            UserError: the package is not installed.
        """
        self.run = None
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # optional
        except ImportError as error:
            raise UserError(
                "train.wandb is set, but the package wandb is not installed; pip install 'unite-fast[wandb]'"
            ) from error
        name_file = folder / "wandb_run"
        run_id = None
        with suppress(OSError):
            text = read_small(name_file, LONGEST_ID).decode(errors="replace").strip()
            run_id = text if RUN_ID.fullmatch(text) else None
        with (sides or SideOutputs()).attempt("train.wandb (log in with `wandb login`, or set WANDB_MODE=offline)"):
            make_folder(folder / "wandb")  # a link would lead its files elsewhere
            self.run = wandb.init(
                project=config.train.wandb,
                name=config.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=to_tree(config),
            )
            if run_id is None:
                save_text(f"{self.run.id}\n", name_file)

    def write(self, row: dict) -> None:
        if self.run is not None:
            self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
