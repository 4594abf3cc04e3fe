"""Train UNITE on the digits with a training loop of your own: no trainer, no run folder, one process.

    python examples/training_loop.py --steps 1500     # two minutes; the tests take 20 steps

Each step draws its random numbers, computes the two losses, and lets Muon and AdamW update the weights.
"""

import argparse
from pathlib import Path

import torch

from unite_fast.data_pipeline import Loader, open_source
from unite_fast.model.unite import UNITE
from unite_fast.objective import draw_step, flow_losses, reconstruct
from unite_fast.optim.adamw import adamw
from unite_fast.optim.ema import EMA
from unite_fast.optim.lr_schedule import learning_rate
from unite_fast.optim.muon import Muon
from unite_fast.optim.param_groups import split_parameters
from unite_fast.randomness import Philox
from unite_fast.recipes import load_config
from unite_fast.sampling.pipeline import TrainedUNITE
from unite_fast.utils.images import save_images, save_pairs


def train(steps: int, seed: int = 0) -> TrainedUNITE:
    config = load_config("digits")
    source = open_source("digits", "", config.model.image_size, "train")
    batch_size = config.train.batch_size

    model = UNITE.create(config.model, seed)
    ema = EMA(model, config.optim.ema_decay)
    matrices, others = split_parameters(model)  # Muon takes the matrices, AdamW everything else
    optimizers = [
        Muon(matrices.values(), 0.0, config.optim.muon_momentum, config.optim.eps, torch.float32),
        adamw("torch", others.values(), config.optim.adamw_betas, config.optim.eps),
    ]
    latents = (config.model.latent_tokens, config.model.latent_channels)

    with Loader(source, batch_size, seed) as loader:
        for step in range(steps):
            batch = next(loader)
            images = batch.data / 255
            # All random numbers of the step are a function of (seed, step, position in the batch).
            draws = draw_step(config.objective, Philox(seed, step, torch.arange(batch_size)), latents)

            # Tokenizer and decoder: reconstruct the images.
            reconstruction = reconstruct(model, images, draws, config)
            reconstruction.loss.backward()
            # Denoiser: predict the latents, which pass no gradient to the tokenizer, from noisy ones.
            flow = flow_losses(model, reconstruction.z, batch.labels, draws)
            (config.objective.flow_weight * flow).backward()

            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config.schedule, batch_size, step)
                optimizer.step()
            model.zero_grad()
            ema.update()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                print(f"step {step + 1}: L1 {reconstruction.l1:.4f}, flow loss {flow:.3f}")

    model.load_state_dict(ema.averages, strict=False)  # the EMA weights are the model to use; buffers stay
    return TrainedUNITE(model, config, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", default="digits")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # such a small model is fastest on one thread

    model = train(arguments.steps)
    held_out, _ = open_source("digits", "", 8, "test").read(range(10))
    save_pairs(held_out, model.reconstruct(held_out), Path(f"{arguments.out}_reconstructions.png"))
    labels = torch.arange(10).repeat(4)
    save_images(model.generate(labels, guidance=2.0), labels, Path(f"{arguments.out}_samples.png"), columns=10)


if __name__ == "__main__":
    main()
