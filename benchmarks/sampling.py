"""Quality against cost of the solvers: Frechet distance of PCA-reduced pixels against network evaluations.

    python benchmarks/sampling.py runs/digits runs/fashion_mnist --out solvers --count 5000

For each run of small images, every solver and number of steps generates the same samples: the same classes, each
from the same noise. An evaluation is one pass of one image through the network, so a guided step has two. All settings
of sampling but solver and steps are the run's recipe's, or those given. Distances are to all training images. The
difference of the images is the root of the mean squared one to the exact solution's, of pixels in [0, 1]; multistep
with 100 steps stands for the exact solution. The same with another seed, for dopri5, says how far a distance moves
when only the noise does.

Then, in the same process and turn by turn, the time of the released procedure (dopri5, both passes at every time,
PyTorch's own operators, eager), of the same with our kernels, and of the chosen solver.

Writes sampling.json, sampling.md and sampling.png into the folder --out.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import unite_fast
from unite_fast.config import SamplingConfig
from unite_fast.data_pipeline import open_source
from unite_fast.distributed.process_group import Ranks
from unite_fast.evaluation.fid import Moments, Statistics, frechet_distance
from unite_fast.evaluation.pixel_features import PixelFeatures, fit_pixels_on_main
from unite_fast.evaluation.provenance import device_name, versions
from unite_fast.evaluation.reference import make_reference
from unite_fast.kernels import backend
from unite_fast.sampling.pipeline import TrainedUNITE, weights_sha256
from unite_fast.sampling.sampler import GuidedPrediction, Network, sample_batch

REFERENCE, EXACT = "dopri5", ("multistep", 100)
STEPS = {"euler": (10, 20, 40), "heun": (5, 10, 20), "multistep": (8, 12, 16, 20, 24)}
WITHIN, CHEAPER = 0.01, 3
"""A solver can take dopri5's place if its distance is dopri5's within this share, on either side, at that many times
fewer evaluations."""


class AlwaysBoth(GuidedPrediction):
    """The released procedure: the pass without label runs at every time, and counts inside the interval only."""

    def __call__(self, t: float, x: Tensor, guided: bool | None = None) -> Tensor:
        without_label = torch.full_like(self.labels, self.no_class)
        both = self._predict(t, torch.cat((x, x)), torch.cat((self.labels, without_label)))
        conditional, unconditional = both.chunk(2)
        weight = self.config.guidance if self.guided_at(t) else 1.0
        return unconditional + weight * (conditional - unconditional)


class Run:
    """A trained model, and what its pictures are compared with."""

    def __init__(self, path: Path, data: str, batch: int, **settings):
        self.model: TrainedUNITE = unite_fast.load(path)
        config = self.model.config
        self.name, self.recipe, self.batch = config.name, config.sampling.changed(**settings), batch
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        source = open_source(config.data.source, data or config.data.path, config.model.image_size, "train")
        self.features: PixelFeatures = fit_pixels_on_main(source, Ranks(), "cpu")
        self.real = make_reference(source, self.features, Ranks(), batch, config.data.workers).statistics

    def generate(self, config: SamplingConfig, count: int, seed: int = 0) -> tuple[Tensor, float, float]:
        """`count` images, evaluations an image, and the Frechet distance."""
        moments, evaluations, parts = Moments(self.features.dimension), 0, []
        for start in range(0, count, self.batch):
            images, spent = self.draw(config, range(start, min(start + self.batch, count)), seed)
            moments.update(self.features(images).pool)
            evaluations += spent * len(images)
            parts.append(images)
        return torch.cat(parts), evaluations / count, self.distance(moments.statistics())

    def draw(
        self,
        config: SamplingConfig,
        numbers: range,
        seed: int = 0,
        predictor: type[GuidedPrediction] = GuidedPrediction,
    ) -> tuple[Tensor, int]:
        """Images uint8 [n, 3, S, S] and evaluations for each of them."""
        model, positions = self.model.network, torch.tensor(numbers)
        network, labels = Network.of(model, config.order), positions % model.config.num_classes
        return sample_batch(model, network, labels, positions, config, seed, predictor=predictor)

    def distance(self, statistics: Statistics) -> float:
        return frechet_distance(statistics, self.real)


def measure_quality(run: Run, count: int) -> dict:
    """Rows of solver, steps, evaluations and distance, dopri5 first, then the exact solution, and dopri5's distance
    with another seed."""
    variants = [(REFERENCE, 0), *((solver, n) for solver, steps in STEPS.items() for n in steps)]
    exact = run.generate(replace(run.recipe, solver=EXACT[0], steps=EXACT[1]), count)
    rows = []
    for solver, steps in variants:
        config = replace(run.recipe, solver=solver, steps=steps or run.recipe.steps)
        rows.append(measured(solver, steps, run.generate(config, count), exact[0], rows))
        if solver == REFERENCE:
            rows.append(measured("exact", 0, exact, exact[0], rows))
    for row in rows:
        print(run.name, *(f"{key} {value}" for key, value in row.items()), flush=True)
    other = run.generate(replace(run.recipe, solver=REFERENCE), count, seed=1)[2]
    return {
        "run": run.name,
        "weights_sha256": weights_sha256(run.model),
        "sampling": asdict(run.recipe) | {"solver": "each", "steps": "each"},
        "precision": "float32",
        "seed": 0,
        "images": count,
        "dimension": run.features.dimension,
        "rows": rows,
        "other_seed": {"distance": other, "against_dopri5": other / rows[0]["distance"] - 1},
    }


def measured(solver: str, steps: int, made: tuple[Tensor, float, float], exact: Tensor, rows: list[dict]) -> dict:
    """A row after `rows`, of what `Run.generate` made."""
    images, evaluations, distance = made
    return {
        "solver": solver,
        "steps": steps,
        "evaluations": evaluations,
        "distance": distance,
        "against_dopri5": distance / rows[0]["distance"] - 1 if rows else 0.0,
        "image_difference": rms(images, exact),
    }


def rms(images: Tensor, others: Tensor) -> float:
    """Root of the mean squared difference, of pixels in [0, 1]."""
    return float(((images.double() - others.double()) / 255).square().mean().sqrt())


def choose(results: list[dict]) -> tuple[str, int] | None:
    """Solver and steps of the fewest evaluations that match dopri5 on every run, as all its larger numbers of steps do:
    one alone can match by luck."""
    found = []
    for solver, all_steps in STEPS.items():
        for steps in all_steps:
            rows = [
                (row, result["rows"][0])
                for result in results
                for row in result["rows"]
                if row["solver"] == solver and row["steps"] >= steps
            ]
            near = all(abs(row["against_dopri5"]) <= WITHIN for row, _ in rows)
            cheap = all(
                CHEAPER * row["evaluations"] <= dopri5["evaluations"] for row, dopri5 in rows if row["steps"] == steps
            )
            if near and cheap:
                cost = max(row["evaluations"] for row, _ in rows if row["steps"] == steps)
                found.append((cost, solver, steps))
    return min(found)[1:] if found else None


def measure_time(run: Run, chosen: tuple[str, int], count: int) -> dict:
    """Seconds for `count` images by each procedure, batch by batch in turn, and the distances of these images."""
    ours = backend.current()
    released, fast = (replace(run.recipe, solver=solver, steps=n) for solver, n in ((REFERENCE, 1), chosen))
    procedures = {
        "released": (released, AlwaysBoth, "reference"),
        "released, our kernels": (released, AlwaysBoth, ours),
        "chosen": (fast, GuidedPrediction, ours),
    }
    found = {
        name: {"cpu_seconds": 0.0, "wall_seconds": 0.0, "moments": Moments(run.features.dimension)}
        for name in procedures
    }
    run.draw(fast, range(run.batch))  # the first call of a process pays for all later ones
    for start in range(0, count, run.batch):
        for name, (config, predictor, kernels) in procedures.items():
            cpu, wall = time.process_time(), time.perf_counter()
            with backend.using(kernels):
                images, _ = run.draw(config, range(start, min(start + run.batch, count)), predictor=predictor)
            found[name]["cpu_seconds"] += time.process_time() - cpu
            found[name]["wall_seconds"] += time.perf_counter() - wall
            found[name]["moments"].update(run.features(images).pool)
    for part in found.values():
        part["distance"] = run.distance(part.pop("moments").statistics())
        part["cpu_ratio"], part["wall_ratio"] = (
            part[f"{kind}_seconds"] / found["chosen"][f"{kind}_seconds"] for kind in ("cpu", "wall")
        )
    return {"images": count, "batch": run.batch, "procedures": found}


def write(results: list[dict], chosen: tuple[str, int] | None, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "sampling.json").write_text(
        json.dumps(
            {"runs": results, "chosen": chosen, "device": device_name(torch.device("cpu")), "versions": versions()},
            indent=1,
        )
    )
    (out / "sampling.md").write_text("\n".join(table(results, chosen)) + "\n")
    plot(results, out / "sampling.png")


def table(results: list[dict], chosen: tuple[str, int] | None) -> list[str]:
    lines = []
    for result in results:
        sampling, other = result["sampling"], result["other_seed"]
        lines += [
            f"## {result['run']}: {result['images']} images, guidance {sampling['guidance']:g} for t in "
            f"({sampling['interval'][0]:g}, {sampling['interval'][1]:g}), {result['dimension']} components",
            "",
            "| solver | steps | evaluations an image | Frechet distance | against dopri5 | difference to exact |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            cells = row["solver"], row["steps"] or "", f"{row['evaluations']:.0f}", f"{row['distance']:.4f}"
            lines.append(
                f"| {' | '.join(map(str, cells))} | {row['against_dopri5']:+.2%} | {row['image_difference']:.4f} |"
            )
        lines += ["", f"dopri5 with other noise: {other['distance']:.4f}, {other['against_dopri5']:+.2%}.", ""]
        if "time" in result:
            spent = result["time"]
            lines += [
                f"{spent['images']} images, batch {spent['batch']}, in turns:",
                "",
                "| procedure | seconds of CPU | times the chosen one's | by the clock | Frechet distance |",
                "|---|---|---|---|---|",
            ]
            for name, part in spent["procedures"].items():
                lines.append(
                    f"| {name} | {part['cpu_seconds']:.1f} | {part['cpu_ratio']:.2f} | {part['wall_ratio']:.2f} "
                    f"| {part['distance']:.4f} |"
                )
            lines.append("")
    return [*lines, f"Chosen: {chosen[0]}, {chosen[1]} steps." if chosen else "No solver matches dopri5."]


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for solver in (REFERENCE, *STEPS):
            rows = [row for row in result["rows"] if row["solver"] == solver]
            evaluations, distances = ([row[key] for row in rows] for key in ("evaluations", "distance"))
            axes.plot(evaluations, distances, "o-" if solver != REFERENCE else "k*", markersize=4, label=solver)
        reference = result["rows"][0]["distance"]
        axes.axhspan(reference * (1 - WITHIN), reference * (1 + WITHIN), color="0.85", label="dopri5 ± 1 %")
        axes.set(title=result["run"], xlabel="network evaluations an image", ylabel="Frechet distance (PCA pixels)")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="trained runs of images of at most 64 x 64")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=1000, help="images of each solver and number of steps [1000]")
    parser.add_argument("--timed", type=int, default=1000, help="images that are timed [1000]; 0: no timing")
    parser.add_argument("--batch", type=int, default=250, help="images at a time [250]")
    parser.add_argument("--data", default="", help="folder of the data, if not the one trained on")
    parser.add_argument("--guidance", type=float, help="guidance scale, if not the recipe's")
    parser.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of guidance, likewise")
    options = parser.parse_args()
    settings = {"guidance": options.guidance, "interval": options.interval and tuple(options.interval)}
    settings = {name: value for name, value in settings.items() if value is not None}
    runs = [Run(path, options.data, options.batch, **settings) for path in options.runs]
    results = [measure_quality(run, options.count) for run in runs]
    chosen = choose(results)
    if chosen and options.timed:
        for run, result in zip(runs, results, strict=True):
            result["time"] = measure_time(run, chosen, options.timed)
    write(results, chosen, options.out)
    print((options.out / "sampling.md").read_text())


if __name__ == "__main__":
    main()
