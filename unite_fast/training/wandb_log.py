"""Rows of metrics on Weights & Biases, for who asks for it (`train.wandb`)."""

from pathlib import Path

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import to_tree
from unite_fast.utils.files import writing


class WandbLog:
    """One run on Weights & Biases for one run folder, which it goes on with when the run is resumed. WANDB_MODE=offline
    in the environment keeps everything in the folder; `wandb sync` sends it later."""

    def __init__(self, config: Config, folder: Path):
        """
        Raises:
            UserError: the package is missing, or it cannot begin (no key, no network).
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "train.wandb is set, but the package wandb is not installed; pip install 'unite-fast[wandb]'"
            ) from error
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        name_file = folder / "wandb_run"
        known = name_file.read_text().strip() if name_file.exists() else None
        try:
            self.run = wandb.init(
                project=config.train.wandb,
                name=config.name,
                id=known,
                resume="allow",
                dir=str(folder),
                config=to_tree(config),
            )
        except Exception as error:  # wandb has many errors, and a run that was asked to report must not go on unheard
            reason = " ".join(str(error).split())
            raise UserError(
                f"train.wandb: Weights & Biases cannot begin: {reason}; log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        if known is None:
            with writing(name_file):
                name_file.write_text(f"{self.run.id}\n")

    def write(self, row: dict) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()
