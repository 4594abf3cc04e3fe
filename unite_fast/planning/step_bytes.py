"""Bytes of GPU memory traffic per image of a training step, pass by pass, from the config alone.

Every kernel reads its inputs and writes its outputs once: the Linears, attention, and the elementwise and norm work,
with the Triton backends, bfloat16 and a float32 residual. What several tiles of a matmul read is counted once: a cache
holds it. Compare the sum with a profiler's DRAM bytes.
"""

from unite_fast.config import Config
from unite_fast.planning import flops
from unite_fast.planning.flops import BlockLinears, Linear
from unite_fast.planning.lpips import lpips_bytes
from unite_fast.planning.memory import FLOAT, HALF

BLOCK_BYTES = 134
"""Elementwise and norm bytes per (token x channel) of an encoder block, forward and backward with recomputation, Triton
kernels, float32 residual; `python benchmarks/kernels.py --block` counts them."""
DECODER_BYTES = 120
"""The same for a decoder layer, counted by the same command: 0.28 GB per image for decoder B."""
MUON_BYTES = FLOAT * (1 + 3 + 4) + HALF * (1 + 1)
"""Bytes per parameter of Muon's step and its average, as kernels/triton_kernels/optimizer.py reads and writes them:

- norm: reads the gradient;
- momentum: reads gradient and momentum, writes momentum and, in bfloat16, the direction;
- update: reads weight, average and, in bfloat16, the update, writes weight and average."""
ADAMW_BYTES = FLOAT * (1 + 5 + 4)
"""The same for AdamW: the norm reads the gradient; the update reads gradient, weight, average and two moments, and
writes all but the gradient."""
NEWTON_SCHULZ_BYTES = HALF * (3 + 5 * 5 + 2)
"""Bytes per parameter of Muon in bfloat16: a norm and a division at the start, five iterations, each four reads and one
write of the iterate, and a copy at the end."""
FLOAT8_BYTES = HALF + 1
"""Per number that is rounded to float8: x of a Linear in its forward pass, and d_y in backward. What the matmul then
reads less is not subtracted."""
ATTENTION_BYTES = 8 + 28
"""Per (token x channel), forward and backward: q, k, v and the result; then these, four gradients (16 in all), the sums
of d_out * out (4), and d_q summed in float32 (8)."""
PIXEL_BYTES = 3 * (FLOAT + 2 * HALF + 6 * FLOAT)
"""Per pixel: the image to bfloat16 patches; the reconstruction from patches to pixels, its L1 loss, and back."""


def linear_bytes(linear: Linear) -> int:
    """Bytes per token of a Linear: forward x -> y; backward d_y -> d_x, and d_y, x -> d_W. Its weights are apart."""
    return HALF * ((linear.inputs + linear.outputs) * 3)


def linears_bytes(linears: BlockLinears) -> int:
    return sum(map(linear_bytes, linears))


def float8_bytes(config: Config) -> float:
    """Bytes per image of rounding tokens to float8, 0 if that is off. Weights, rounded once a step, are left out."""
    if config.train.precision != "float8":
        return 0.0
    return FLOAT8_BYTES * sum(tokens * (one.inputs + one.outputs) for tokens, one in flops.wide_linears(config))


def weight_bytes(config: Config) -> float:
    """Bytes of weights per micro-batch: rounded once (4 -> 2); read forward and backward, and the gradient written, in
    each pass; the second pass of the encoder adds its gradient to the first's."""
    parameters = flops.parameters(config.model)
    passes = {"encoder": 2, "decoder": 1, "norm": 1}
    once = FLOAT + HALF
    each = HALF + HALF + FLOAT
    return sum(parameters[part] * (once + passes[part] * each + (passes[part] - 1) * 3 * FLOAT) for part in parameters)


def step_bytes(config: Config) -> dict[str, float]:
    """Bytes per image of one training step on one GPU, by part."""
    model, draws, batch = config.model, config.objective.flow_draws, config.train.batch_size
    micro_batch = config.train.micro_batch or batch
    width, n = model.encoder.width, model.latent_tokens
    block, layer = flops.encoder_block(model.encoder), flops.decoder_layer(model.decoder)
    encoder = {"matmuls": 0.0, "attention": 0.0, "elementwise and norms": 0.0}
    for with_image, passes in ((True, 1), (False, draws)):
        for keys, queries in flops.tokens_per_block(model, with_image):
            rest = sum(map(linear_bytes, (block.proj, block.fc_in, block.fc_out)))
            encoder["matmuls"] += passes * (keys * linear_bytes(block.qkv) + queries * rest)
            encoder["attention"] += passes * ATTENTION_BYTES * (keys + queries) / 2 * width
            encoder["elementwise and norms"] += passes * BLOCK_BYTES * (keys + queries) / 2 * width
    d, tokens = model.decoder.width, model.decoder_tokens
    patch = model.token_outputs
    ends = n * (1 + draws) * 2 * linear_bytes(Linear(model.latent_channels, width))
    ends += model.patches * linear_bytes(Linear(patch, width))
    embed = model.decoder.embed_width
    ends += n * sum(map(linear_bytes, (Linear(model.latent_channels, embed), Linear(embed, d), Linear(d, patch))))
    shapes = flops.parameter_shapes(model)
    muon = flops.numel([shape for shape in shapes if shape.muon])
    parts = {f"encoder blocks: {name}": size for name, size in encoder.items()}
    parts |= {
        "decoder layers: matmuls": model.decoder.depth * tokens * linears_bytes(layer),
        "decoder layers: attention": model.decoder.depth * tokens * d * ATTENTION_BYTES,
        "decoder layers: elementwise and norms": model.decoder.depth * tokens * d * DECODER_BYTES,
        "rounding to float8": float8_bytes(config),
        "first and last Linears": ends,
        "pixels": model.image_size**2 * PIXEL_BYTES if model.patches else 0.0,
        "LPIPS, elementwise": lpips_bytes(model.image_size) if config.perceptual.weight else 0.0,
        "weights and their gradients": weight_bytes(config) / micro_batch,
        "optimizers": (MUON_BYTES * muon + ADAMW_BYTES * (flops.numel(shapes) - muon)) / batch,
        "Newton-Schulz": NEWTON_SCHULZ_BYTES * muon / batch,
    }
    return {name: size for name, size in parts.items() if size}
