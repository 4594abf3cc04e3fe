"""Metrics on Weights & Biases (`train.wandb`)."""

from pathlib import Path

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.recipes import to_tree
from unite_fast.utils.files import writing


class WandbLog:
    """One run on Weights & Biases per run folder; resuming the folder resumes it. With WANDB_MODE=offline in the
    environment everything stays in the folder until `wandb sync`."""

    def __init__(self, config: Config, folder: Path):
        """
        Raises:
            UserError: the package is not installed, or wandb cannot start (no key, no network).
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # optional
        except ImportError as error:
            raise UserError(
                "train.wandb is set, but the package wandb is not installed; pip install 'unite-fast[wandb]'"
            ) from error
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        name_file = folder / "wandb_run"
        run_id = name_file.read_text().strip() if name_file.exists() else None
        try:
            self.run = wandb.init(
                project=config.train.wandb,
                name=config.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=to_tree(config),
            )
        except Exception as error:  # wandb raises many kinds, and the run must not continue without its log
            reason = " ".join(str(error).split())
            raise UserError(
                f"train.wandb: Weights & Biases cannot start: {reason}; log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        if run_id is None:
            with writing(name_file):
                name_file.write_text(f"{self.run.id}\n")

    def write(self, row: dict) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()
