"""Edit images through their latents: encode two images, interpolate between them, decode, save a grid.

    unite-fast train                                            # two minutes: runs/digits
    python examples/edit_latents.py runs/digits --out morph.png

Each row goes from one held-out image to another.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from unite_fast.evaluation.batches import open_images
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.images import grid


def slerp(a: Tensor, b: Tensor, s: float) -> Tensor:
    """The point at s in [0, 1] on the arc from a to b, token by token; all [n, N, C].

    The encoder ends in a LayerNorm, so its tokens have similar lengths. An arc keeps the length; a straight line passes
    through shorter tokens, on which the decoder was not trained.
    """
    angle = torch.acos(torch.cosine_similarity(a, b, dim=-1).clamp(-0.9999, 0.9999))[..., None]
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def morph(model: TrainedUNITE, a: Tensor, b: Tensor, columns: int) -> Tensor:
    """Images a and b, uint8 [n, 3, S, S], to uint8 [n, columns, 3, S, S]: from the first ones to the second ones."""
    start, end = model.encode(a), model.encode(b)
    frames = [model.decode(slerp(start, end, i / (columns - 1))) for i in range(columns)]
    return torch.stack(frames, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run folder, a checkpoint or an exported model file")
    parser.add_argument("--data", default="", help="folder of the data, unless they are built in, such as digits")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--columns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("morph.png"))
    arguments = parser.parse_args()

    model = TrainedUNITE.load(arguments.checkpoint)
    source = open_images(model.config, arguments.data, "test")
    images, _ = source.read(range(2 * arguments.rows))
    frames = morph(model, *images.chunk(2), arguments.columns)
    grid(frames.flatten(0, 1), arguments.columns).save(arguments.out)
    print(f"{arguments.rows} interpolations in {arguments.out}")


if __name__ == "__main__":
    main()
