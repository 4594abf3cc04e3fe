"""Profile of a step of UNITE-B: host synchronisations, launch time of a step, and kernels."""

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
from unite_fast.benchmarking.matmul_rate import synchronize
from unite_fast.benchmarking.measure import open_trainer, take_step
from unite_fast.training.train_step import TrainStep
from unite_fast.training.trainer import Trainer

IMAGES = 64
FEW = 4
"""Images of a step that is bound by the host."""
TOP = 25
KINDS = (
    ("attention", r"fmha|flash|attention|cudnn.*sdpa|sdpa"),
    ("convolution", r"conv|wgrad|dgrad|implicit|winograd|nchw|nhwc"),
    ("product", r"gemm|cutlass|cublas|nvjet|s\d+gemm|splitk|xmma"),
    ("optimizer", r"multi_tensor|foreach|adam|muon|gradient_(squares|norm)"),
    ("ours, Triton", r"_kernel(_\d+)?$|^_(adaln|gated|qk|swiglu|flow|noise|philox|words|masks|tap|normals)"),
    ("Inductor", r"^triton_"),
    ("copies and fills", r"memcpy|memset|copy_kernel|fill|CatArray|direct_copy"),
    ("sums", r"reduce_kernel|sum"),
    ("elementwise", r"elementwise|vectorized|unrolled"),
)
"""Kinds of kernels by name; the first match counts."""
ANNOTATIONS = r"PART |Optimizer\.|ProfilerStep"
"""Entries on the GPU side of a trace that are spans of the host, not kernels."""


def measure(c: Context) -> None:
    with open_trainer(config(c, c.backend_name, False, IMAGES)) as trainer:
        for _ in range(3):  # compiles and chooses algorithms
            take_step(trainer)
        synchronize(c.device)
        host_synchronisations(c, trainer)
        host_time(c, trainer)
        kernels(c, trainer)


def host_synchronisations(c: Context, trainer: Trainer) -> None:
    """Places where the host synchronises with the GPU, by PyTorch's warnings."""
    if not c.cuda:
        c.say("host waits", skipped="needs a CUDA device")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(2):
                take_step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename.rpartition('/')[2]}:{w.lineno} {str(w.message)[:70]}" for w in caught]
    places = [place for place in places if "synchroniz" in place]
    c.say("host waits", ok=not places, in_steps=2, places=sorted(set(places))[:10], peak_gb=peak_gb(c))


def host_time(c: Context, trainer: Trainer) -> None:
    """Milliseconds that the host needs to launch a step. With 64 images the full launch queue would block it."""
    few = 2 if c.tiny else FEW
    step = TrainStep(trainer.state, trainer.config, slice(0, few), few, trainer.train_step.lpips)
    batch = trainer.read()
    batch = replace(batch, data=batch.data[:few], labels=batch.labels[:few], ids=batch.ids[:few])
    launched, done = [], []
    for number in range(4 if c.tiny else 9):
        synchronize(c.device)
        start = time.perf_counter()
        step(batch)
        launched.append(1e3 * (time.perf_counter() - start))
        synchronize(c.device)
        if number > 1:  # the first steps may compile for the new size
            done.append(1e3 * (time.perf_counter() - start))
    c.say(
        "host",
        images=few,
        ms_to_ask=round(statistics.median(launched[2:]), 2),
        ms_to_end=round(statistics.median(done), 2),
    )


def kernels(c: Context, trainer: Trainer) -> None:
    """Profile one step by part. The device is synchronised between parts, so the kernels of a part are those that ran
    during it."""
    clock, names = trainer.speed.clock, defaultdict(int)
    original = clock.measure

    @contextmanager
    def measure(name: str):
        names[name] += 1
        synchronize(c.device)
        with record_function(f"PART {name} {names[name]}"), original(name):
            yield
            synchronize(c.device)

    clock.measure = measure
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if c.cuda else [])]
    batch = trainer.read()
    synchronize(c.device)
    try:
        with profile(activities=activities) as trace:
            start = time.perf_counter()
            with record_function("PART all"):
                trainer.train_step(batch)
                synchronize(c.device)
            wall = 1e3 * (time.perf_counter() - start)
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
    # Between the parts: copies of images, draws and masks, sums of losses.
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
    totals: dict[str, tuple[int, float]] = {}
    for event in events:
        count, ms = totals.get(key(event), (0, 0.0))
        totals[key(event)] = count + 1, ms + event.time_range.elapsed_us() / 1e3
    return totals


def by_time(totals: dict[str, tuple[int, float]]) -> list[tuple[str, tuple[int, float]]]:
    return sorted(totals.items(), key=lambda one: -one[1][1])


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
