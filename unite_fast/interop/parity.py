"""Compare this implementation, quantity by quantity, with a trace of the released code.

How closely two correct programs agree depends on the quantity. Forward passes and first gradients agree to float32
rounding. But dopri5 chooses its steps from small differences, and Muon orthogonalises in bfloat16: both amplify
rounding, differently for each model. There the tolerance is measured on our side: we sample again from noise that
differs in its last bit, and train again with Muon in float32.

Errors of weights after the last step are relative to how far the weights moved, not to their size. A few steps move
them by a thousandth of their size, so relative to that, even weights that never moved would pass.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.config import Config
from unite_fast.errors import UserError
from unite_fast.interop.names import our_name
from unite_fast.interop.trace import Trace
from unite_fast.kernels import backend as kernel_backend
from unite_fast.model.unite import UNITE
from unite_fast.sampling import sampler
from unite_fast.sampling.solvers import ADAPTIVE_SOLVERS
from unite_fast.training.train_state import TrainState
from unite_fast.training.train_step import MicroBatch, accumulate_gradients
from unite_fast.utils.device import exact_float32

FORWARD, SAMPLED, LOSS, GRADIENT, FINAL, RATE = 1e-4, 1e-3, 1e-4, 1e-3, 1e-2, 1e-12
"""Maximum relative error by kind of quantity, where rounding is not amplified. RATE allows for another order of
multiplication."""

SLACK = 5
"""A measured tolerance is this multiple of the difference between our own runs. An independent program,
tests/interop/released.py, had errors of up to 1.9 times that difference in sampling (24 small models) and 2.1 times in
training (11 models)."""

RESOLUTION = 1e-4
"""Minimum movement of a weight relative to its size; below, float32 rounding of the weight dominates."""

HEAD = 8
"""Number of values that a trace stores of each weight after the last step."""

ONE_THREAD_WIDTH = 256
"""Below this encoder width use one thread. A second one saves little and is slow on a busy machine: the trace in
tests/data took 8 s on one thread, and 180 s on two when one of the two cores was busy."""

SHOWN = 20
"""Failures that `run` prints individually."""

KINDS = {
    "tokenize/": "forward",
    "denoise/": "forward",
    "sample/": "sampling",
    "optimizer/": "optimizers",
    "grad0": "gradients",
    "final_": "final parameters",
    "grad_norm": "gradients",
    "lr": "learning rates",
}
"""Kind of a quantity by the start of its name, without `stepK/`. All others are losses."""


@dataclass
class Row:
    """One compared quantity."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    @property
    def kind(self) -> str:
        name = self.name.partition("/")[2] if self.name.startswith("step") else self.name
        return next((kind for start, kind in KINDS.items() if name.startswith(start)), "losses")


@dataclass
class Group:
    """The rows of one kind."""

    kind: str
    count: int
    failed: int
    worst: Row
    """The row with the largest error relative to its tolerance."""

    @property
    def passed(self) -> bool:
        return self.failed == 0


def run(path: str | Path, backend: str = "reference", device: str | torch.device = "cpu") -> bool:
    """Compare with a trace file; print a summary by kind and the failures.

    Args:
        backend: backend of our kernels.
        device: device on which our model runs.

    Returns:
        Whether all quantities agree.

    Raises:
        UserError: no such backend, or an invalid or unsupported trace.
    """
    with kernel_backend.using(backend):
        trace = Trace(path, device)
        rows = compare(trace)
    print(f"{path}: {len(rows)} quantities, {backend} kernels, float32 on {trace.device}")
    print(f"{'':18}{'count':>6}{'error':>10}{'allowed':>10}  nearest to its tolerance")
    for group in summarise(rows):
        worst, verdict = group.worst, "" if group.passed else f"  {group.failed} FAILED"
        figures = f"{group.count:>6}{worst.error:>10.1e}{worst.tolerance:>10.1e}"
        print(f"{group.kind:18}{figures}  {worst.name}{verdict}")
    failed = [row for row in rows if not row.passed]
    for row in failed[:SHOWN]:
        print(f"FAILED {row.name}: error {row.error:.1e}, allowed {row.tolerance:.1e}")
    if len(failed) > SHOWN:
        print(f"FAILED {len(failed) - SHOWN} more")
    for note in notes(rows, trace):
        print(f"note: {note}")
    print(f"{len(failed)} of {len(rows)} quantities differ" if failed else f"all {len(rows)} quantities agree")
    return not failed


def compare(trace: Trace) -> list[Row]:
    """Compare every quantity of the trace with ours, in float32 on the trace's device.

    Raises:
        UserError: the trace is incomplete, inconsistent or not supported.
    """
    config = trace.config()
    with _threads_for(config), exact_float32():
        model = trace.model(config)
        return [
            *_forward_rows(trace, model, config),
            *_sample_rows(trace, model, config),
            *_training_rows(trace, model, config),
        ]


