"""What a run sets, checks and says before its first step: the device, attention, the data."""

from collections.abc import Iterator

import torch

from unite_fast import __version__
from unite_fast.checkpoint.reader import Checkpoint
from unite_fast.config import MOLECULES, Config
from unite_fast.data_pipeline import Source, open_source
from unite_fast.data_pipeline.choose_loader import LoaderChoice
from unite_fast.data_pipeline.molecules.of_config import molecules_of
from unite_fast.distributed.hosts import known_hosts
from unite_fast.distributed.process_group import Ranks
from unite_fast.distributed.start_check import check_same
from unite_fast.distributed.store import kept_by_torchrun
from unite_fast.distributed.strategy import Strategy
from unite_fast.errors import printable, require
from unite_fast.kernels import backend, native
from unite_fast.recipes import to_tree
from unite_fast.training import attention_precision
from unite_fast.training.run_folder import flatten
from unite_fast.utils.code_digest import code_digest, version_of
from unite_fast.utils.device import check_float8, use_numerics, use_threads

OF_A_MACHINE = {
    "data.path",
    "data.workers",
    "perceptual.vgg_path",
    "perceptual.lpips_path",
    "evaluation.inception",
    "train.threads",
    "train.out",
}
"""Settings that may differ between machines: what these paths lead to is compared by its content."""


def start_values(config: Config, options: dict[str, object]) -> dict[str, object]:
    """What must be the same on all ranks, by key: settings without those `OF_A_MACHINE`, options, software. A rank that
    was started in another way would average the gradients of another recipe, or the ranks would wait for each other
    for ever."""
    settings = {key: value for key, value in flatten(to_tree(config)).items() if key not in OF_A_MACHINE}
    software = {
        "unite_fast": __version__,
        "the code of unite_fast": code_digest(),
        "torch": torch.__version__,
        **{name: version_of(name) for name in ("numpy", "pillow", "triton")},
    }
    return settings | options | software


def check_same_backends(device: torch.device, decoder: str, ranks: Ranks) -> None:
    """Compare what runs here, once it is chosen. All ranks call this together.

    Raises:
        UserError: another decoder of images, or another kind of kernels, than on rank 0; the bits would differ.
    """
    check_same(
        {
            "the decoder of images": decoder,
            "the kernels": backend.backend_on(device),
            "the C++ kernels": "missing" if native.reason() else "built",
            "the attention": backend.attention_on(device),
        },
        ranks,
    )


def use_device_settings(config: Config, device: torch.device) -> None:
    """Threads, numerics and kernels of this process.

    Raises:
        UserError: a backend or a precision that this device does not have.
    """
    use_threads(config.train.threads)
    use_numerics(config.train.precision, config.train.deterministic)
    backend.use(config.kernels, device)
    head_dims = {size.width // size.heads for size in (config.model.encoder, config.model.decoder)}
    backend.use_attention(config.attention, device, getattr(torch, config.train.network_precision), head_dims)
    if config.train.precision == "float8":
        check_float8(config.model, device)


def choose_attention(config: Config, device: torch.device, ranks: Ranks, checkpoint: Checkpoint | None) -> str:
    """Replace `attention=sdpa` by what rank 0 measures, or by the run's earlier choice.

    Returns:
        What was measured; empty if nothing was.
    """
    # The same on all ranks: `run_on_first` is collective.
    if device.type != "cpu" or config.train.network_precision != "bfloat16" or config.attention != "sdpa":
        return ""
    # Checkpoints without the key are from before the measurement, when attention ran in bfloat16.
    saved = checkpoint.progress.get("attention", "sdpa_bfloat16") if checkpoint else ""
    name, note = ranks.run_on_first(lambda: attention_precision.choose(config, saved))
    backend.use_attention(name, device, head_widths=())
    return note


def open_training_data(config: Config) -> Source:
    """
    Raises:
        UserError: faulty data, or another number of classes than the model's.
    """
    data, model = config.data, config.model
    if model.modality == MOLECULES:
        return molecules_of(config, "train")
    require(
        data.source != "molecules",
        "data.source is molecules, but model.modality is images; set model.modality=molecules, or take the recipe "
        "qm9_tiny",
    )
    source = open_source(data.source, data.path, model.image_size, "train", model.num_classes)
    classes = len(source.class_names)
    require(
        classes == model.num_classes,
        f"the data have {classes} classes, but model.num_classes is {model.num_classes}",
    )
    return source


def check_cuda_graph(config: Config, device: torch.device, strategy: Strategy) -> None:
    """
    Raises:
        UserError: `train.cuda_graph` is set, and these passes cannot be captured.
    """
    if not config.train.cuda_graph:
        return
    require(device.type == "cuda", f"train.cuda_graph is true, but this run is on {device.type}; set it to false")
    require(
        not strategy.reshard,
        f"train.cuda_graph is true, but {strategy.name} frees gathered weights after each pass, which nobody has tried "
        "in a CUDA graph; set parallel.reshard_after_forward=false or parallel.strategy=ddp",
    )


def data_lines(config: Config, source: Source, choice: LoaderChoice, note: str) -> Iterator[str]:
    """What a run says about its data before its first step.

    Args:
        note: what changed in the data since the run was last saved; may be empty.
    """
    train, samples = config.train, config.model.modality
    epochs = train.steps * train.batch_size / len(source)
    yield (
        f"data: {len(source)} {samples}, {choice.name} loader ({choice.why}); "
        f"{train.steps} steps are {epochs:.4g} epochs"
    )
    for each in filter(None, (note, *source.notes)):
        yield f"data: {printable(each)}"
    if source.left_out:
        yield f"left out: {'; '.join(source.left_out)}"


def process_lines(config: Config, strategy: Strategy, ranks: Ranks) -> Iterator[str]:
    """What a run says about its processes and machines before its first step; nothing of a process alone."""
    if ranks.world > 1:
        share = f"{config.train.batch_size // ranks.world} {config.model.modality}"
        yield f"{ranks.world} processes of {share}: {strategy.name}; {strategy.why}"
    if ranks.nodes > 1:
        yield f"machines: {', '.join(dict.fromkeys(known_hosts()))}"
        if kept_by_torchrun():
            yield (
                "warning: a machine that fails cannot be replaced by another while this torchrun runs; start it "
                "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            )
