"""The output of `unite-fast plan`."""

from collections.abc import Mapping, Sequence

from unite_fast.config import IMAGES, Config
from unite_fast.errors import printable
from unite_fast.optim.lr_schedule import describe_rate
from unite_fast.planning import flops, launches, memory, scaling
from unite_fast.planning.assumptions import FAST, SLOW, Assumptions
from unite_fast.planning.communication import call_seconds, collective_seconds, mesh
from unite_fast.planning.gpus import GPU
from unite_fast.planning.predict import (
    CPU_SECONDS,
    RELEASED_IMAGES_PER_S,
    RESERVED,
    Plan,
    has_released_speed,
    image_work,
)
from unite_fast.planning.step_bytes import step_bytes


def lines(plan: Plan, price: float = 0.0, measured: Sequence[Mapping[str, str]] = ()) -> list[str]:
    """The plan as lines of text.

    Args:
        price: EUR per GPU hour; 0: no costs.
        measured: rows of `unite-fast bench` for this recipe, card and number of GPUs, shown beside the prediction.
    """
    config, cluster = plan.config, plan.cluster
    name = printable(config.name)
    gpu, share = cluster.gpu, config.train.batch_size // cluster.gpus
    return [
        f"PREDICTION, not a measurement: {name} on {cluster.nodes} x {cluster.gpus_per_node} {gpu.key}",
        "",
        f"model      {sum(flops.parameters(config.model).values()) / 1e6:.2f} M parameters, "
        f"F = {config.objective.flow_draws}",
        f"strategy   {plan.strategy}: {plan.why}",
        f"batch      {config.train.batch_size} = {cluster.gpus} GPUs x {plan.micro_steps} micro-batches of "
        f"{plan.micro_batch}; {describe_rate(config.schedule, config.train.batch_size)}",
        *_too_few(plan),
        "",
        *_memory(plan),
        f"largest micro-batch that fits: {plan.largest_micro_batch or 'none'} (of {share} {config.model.modality} per "
        "GPU and step)",
        "",
        *_work(plan),
        "",
        *_speed(plan),
        "",
        *_run(plan, price),
        *_released_speed(plan),
        *_measured(plan, measured),
        "",
        *([*_table(scaling.by_nodes(config, gpu, cluster.gpus_per_node)), ""] if plan.fits else []),
        *_assumptions(plan),
    ]


def scaling_lines(config: Config, gpu: GPU, gpus_per_node: int) -> list[str]:
    """Hours by number of nodes, at the recipe's batch and with one that grows."""
    head = f"PREDICTION, not a measurement: {printable(config.name)} on {gpu.key}, {gpus_per_node} GPUs a node"
    fixed, grown = (scaling.by_nodes(config, gpu, gpus_per_node, grow) for grow in (False, True))
    return [head, "", *_table(fixed), "", *_table(grown)]


def _table(scale: scaling.Scale) -> list[str]:
    last = scale.plans[-1].config.train
    grows = last.batch_size != scale.plans[0].config.train.batch_size
    batch = f"at least {scaling.LEAST_IMAGES} images per GPU" if grows else f"batch {last.batch_size}"
    rows = [f"{batch}, {scale.plans[0].images / 1e6:.1f} M {scale.plans[0].config.model.modality} in all"]
    rows.append(f"{'GPUs':>6}{'batch':>7}{'each':>6}{'steps':>9}{'hours':>16}{'GPU hours':>16}{'MFU':>12}  bound by")
    for plan in scale.plans:
        gpus, train = plan.cluster.gpus, plan.config.train
        hours, gpu_hours = (" to ".join(f"{n * h:.{d}f}" for h in plan.hours) for n, d in ((1, 1), (gpus, 0)))
        if not plan.fits:
            hours = gpu_hours = "does not fit"
        rows.append(
            f"{gpus:6}{train.batch_size:7}{train.batch_size // gpus:6}{train.steps:9}{hours:>16}{gpu_hours:>16}"
            f"{f'{plan.slow.mfu:.0%} to {plan.fast.mfu:.0%}':>12}  {_bounds(plan)}"
        )
    return rows if grows else [*rows, _best(scale)]


def _best(scale: scaling.Scale) -> str:
    fast, slow = (f"{gpus} GPUs" if gpus else "the table" for gpus in scale.best)
    beyond = fast if fast == slow else f"{fast} (fast end) and {slow} (slow end)"
    return f"hours stop falling beyond {beyond}: twice as many save less than {scaling.LEAST_SAVING:.0%}"


