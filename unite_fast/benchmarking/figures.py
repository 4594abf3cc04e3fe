"""The figures of a measurement as one flat row, and in words."""

import statistics

from unite_fast import __version__
from unite_fast.benchmarking.machine import describe
from unite_fast.benchmarking.measure import Measured, Window
from unite_fast.benchmarking.progress import number
from unite_fast.config import Config
from unite_fast.distributed.strategy import split_batch
from unite_fast.errors import UserError
from unite_fast.kernels import backend
from unite_fast.planning import predict
from unite_fast.planning.flops import image_flops, parameters
from unite_fast.planning.gpus import GPU, recognise

PARTS = ("data", "forward", "backward", "optimizer", "other")


def row(config: Config, measured: Measured, window: Window, data: str, overrides: tuple[str, ...]) -> dict:
    """All figures by name; a name tells its unit (ms, s, gb). None: there is no such figure.

    Args:
        data: what the images were: "synthetic", or the path.
    """
    batch, world = config.train.batch_size, measured.ranks.world
    fast, median, slow = quantiles(measured.step_seconds)
    flops, rate = image_flops(config), batch / median
    about = describe(measured.device)
    gpu = recognise(about["card"]) if measured.device.type == "cuda" else None
    found = {
        "recipe": config.name,
        **about,
        "version": __version__,
        "settings": " ".join(overrides),
        "gpus": world,
        "nodes": measured.ranks.nodes,
        "batch_size": batch,
        "micro_batch": split_batch(measured.ranks, batch, config.train.micro_batch)[1],
        "precision": config.train.precision,
        "kernels": backend.body_on(measured.device),
        "attention": backend.attention_on(measured.device),
        "compile": config.train.compile,
        "strategy": measured.strategy,
        "threads": config.train.threads,
        "data": data,
        "lpips": "off" if not config.perceptual.weight else "random weights" if measured.random_lpips else "on",
        "parameters": sum(parameters(config.model).values()),
        "flow_draws": config.objective.flow_draws,
        "warmup": window.warmup,
        "steps": len(measured.step_seconds),
        "images_per_s": rate,
        "images_per_s_slow": batch / slow,
        "images_per_s_fast": batch / fast,
        "images_per_s_mean": len(measured.step_seconds) * batch / measured.whole,
        "images_per_s_per_gpu": rate / world,
        "step_ms": median * 1e3,
        "step_ms_fast": fast * 1e3,
        "step_ms_slow": slow * 1e3,
        "first_step_s": measured.first_step,
        **{f"{part}_ms": measured.parts[part] * 1e3 for part in PARTS},
        "data_wait_share": measured.parts["data"] * len(measured.step_seconds) / measured.whole,
        "gflop_per_image": flops / 1e9,
        "product_tflops": measured.product_rate / 1e12,
        "mfu_of_product": rate / world * flops / measured.product_rate,
        "datasheet_tflops": gpu.tflops if gpu else None,
        "mfu_of_datasheet": rate / world * flops / (gpu.tflops * 1e12) if gpu else None,
        "memory_gb": measured.memory / 1e9,
        "memory_reserved_gb": measured.reserved / 1e9 or None,
        "bad_step": measured.bad_step,
    }
    found |= prediction(config, measured, gpu)
    released = gpu is not None and predict.of_released_speed(config)
    return found | {"released_images_per_s_per_gpu": predict.RELEASED_IMAGES_PER_S if released else None}


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 10th percentile, the median and the 90th percentile."""
    if len(seconds) == 1:
        return (seconds[0],) * 3
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], statistics.median(seconds), tenths[-1]


def prediction(config: Config, measured: Measured, gpu: GPU | None) -> dict:
    """What `unite-fast plan` says of images/s on as many of these cards, and of memory; or why it says nothing."""
    names = ("predicted_images_per_s_slow", "predicted_images_per_s_fast", "predicted_memory_gb")
    nothing = dict.fromkeys(names)
    if gpu is None:
        return nothing | {"why_no_prediction": "this card is not in the table (unite_fast/planning/gpus.py)"}
    ranks = measured.ranks
    try:
        plan = predict.make_plan(config, predict.Cluster(gpu, ranks.nodes, ranks.per_node))
    except UserError as error:
        return nothing | {"why_no_prediction": str(error)}
    numbers = plan.slow.images_per_s, plan.fast.images_per_s, sum(plan.memory.values()) / 1e9
    return dict(zip(names, numbers, strict=True)) | {"why_no_prediction": None}


def lines(found: dict, top: list[dict] | None = None) -> list[str]:
    """The row in words."""
    cpu = not found["cuda"]
    each = "process" if cpu else "GPU"
    how = "compiled" if found["compile"] else "eager"
    said = [
        f"{found['recipe']}: {found['parameters'] / 1e6:.2f} M parameters, F = {found['flow_draws']}, batch "
        f"{found['batch_size']}, micro-batch {found['micro_batch']}, {found['precision']}, {found['kernels']} kernels, "
        f"{found['attention']} attention, {how}, LPIPS {found['lpips']}, {found['data']} images",
        f"{found['gpus']} x {found['card']}, {found['strategy']}; torch {found['torch']}, "
        f"{'CUDA ' + found['cuda'] + ', ' if found['cuda'] else ''}triton {found['triton'] or 'none'}, commit "
        f"{found['commit']}, {found['date']}",
        "",
        f"images/s       {number(found['images_per_s'])}   a {each} {number(found['images_per_s_per_gpu'])}   "
        f"(median of {found['steps']} steps; 80 % lie in {number(found['images_per_s_slow'])} to "
        f"{number(found['images_per_s_fast'])}; mean {number(found['images_per_s_mean'])})",
        f"step           {number(found['step_ms'])} ms: "
        + ", ".join(f"{part} {number(found[f'{part}_ms'])}" for part in PARTS),
        f"data wait      {found['data_wait_share']:.1%} of the time",
        f"first step     {found['first_step_s']:.1f} s, which compiles; steps left out: {found['warmup']}",
        f"MFU            {found['mfu_of_product']:.1%} of {number(found['product_tflops'])} TFLOP/s, as measured here "
        f"of bfloat16 products; {number(found['gflop_per_image'])} GFLOP an image",
    ]
    if found["datasheet_tflops"]:
        share, rate = found["mfu_of_datasheet"], found["datasheet_tflops"]
        said.append(f"               {share:.1%} of {rate:g} TFLOP/s, the datasheet's")
    else:
        said.append("               no datasheet's rate is known of this card")
    reserved = f", {found['memory_reserved_gb']:.2f} GB reserved" if found["memory_reserved_gb"] else ""
    said.append(f"peak memory    {found['memory_gb']:.2f} GB a {each}{reserved}")
    said += _beside(found)
    if found["bad_step"] is not None:
        said.append(f"NOT FINITE     loss or gradient of step {found['bad_step']}: other numbers may take other times")
    if top is not None:
        said += ["", f"{'ms a step':>10} {'calls':>7} {'share':>6}  kernel"]
        said += [f"{one['ms']:10.3f} {one['calls']:7g} {one['share']:6.1%}  {one['name'][:90]}" for one in top]
    return said


def _beside(found: dict) -> list[str]:
    """Other figures that there are of the same."""
    low, high = found["predicted_images_per_s_slow"], found["predicted_images_per_s_fast"]
    if low:
        said = [
            f"predicted      {number(low)} to {number(high)} images/s, {found['predicted_memory_gb']:.1f} GB a GPU "
            "(unite-fast plan)"
        ]
    else:
        said = [f"predicted      nothing: {found['why_no_prediction']}"]
    if released := found["released_images_per_s_per_gpu"]:
        times = found["images_per_s_per_gpu"] / released
        said.append(
            f"released code  {released} images/s a GPU of 8 H200 (its authors' 26 minutes an epoch): here {times:.2f} x"
        )
    return said
