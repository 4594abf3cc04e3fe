"""The figures of a measurement, as a flat row for the table and as lines for the terminal."""

import statistics

from unite_fast import __version__
from unite_fast.benchmarking.machine import describe
from unite_fast.benchmarking.measure import Measurement, Window
from unite_fast.benchmarking.progress import number
from unite_fast.config import IMAGES, Config
from unite_fast.distributed.strategy import split_batch
from unite_fast.errors import UserError
from unite_fast.kernels import backend
from unite_fast.planning import predict
from unite_fast.planning.flops import image_flops, parameters
from unite_fast.planning.gpus import GPU, recognise

PARTS = ("data", "forward", "backward", "optimizer", "other")


def row(config: Config, measurement: Measurement, window: Window, data: str, overrides: tuple[str, ...]) -> dict:
    """All figures by name; names end in their unit (ms, s, gb). None: not available.

    Args:
        data: "synthetic", or the path of the data.
    """
    batch, world = config.train.batch_size, measurement.ranks.world
    fast, median, slow = quantiles(measurement.step_seconds)
    flops, rate = image_flops(config), batch / median
    machine = describe(measurement.device)
    gpu = recognise(machine["card"]) if measurement.device.type == "cuda" else None
    figures = {
        "recipe": config.name,
        **machine,
        "version": __version__,
        "settings": " ".join(overrides),
        "gpus": world,
        "nodes": measurement.ranks.nodes,
        "batch_size": batch,
        "micro_batch": split_batch(measurement.ranks, batch, config.train.micro_batch)[1],
        "precision": config.train.precision,
        "kernels": backend.backend_on(measurement.device),
        "attention": backend.attention_on(measurement.device),
        "compile": config.train.compile,
        "strategy": measurement.strategy,
        "threads": config.train.threads,
        "data": data,
        "lpips": "off" if not config.perceptual.weight else "random weights" if measurement.random_lpips else "on",
        "parameters": sum(parameters(config.model).values()),
        "flow_draws": config.objective.flow_draws,
        "warmup": window.warmup,
        "steps": len(measurement.step_seconds),
        "images_per_s": rate,
        "images_per_s_slow": batch / slow,
        "images_per_s_fast": batch / fast,
        "images_per_s_mean": len(measurement.step_seconds) * batch / measurement.whole,
        "images_per_s_per_gpu": rate / world,
        "step_ms": median * 1e3,
        "step_ms_fast": fast * 1e3,
        "step_ms_slow": slow * 1e3,
        "first_step_s": measurement.first_step,
        **{f"{part}_ms": measurement.parts[part] * 1e3 for part in PARTS},
        "data_wait_share": measurement.parts["data"] * len(measurement.step_seconds) / measurement.whole,
        "gflop_per_image": flops / 1e9,
        "product_tflops": measurement.matmul_rate / 1e12,
        "mfu_of_product": rate / world * flops / measurement.matmul_rate,
        "datasheet_tflops": gpu.tflops if gpu else None,
        "mfu_of_datasheet": rate / world * flops / (gpu.tflops * 1e12) if gpu else None,
        "memory_gb": measurement.memory / 1e9,
        "memory_reserved_gb": measurement.reserved / 1e9 or None,
        "bad_step": measurement.bad_step,
    }
    figures |= prediction(config, measurement, gpu)
    released = gpu is not None and predict.has_released_speed(config)
    return figures | {"released_images_per_s_per_gpu": predict.RELEASED_IMAGES_PER_S if released else None}


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 10th percentile, the median and the 90th percentile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], statistics.median(seconds), tenths[-1]


def prediction(config: Config, measurement: Measurement, gpu: GPU | None) -> dict:
    """images/s and memory that `unite-fast plan` predicts for these GPUs, or why it cannot."""
    names = ("predicted_images_per_s_slow", "predicted_images_per_s_fast", "predicted_memory_gb")
    none = dict.fromkeys(names)
    if gpu is None:
        return none | {"why_no_prediction": "this card is not in the table (unite_fast/planning/gpus.py)"}
    ranks = measurement.ranks
    try:
        plan = predict.make_plan(config, predict.Cluster(gpu, ranks.nodes, ranks.per_node))
    except UserError as error:
        return none | {"why_no_prediction": str(error)}
    numbers = plan.slow.images_per_s, plan.fast.images_per_s, sum(plan.memory.values()) / 1e9
    return dict(zip(names, numbers, strict=True)) | {"why_no_prediction": None}