def _too_few(plan: Plan) -> list[str]:
    share = plan.config.train.batch_size // plan.cluster.gpus
    if share >= scaling.LEAST_IMAGES:
        return []
    return [
        f"WARNING: {share} {plan.config.model.modality} per GPU and step; below {scaling.LEAST_IMAGES}, optimizer, "
        "communication and launches take most of a step: use fewer GPUs or a larger train.batch_size"
    ]


def _bounds(plan: Plan) -> str:
    return ", ".join(dict.fromkeys((plan.fast.bound_by, plan.slow.bound_by)))


def _memory(plan: Plan) -> list[str]:
    gpu = plan.cluster.gpu
    total = sum(plan.memory.values())
    verdict = "fits" if plan.fits else f"does NOT fit: {RESERVED:.0%} of the memory must stay free"
    rows = [f"  {name:<28} {size / 1e9:8.2f}" for name, size in plan.memory.items()]
    head = f"memory per GPU, micro-batch {plan.micro_batch}, GB"
    return [head, *rows, f"  {'sum':<28} {total / 1e9:8.2f}  of {gpu.memory:g}: {verdict}"]


def _work(plan: Plan) -> list[str]:
    config, one = plan.config, plan.config.model.sample_name
    work, count, each = image_work(config), config.train.batch_size // plan.cluster.gpus, flops.image_flops(config)
    parts = ", ".join(f"{name} {part.total / 1e9:.1f}" for name, part in flops.parts(config).items() if part.total)
    released = ""
    if config.model.modality == IMAGES:
        all_tokens = flops.image_flops(config, skip_unread=False)
        released = f"; the released code, which also computes unread tokens, {all_tokens / 1e9:.0f}"
    traffic = {"encoder": work.encoder_bytes, "decoder": work.decoder_bytes, "LPIPS": work.lpips_bytes}
    moved = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in traffic.items() if size)
    launched = launches.step_launches(config, mesh(plan.strategy, plan.cluster), plan.micro_steps, plan.collectives)
    passes = f"{launches.micro_batch_launches(config):,} per micro-batch"
    passes = "a CUDA graph and the optimizers" if config.train.cuda_graph else passes
    rows = [
        f"work per {one}: {each / 1e9:.0f} GFLOP ({parts}){released}",
        f"elementwise traffic per {one}, GB: {moved}; all traffic of a step "
        f"{sum(step_bytes(config).values()) / 1e9:.2f}",
        f"work per GPU and step: {count * each / 1e12:.1f} TFLOP, "
        f"plus Newton-Schulz {flops.newton_schulz(config.model) / 1e12:.2f} TFLOP over all GPUs",
        f"launches: {launched:,} per step, {passes}",
    ]
    if work.float8:
        share = work.float8 / (work.float8 + work.matmul)
        rows.append(
            f"float8: {share:.0%} of the matmul FLOPs outside attention and LPIPS; rounding moves "
            f"{work.float8_bytes / 1e9:.2f} GB per {one}; MFU is relative to the bfloat16 peak"
        )
    if plan.collectives:
        rows.append(f"{'communication per step':44}{'GB':>6}{'times':>7}{'calls':>7}{'ms':>16}{'of it latency':>16}")
    for each in plan.collectives:
        both = [collective_seconds(each, plan.cluster, assumed) * 1e3 for assumed in (FAST, SLOW)]
        latency = [each.calls * call_seconds(each, plan.cluster, assumed) * 1e3 for assumed in (FAST, SLOW)]
        both, latency = (f"{fast:.1f} to {slow:.1f}" for fast, slow in (both, latency))
        overlap = "overlaps with backward" if each.overlaps else "no overlap"
        rows.append(
            f"  {each.name:42} {each.size / 1e9:5.2f} {each.times:6} {each.calls:6}{both:>16}{latency:>16}, {overlap}"
        )
    return rows


def _speed(plan: Plan) -> list[str]:
    rows = [f"time per step, ms          {'fast':>8}{'slow':>8}"]
    rows += [
        f"  {name:<25} {plan.fast.seconds[name] * 1e3:7.1f} {plan.slow.seconds[name] * 1e3:7.1f}"
        for name in plan.fast.seconds
        if plan.fast.seconds[name] or plan.slow.seconds[name]
    ]
    low, high = plan.slow.images_per_s, plan.fast.images_per_s
    gpus, rate = plan.cluster.gpus, f"{plan.config.model.modality}/s"
    rows.append(
        f"{rate:<10} {low:.0f} to {high:.0f}, per GPU {low / gpus:.0f} to {high / gpus:.0f}; "
        f"MFU {plan.slow.mfu:.0%} to {plan.fast.mfu:.0%}"
    )
    bounds = _bounds(plan).split(", ")
    rows.append(f"bound by   {' (fast end), '.join(bounds)}{' (slow end)' if len(bounds) > 1 else ''}")
    if plan.data:
        cores = high / plan.cluster.nodes * CPU_SECONDS[plan.data]
        rows.append(f"data       {plan.data}: the fast end needs {cores:.1f} CPU cores per node for reading images")
    return rows