def summarise(rows: list[Row]) -> list[Group]:
    """The rows by kind, in order of appearance."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return [
        Group(kind, len(own), sum(not row.passed for row in own), max(own, key=_tolerance_used))
        for kind, own in kinds.items()
    ]


def _tolerance_used(row: Row) -> float:
    if math.isnan(row.error):
        return math.inf
    return row.error / row.tolerance if row.tolerance else (math.inf if row.error else 0.0)


def notes(rows: list[Row], trace: Trace) -> list[str]:
    """Explanations of the rows, one line each."""
    config = trace.config()
    return [note for note in (_adaptive_note(rows, config), _perceptual_note(trace, config)) if note]


def _adaptive_note(rows: list[Row], config: Config) -> str | None:
    groups = {group.kind: group for group in summarise(rows)}
    sampled = groups.pop("sampling").worst
    if config.sampling.solver not in ADAPTIVE_SOLVERS or sampled.error <= SAMPLED:
        return None
    alone = " while everything else agrees" if all(group.passed for group in groups.values()) else ""
    own = sampled.tolerance / SLACK
    return (
        f"samples differ by {sampled.error:.0e}{alone}: {config.sampling.solver} chooses its steps, which can amplify "
        f"rounding (our own samples differ by {own:.0e} when the noise changes in its last bit)"
    )


def _perceptual_note(trace: Trace, config: Config) -> str | None:
    for step in trace.meta["losses"]:
        rest = step["total"] - step["l1"] - config.objective.flow_weight * step["flow"]
        if abs(rest) > LOSS * abs(step["total"]):
            return "the trace's total loss is not L1 + flow loss: was LPIPS on? Traces do not record its dropout"
    return None


@contextmanager
def _threads_for(config: Config) -> Iterator[None]:
    threads = torch.get_num_threads()
    if config.model.encoder.width < ONE_THREAD_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row(trace: Trace, name: str, ours: Tensor, tolerance: float) -> Row:
    return Row(name, relative_error(ours, trace.shaped(name, *ours.shape)), tolerance)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of `theirs` (over 1 if that is zero)."""
    theirs = theirs.double()
    return ((ours.double() - theirs).norm() / (theirs.norm().item() or 1.0)).item()


@torch.no_grad()
def _forward_rows(trace: Trace, model: UNITE, config: Config) -> list[Row]:
    images, labels = trace.images(), trace.labels(config)
    batch, latents = len(images), (config.model.latent_tokens, config.model.latent_channels)
    registers, t = trace.numbers("tokenize/registers", batch, *latents), trace.numbers("tokenize/t", batch)
    no_class = torch.full_like(labels, config.model.num_classes)
    z = model.tokenize(images, registers, t)
    reconstruction = model.decode(z)
    x_t, denoise_t = trace.numbers("denoise/xt", batch, *latents), trace.numbers("denoise/t", batch)
    ours = {
        "tokenize/z": model.encoder(registers, t, no_class, images),
        "tokenize/z_normed": z,
        "tokenize/reconstruction_f16": reconstruction.half(),
        "tokenize/reconstruction_l1": (reconstruction - images).abs().mean(),
        "denoise/x_pred": model.denoise(x_t, denoise_t, labels),
    }
    return [_row(trace, name, value, FORWARD) for name, value in ours.items()]


@torch.no_grad()
def _sample_rows(trace: Trace, model: UNITE, config: Config) -> list[Row]:
    labels = trace.labels(config)
    noise = trace.numbers("sample/noise", len(labels), config.model.latent_tokens, config.model.latent_channels)

    def sample(noise: Tensor) -> dict[str, Tensor]:
        latents = sampler.sample_latents(model, labels, noise, config.sampling)
        return {"sample/latents": latents, "sample/images_f16": model.decode(latents).half()}

    ours = sample(noise)
    rows = [_row(trace, name, value, SAMPLED) for name, value in ours.items()]
    if config.sampling.solver not in ADAPTIVE_SOLVERS or all(row.passed for row in rows):
        return rows
    for towards in (math.inf, -math.inf, 0.0):
        nudged = sample(torch.nextafter(noise, torch.full_like(noise, towards)))
        for row in rows:
            row.tolerance = max(row.tolerance, SLACK * relative_error(nudged[row.name], ours[row.name]))
    return rows


@dataclass
class _Training:
    """Results of our training steps."""

    state: TrainState
    gradients: dict[str, Tensor]
    """Gradients of step 0, before clipping."""
    steps: list[dict[str, float]]
    """lr, l1, flow, total and grad_norm of each step."""


def _train(trace: Trace, model: UNITE, config: Config) -> _Training:
    state = TrainState(model, config)
    images, labels = trace.images(), trace.labels(config)
    gradients, steps = {}, []
    for step in range(config.train.steps):
        rate = state.learning_rate
        batch = MicroBatch(images, labels, trace.draws(step, config))
        losses = accumulate_gradients(model, [batch], 1, config)
        if step == 0:
            gradients = {name: _gradient(p).clone() for name, p in model.named_parameters()}
        norm = state.apply_gradients()
        values = {"l1": losses.l1, "flow": losses.flow, "total": losses.total, "grad_norm": norm}
        steps.append({"lr": rate} | {name: value.item() for name, value in values.items()})
    return _Training(state, gradients, steps)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # the losses depend on every parameter
    return parameter.grad


