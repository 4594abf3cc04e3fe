"""Inside a step of UNITE-B: where the host waits, how long it takes to ask for a step, which kernels run."""

import re
import statistics
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_parts.context import Context
from gpu_parts.steps import config, peak_gb
from unite_fast.benchmarking.measure import open_trainer, take_step
from unite_fast.training.train_step import TrainStep
from unite_fast.training.trainer import Trainer

IMAGES = 64
FEW = 4
"""Images of a step that a GPU ends before the host has asked for it."""
TOP = 25
KINDS = (
    ("attention", r"fmha|flash|attention|cudnn.*sdpa|sdpa"),
    ("convolution", r"conv|wgrad|dgrad|implicit|winograd|nchw|nhwc"),
    ("product", r"gemm|cutlass|cublas|nvjet|s\d+gemm|splitk|xmma"),
    ("ours, Triton", r"_kernel(_\d+)?$|^_(adaln|gated|qk|swiglu|flow|noise|philox|words|masks|tap|normals)"),
    ("Inductor", r"^triton_"),
    ("copies and fills", r"memcpy|memset|copy_kernel|fill|CatArray|direct_copy"),
    ("optimizer", r"multi_tensor|foreach|adam"),
    ("sums", r"reduce_kernel|sum"),
    ("elementwise", r"elementwise|vectorized|unrolled"),
)
"""Of kernels, by name, the first that matches."""
ANNOTATIONS = r"PART |Optimizer\.|ProfilerStep"
"""What else a trace has on the GPU's side: spans of the host's, not kernels."""


def measure(c: Context) -> None:
    with open_trainer(config(c, c.backend_name, False, IMAGES)) as trainer:
        for _ in range(3):  # compiles and chooses algorithms
            take_step(trainer)
        c.wait()
        waits(c, trainer)
        asking(c, trainer)
        kernels(c, trainer)


def waits(c: Context, trainer: Trainer) -> None:
    """Places where PyTorch says that the host waits for the GPU."""
    if not c.cuda:
        c.say("host waits", skipped="needs a CUDA device")
        return
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(2):
                take_step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename.rpartition('/')[2]}:{w.lineno} {str(w.message)[:70]}" for w in met]
    places = [place for place in places if "synchroniz" in place]
    c.say("host waits", ok=not places, in_steps=2, places=sorted(set(places))[:10], peak_gb=peak_gb(c))


def asking(c: Context, trainer: Trainer) -> None:
    """Milliseconds that the host needs for a step. At 64 images it would wait for room in the GPU's queue."""
    few = 2 if c.tiny else FEW
    step = TrainStep(trainer.state, trainer.config, slice(0, few), few, trainer.train_step.lpips)
    batch = trainer.read()
    batch = replace(batch, images=batch.images[:few], labels=batch.labels[:few], ids=batch.ids[:few])
    asked, done = [], []
    for number in range(4 if c.tiny else 9):
        c.wait()
        begun = time.perf_counter()
        step(batch)
        asked.append(1e3 * (time.perf_counter() - begun))
        c.wait()
        if number > 1:  # other sizes may be compiled for
            done.append(1e3 * (time.perf_counter() - begun))
    c.say(
        "host",
        images=few,
        ms_to_ask=round(statistics.median(asked[2:]), 2),
        ms_to_end=round(statistics.median(done), 2),
    )


def kernels(c: Context, trainer: Trainer) -> None:
    """A profile of one step, its parts kept apart: the device is waited for between them, and each part's kernels are
    those that ran meanwhile."""
    clock, names = trainer.speed.clock, defaultdict(int)
    plain = clock.measure

    @contextmanager
    def measure(name: str):
        names[name] += 1
        c.wait()
        with record_function(f"PART {name} {names[name]}"), plain(name):
            yield
            c.wait()

    clock.measure = measure
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if c.cuda else [])]
    batch = trainer.read()
    c.wait()
    try:
        with profile(activities=activities) as trace:
            begun = time.perf_counter()
            with record_function("PART all"):
                trainer.train_step(batch)
                c.wait()
            wall = 1e3 * (time.perf_counter() - begun)
    finally:
        del clock.measure
    cuda = torch.autograd.DeviceType.CUDA
    events = list(trace.events())
    parts = {e.name[5:]: e.time_range for e in events if e.name.startswith("PART ") and e.device_type != cuda}
    ran = [
        e for e in events if e.device_type == cuda and not e.is_user_annotation and not re.match(ANNOTATIONS, e.name)
    ]
    if not c.cuda:
        ran = [e for e in events if e.device_type != cuda and not e.is_user_annotation and not e.cpu_children]
    busy = sum(e.time_range.elapsed_us() for e in ran) / 1e3
    c.say("step", wall_ms=round(wall, 2), busy_ms=round(busy, 2), busy_share=round(busy / wall, 3), kernels=len(ran))
    whole = parts.pop("all")
    within = {name: [e for e in ran if span.start <= e.time_range.start < span.end] for name, span in parts.items()}
    walls = {name: span.elapsed_us() for name, span in parts.items()}
    # Copies of the images, draws and masks, and the sums of losses.
    known = {id(e) for inside in within.values() for e in inside}
    within["between"] = [e for e in ran if id(e) not in known and whole.start <= e.time_range.start < whole.end]
    walls["between"] = whole.elapsed_us() - sum(walls.values())
    for name, inside in within.items():
        kinds = sums(inside, lambda e: kind(e.name))
        c.say(
            f"part {name}",
            wall_ms=round(walls[name] / 1e3, 2),
            busy_ms=round(sum(ms for _, ms in kinds.values()), 2),
            kernels=len(inside),
            kinds={key: {"ms": round(ms, 2), "kernels": count} for key, (count, ms) in by_time(kinds)},
        )
    for name, (count, ms) in by_time(sums(ran, lambda e: e.name))[:TOP]:
        c.say("kernel", kernel=name[:110], calls=count, ms=round(ms, 3), share=round(ms / busy, 4), kind=kind(name))


def sums(events: list, key) -> dict[str, tuple[int, float]]:
    """Number and milliseconds of events, by key."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        count, ms = found.get(key(event), (0, 0.0))
        found[key(event)] = count + 1, ms + event.time_range.elapsed_us() / 1e3
    return found


def by_time(found: dict[str, tuple[int, float]]) -> list[tuple[str, tuple[int, float]]]:
    return sorted(found.items(), key=lambda one: -one[1][1])


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