def _run(plan: Plan, price: float) -> list[str]:
    if not plan.fits:
        return [
            "run        no time and no cost: it does not fit; use more or larger GPUs, or a smaller train.micro_batch"
        ]
    hours, images = plan.hours, f"{plan.images / 1e6:.1f} M {plan.config.model.modality}"
    gpu_hours = [each * plan.cluster.gpus for each in hours]
    row = f"run        {plan.config.train.steps} steps, {images}: {hours[0]:.1f} to {hours[1]:.1f} hours"
    row += f", {gpu_hours[0]:.0f} to {gpu_hours[1]:.0f} GPU hours"
    if price:
        row += f", {gpu_hours[0] * price:.0f} to {gpu_hours[1] * price:.0f} EUR at {price:g} EUR per GPU hour"
    return [row]


def _released_speed(plan: Plan) -> list[str]:
    """The measured speed of the released code, if it was measured for this model and cluster."""
    if not has_released_speed(plan.config) or (plan.cluster.gpu.key, plan.cluster.gpus) != ("h200", 8):
        return []
    return [
        f"measured   the released code on 8 H200: {RELEASED_IMAGES_PER_S} images/s per GPU (its authors report 26 "
        f"minutes per epoch); predicted here {plan.slow.images_per_s / 8:.0f} to {plan.fast.images_per_s / 8:.0f}"
    ]


def _measured(plan: Plan, rows: Sequence[Mapping[str, str]]) -> list[str]:
    low, high = (speed.images_per_s / plan.cluster.gpus for speed in (plan.slow, plan.fast))
    rate = f"{plan.config.model.modality}/s"
    return [
        f"measured   {row['date']}, commit {row['commit']}: {float(row['images_per_s_per_gpu']):.1f} {rate} per GPU "
        f"({row.get('settings') or 'the recipe as it is'}); predicted {low:.0f} to {high:.0f}"
        for row in rows
    ]


def _assumptions(plan: Plan) -> list[str]:
    gpu = plan.cluster.gpu
    float8 = f", {gpu.float8_tflops:g} float8" if plan.config.train.precision == "float8" else ""

    def rates(assumed: Assumptions) -> str:
        latency = assumed.latency
        overlap = "communication overlaps with backward" if assumed.overlap else "no communication overlaps"
        return (
            f"  {assumed.name}: matmuls at {assumed.matmul:.0%} of peak, attention at {assumed.attention:.0%}, "
            f"convolutions at {assumed.convolutions:.0%}, memory at {assumed.memory:.0%}, links at {assumed.links:.0%}"
            f"; {overlap}; the busiest GPU has {assumed.imbalance:g} x an even share of Newton-Schulz; "
            f"a collective takes {latency.call * 1e6:g} us, a hop of a ring {latency.ring * 1e6:g} us "
            f"({latency.ring_across * 1e6:g} between nodes), of a tree {latency.tree * 1e6:g} "
            f"({latency.tree_across * 1e6:g}); the host takes "
            f"{assumed.launch * 1e6:g} us a launch"
        )

    return [
        "assumptions",
        f"  {gpu.key}: {gpu.tflops:g} TFLOP/s dense bfloat16{float8}, {gpu.memory:g} GB, {gpu.bandwidth:g} TB/s, "
        f"{gpu.link:g} GB/s within the node ({gpu.source}); {gpu.network:g} GB/s to other nodes (assumed)",
        rates(FAST),
        rates(SLOW),
        "  bfloat16 autocast, float32 residual, fused kernels, compiled blocks, with the launches of eager ones; "
        "logging, checkpoints, pictures and restarts take no time",
        f"  memory: {memory.RUNTIME_BYTES / 1e9:g} GB for CUDA, NCCL and cuBLAS, {memory.SLACK:.0%} lost to the "
        f"allocator, {RESERVED:.0%} left free; the reconstruction's activations are freed before the flow draws",
        "  communication: float32 gradients, bfloat16 parameters, bfloat16 updates of Muon",
    ]