def lines(figures: dict, top: list[dict] | None = None, modality: str = IMAGES) -> list[str]:
    """The row as lines of text.

    Args:
        top: kernels by time, to list as well.
        modality: of the model, `config.model.modality`.
    """
    rate = f"{modality}/s"
    cpu = not figures["cuda"]
    each = "process" if cpu else "GPU"
    how = "compiled" if figures["compile"] else "eager"
    text = [
        f"{figures['recipe']}: {figures['parameters'] / 1e6:.2f} M parameters, F = {figures['flow_draws']}, batch "
        f"{figures['batch_size']}, micro-batch {figures['micro_batch']}, {figures['precision']}, "
        f"{figures['kernels']} kernels, {figures['attention']} attention, {how}, LPIPS {figures['lpips']}, "
        f"{figures['data']} {modality}",
        f"{figures['gpus']} x {figures['card']}, {figures['strategy']}; torch {figures['torch']}, "
        f"{'CUDA ' + figures['cuda'] + ', ' if figures['cuda'] else ''}triton {figures['triton'] or 'none'}, commit "
        f"{figures['commit']}, {figures['date']}",
        "",
        f"{rate:<14} {number(figures['images_per_s'])}   per {each} {number(figures['images_per_s_per_gpu'])}   "
        f"(median of {figures['steps']} steps; 80 % lie in {number(figures['images_per_s_slow'])} to "
        f"{number(figures['images_per_s_fast'])}; mean {number(figures['images_per_s_mean'])})",
        f"step           {number(figures['step_ms'])} ms: "
        + ", ".join(f"{part} {number(figures[f'{part}_ms'])}" for part in PARTS),
        f"data wait      {figures['data_wait_share']:.1%} of the time",
        f"first step     {figures['first_step_s']:.1f} s, with compilation; warm-up steps: {figures['warmup']}",
        f"MFU            {figures['mfu_of_product']:.1%} of {number(figures['product_tflops'])} TFLOP/s, the measured "
        f"rate of bfloat16 matmuls; {number(figures['gflop_per_image'])} GFLOP per {modality.removesuffix('s')}",
    ]
    if figures["datasheet_tflops"]:
        share, peak = figures["mfu_of_datasheet"], figures["datasheet_tflops"]
        text.append(f"               {share:.1%} of {peak:g} TFLOP/s, the rate of the datasheet")
    else:
        text.append("               no datasheet rate is known for this card")
    reserved = f", {figures['memory_reserved_gb']:.2f} GB reserved" if figures["memory_reserved_gb"] else ""
    text.append(f"peak memory    {figures['memory_gb']:.2f} GB per {each}{reserved}")
    text += _comparisons(figures, rate)
    if figures["bad_step"] is not None:
        text.append(
            f"NOT FINITE     loss or gradient of step {figures['bad_step']}: speed may differ with finite values"
        )
    if top is not None:
        text += ["", f"{'ms / step':>10} {'calls':>7} {'share':>6}  kernel"]
        text += [f"{one['ms']:10.3f} {one['calls']:7g} {one['share']:6.1%}  {one['name'][:90]}" for one in top]
    return text


def _comparisons(figures: dict, rate: str) -> list[str]:
    """The predicted speed and that of the released code, if known."""
    low, high = figures["predicted_images_per_s_slow"], figures["predicted_images_per_s_fast"]
    if low:
        text = [
            f"predicted      {number(low)} to {number(high)} {rate}, {figures['predicted_memory_gb']:.1f} GB per GPU "
            "(unite-fast plan)"
        ]
    else:
        text = [f"predicted      nothing: {figures['why_no_prediction']}"]
    if released := figures["released_images_per_s_per_gpu"]:
        times = figures["images_per_s_per_gpu"] / released
        text.append(
            f"released code  {released} {rate} per GPU on 8 H200 (26 minutes per epoch, its authors report): here "
            f"{times:.2f} x"
        )
    return text
