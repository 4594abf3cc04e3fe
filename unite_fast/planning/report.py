"""A plan in words: what `unite-fast plan` prints."""

from unite_fast.planning.predict import (
    CPU_SECONDS,
    FAST,
    RELEASED_IMAGES_PER_S,
    RESERVED,
    SLOW,
    Assumptions,
    Plan,
    exchange_seconds,
    flops,
    image_work,
    memory,
    of_released_speed,
)


def lines(plan: Plan, price: float = 0.0) -> list[str]:
    """The plan, a line each. `price`: EUR of a GPU for an hour; 0: costs are not said."""
    config, cluster = plan.config, plan.cluster
    gpu, share = cluster.gpu, config.train.batch_size // cluster.gpus
    return [
        f"PREDICTION, not a measurement: {config.name} on {cluster.nodes} x {cluster.gpus_per_node} {gpu.key}",
        "",
        f"model      {sum(flops.parameters(config.model).values()) / 1e6:.2f} M parameters, "
        f"F = {config.objective.flow_draws}",
        f"strategy   {plan.strategy}: {plan.why}",
        f"batch      {config.train.batch_size} = {cluster.gpus} GPUs x {plan.micro_steps} micro-batches of "
        f"{plan.micro_batch}",
        "",
        *_memory(plan),
        f"largest micro-batch that fits: {plan.largest or 'none'} (of the {share} images a GPU has of each batch)",
        "",
        *_work(plan),
        "",
        *_speed(plan),
        "",
        *_run(plan, price),
        *_released(plan),
        "",
        *_assumptions(plan),
    ]


def _memory(plan: Plan) -> list[str]:
    gpu = plan.cluster.gpu
    total = sum(plan.memory.values())
    verdict = "fits" if plan.fits else f"does NOT fit: {RESERVED:.0%} of the memory must stay free"
    rows = [f"  {name:<28}{size / 1e9:9.2f}" for name, size in plan.memory.items()]
    head = f"memory of one GPU, micro-batch {plan.micro_batch}, GB"
    return [head, *rows, f"  {'sum':<28}{total / 1e9:9.2f}  of {gpu.memory:g}: {verdict}"]


def _work(plan: Plan) -> list[str]:
    work, images = image_work(plan.config), plan.config.train.batch_size // plan.cluster.gpus
    each = ", ".join(f"{name} {part.total / 1e9:.1f}" for name, part in flops.parts(plan.config).items() if part.total)
    rows = [
        f"work of one image: {flops.image_flops(plan.config) / 1e9:.0f} GFLOP ({each}); the released code, "
        f"which computes tokens that nobody reads, {flops.image_flops(plan.config, skip_unread=False) / 1e9:.0f}",
        f"elementwise bytes of one image: model {work.moved / 1e9:.2f} GB, LPIPS {work.lpips_moved / 1e9:.2f} GB",
        f"work of one GPU and step: {images * flops.image_flops(plan.config) / 1e12:.1f} TFLOP, "
        f"and Newton-Schulz {flops.newton_schulz(plan.config.model) / 1e12:.2f} TFLOP over all GPUs",
    ]
    if plan.exchanges:
        rows.append(f"{'communication of a step':44}{'GB':>6}{'times':>7}{'ms':>14}")
    for one in plan.exchanges:
        fast, slow = (exchange_seconds(one, plan.cluster, assumed) * 1e3 for assumed in (FAST, SLOW))
        beside = "beside the backward pass" if one.overlaps else "nothing beside it"
        rows.append(f"  {one.name:42}{one.size / 1e9:6.2f}{one.times:7}{f'{fast:.1f} to {slow:.1f}':>14}, {beside}")
    return rows


def _speed(plan: Plan) -> list[str]:
    rows = [f"time of one step, ms       {'fast':>8}{'slow':>8}"]
    rows += [
        f"  {name:<25}{plan.fast.seconds[name] * 1e3:8.1f}{plan.slow.seconds[name] * 1e3:8.1f}"
        for name in plan.fast.seconds
    ]
    low, high = plan.slow.images_per_s, plan.fast.images_per_s
    gpus = plan.cluster.gpus
    rows.append(
        f"images/s   {low:.0f} to {high:.0f}, a GPU {low / gpus:.0f} to {high / gpus:.0f}; "
        f"MFU {plan.slow.share_of_peak:.0%} to {plan.fast.share_of_peak:.0%}"
    )
    bounds = list(dict.fromkeys((plan.fast.bound_by, plan.slow.bound_by)))
    rows.append(f"bound by   {' (fast end), '.join(bounds)}{' (slow end)' if len(bounds) > 1 else ''}")
    if plan.data:
        cores = high / plan.cluster.nodes * CPU_SECONDS[plan.data]
        rows.append(
            f"data       {plan.data}: at the fast end {cores:.1f} CPU cores of each node read images, or they bound it"
        )
    return rows


def _run(plan: Plan, price: float) -> list[str]:
    images = plan.config.train.steps * plan.config.train.batch_size
    hours = [images / speed.images_per_s / 3600 for speed in (plan.fast, plan.slow)]
    gpu_hours = [each * plan.cluster.gpus for each in hours]
    row = f"run        {plan.config.train.steps} steps: {hours[0]:.1f} to {hours[1]:.1f} hours"
    row += f", {gpu_hours[0]:.0f} to {gpu_hours[1]:.0f} GPU hours"
    if price:
        row += f", {gpu_hours[0] * price:.0f} to {gpu_hours[1] * price:.0f} EUR at {price:g} EUR a GPU hour"
    return [row]


def _released(plan: Plan) -> list[str]:
    """What its authors measured of the released code, beside a plan for the same."""
    if not of_released_speed(plan.config) or (plan.cluster.gpu.key, plan.cluster.gpus) != ("h200", 8):
        return []
    return [
        f"measured   the released code on 8 H200: {RELEASED_IMAGES_PER_S} images/s a GPU (its authors' 26 minutes an "
        f"epoch); predicted here {plan.slow.images_per_s / 8:.0f} to {plan.fast.images_per_s / 8:.0f}"
    ]


def _assumptions(plan: Plan) -> list[str]:
    gpu = plan.cluster.gpu

    def rates(assumed: Assumptions) -> str:
        beside = "communication hidden behind backward passes" if assumed.hidden else "no communication hidden"
        return (
            f"  {assumed.name}: products at {assumed.products:.0%} of peak, convolutions at "
            f"{assumed.convolutions:.0%}, memory at {assumed.memory:.0%}, links at {assumed.links:.0%}; {beside}; "
            f"the busiest GPU has {assumed.imbalance:g} x an even share of Newton-Schulz"
        )

    return [
        "assumptions",
        f"  {gpu.key}: {gpu.tflops:g} TFLOP/s dense bfloat16, {gpu.memory:g} GB, {gpu.bandwidth:g} TB/s, "
        f"{gpu.link:g} GB/s to the GPUs of its node ({gpu.source}); {gpu.network:g} GB/s to other nodes (assumed)",
        rates(FAST),
        rates(SLOW),
        "  bfloat16 autocast, float32 residual, fused kernels, compiled blocks; no time for launches, logging, "
        "checkpoints, pictures and restarts",
        f"  memory: {memory.RUNTIME_BYTES / 1e9:g} GB for CUDA, NCCL and cuBLAS, {memory.SLACK:.0%} lost to the "
        f"allocator, {RESERVED:.0%} left free; the reconstruction's activations are freed before the flow draws",
        "  sent: float32 gradients, bfloat16 parameters, bfloat16 updates of Muon",
    ]