def _training_rows(trace: Trace, model: UNITE, config: Config) -> list[Row]:
    twin = copy.deepcopy(model)
    ours = _train(trace, model, config)
    again = _train(trace, twin, replace(config, optim=replace(config.optim, muon_dtype="float32")))
    return [
        *_optimizer_rows(trace, ours.state),
        *_gradient_rows(trace, ours.gradients, config.optim.clip_norm),
        *_step_rows(trace, ours, again),
        *_final_rows(trace, model, twin),
    ]


def _optimizer_rows(trace: Trace, state: TrainState) -> list[Row]:
    """One row per optimizer: the number of parameters that only one of the two programs trains with it."""
    rows = []
    for key, ours in (("muon_params", state.muon_parameters), ("adamw_params", state.adamw_parameters)):
        theirs = {our_name(name) for name in trace.meta.get(key, [])} - {None}
        if theirs:
            rows.append(Row(f"optimizer/{key}", len(theirs ^ set(ours)), 0))
    return rows


def _gradient_rows(trace: Trace, gradients: dict[str, Tensor], clip_norm: float) -> list[Row]:
    norms = trace.below("grad0norm/")
    scale = _recorded_scale(norms, trace.meta["losses"][0]["grad_norm"], clip_norm)

    def ours(theirs: str) -> Tensor:
        name = our_name(theirs)
        if name is None:  # computed or never read
            return torch.zeros_like(trace.tensor(f"state/{theirs}"))
        return scale * _known(trace, gradients, name, theirs)

    rows = [_row(trace, f"grad0norm/{theirs}", ours(theirs).norm(), GRADIENT) for theirs in norms]
    return rows + [_row(trace, f"grad0/{theirs}", ours(theirs), GRADIENT) for theirs in trace.below("grad0/")]


def _known(trace: Trace, ours: dict[str, Tensor], name: str, theirs: str) -> Tensor:
    if name not in ours:
        raise UserError(f"{trace.path}: {theirs} does not belong to a model of these sizes")
    return ours[name]


def _recorded_scale(norms: dict[str, Tensor], grad_norm: float, clip_norm: float) -> float:
    """1 if the gradients were recorded before clipping, the clipping factor if after.

    By the format, gradients are recorded before clipping; the trace in tests/data has them after. The total norm shows
    which.
    """
    clipped = min(1.0, clip_norm / grad_norm)
    recorded = sum(norm.item() ** 2 for norm in norms.values()) ** 0.5 / grad_norm
    return clipped if abs(recorded - clipped) < abs(recorded - 1.0) else 1.0


def _step_rows(trace: Trace, ours: _Training, again: _Training) -> list[Row]:
    rows = []
    for step, (theirs, own, other) in enumerate(zip(trace.meta["losses"], ours.steps, again.steps, strict=True)):
        for name, value in own.items():
            base = {"lr": RATE, "grad_norm": GRADIENT}.get(name, LOSS)
            measured = SLACK * abs(other[name] - value) / (abs(value) or 1.0)
            error = abs(value - theirs[name]) / (abs(theirs[name]) or 1.0)
            rows.append(Row(f"step{step}/{name}", error, max(base, measured)))
    return rows


def _final_rows(trace: Trace, model: UNITE, twin: UNITE) -> list[Row]:
    """Norm and first values of each tensor after the last step; errors relative to how far the tensor moved.

    Computed and unread tensors must not have moved in the released code.
    """
    ours, other = model.state_dict(), twin.state_dict()
    # If rounding moves one of n pixels across the kink of |x|, the gradient of the mean changes by 2 / sqrt(n).
    kink = 2 / trace["in/images_uint8"].size ** 0.5
    rows = []
    for theirs in trace.below("final_norm/"):
        name = our_name(theirs)
        start = trace.tensor(f"state/{theirs}")
        value = start if name is None else _known(trace, ours, name, theirs).detach()
        noise = 0.0 if name is None else (other[name] - value).norm().item()
        moved = max((value - start).norm().item(), RESOLUTION * value.norm().item()) or 1.0
        tolerance = max(FINAL, SLACK * kink, SLACK * noise / moved)
        norm = trace.shaped(f"final_norm/{theirs}").item()
        rows.append(Row(f"final_norm/{theirs}", abs(value.norm().item() - norm) / moved, tolerance))
        head = trace.shaped(f"final_head/{theirs}", min(HEAD, value.numel())).double()
        share = (head.numel() / value.numel()) ** 0.5  # expected share of an evenly distributed movement
        error = (value.flatten()[: len(head)].double() - head).norm().item()
        rows.append(Row(f"final_head/{theirs}", error / (moved * share), tolerance))
    return rows
