"""Quality and cost of the solvers: Frechet distance of PCA-reduced pixels against network evaluations.

    python benchmarks/sampling.py runs/digits runs/fashion_mnist --out solvers --count 5000

For each run with small images, every solver and number of steps generates the same samples: same classes, same noise.
An evaluation is one pass of one image through the network, so a guided step has two. Sampling settings other than
solver and steps come from the recipe of the run, or from options. Distances are to all training images. The image
difference is the RMS difference to the exact solution, for pixels in [0, 1]; multistep with 100 steps stands in for the
exact solution. dopri5 with another seed shows how much the distance depends on the noise.

Then it times, in the same process and in turn, the released procedure (dopri5, both passes at every time, PyTorch's own
operators, eager), the same with our kernels, and the chosen solver.

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
"""A solver can replace dopri5 if its distance is within this share of dopri5's, above or below, with this many times
fewer evaluations."""


class AlwaysBoth(GuidedPrediction):
    """The released procedure: the unconditional pass runs at every time, but counts only inside the interval."""

    def __call__(self, t: float, x: Tensor, guided: bool | None = None) -> Tensor:
        without_label = torch.full_like(self.labels, self.no_class)
        both = self._predict(t, torch.cat((x, x)), torch.cat((self.labels, without_label)))
        conditional, unconditional = both.chunk(2)
        weight = self.config.guidance if self.guided_at(t) else 1.0
        return unconditional + weight * (conditional - unconditional)


class Run:
    """A trained model, and statistics of its training images."""

    def __init__(self, path: Path, data: str, batch: int, **settings):
        self.model: TrainedUNITE = unite_fast.load(path)
        config = self.model.config
        self.name, self.recipe, self.batch = config.name, config.sampling.changed(**settings), batch
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        source = open_source(config.data.source, data or config.data.path, config.model.image_size, "train")
        self.features: PixelFeatures = fit_pixels_on_main(source, Ranks(), "cpu")
        self.real = make_reference(source, self.features, Ranks(), batch, config.data.workers).statistics

    def generate(self, config: SamplingConfig, count: int, seed: int = 0) -> tuple[Tensor, float, float]:
        """`count` images, evaluations per image, and their Frechet distance."""
        moments, evaluations, parts = Moments(self.features.dimension), 0, []
        for start in range(0, count, self.batch):
            images, passes = self.sample(config, range(start, min(start + self.batch, count)), seed)
            moments.update(self.features(images).pool)
            evaluations += passes * len(images)
            parts.append(images)
        return torch.cat(parts), evaluations / count, self.distance(moments.statistics())

    def sample(
        self,
        config: SamplingConfig,
        indices: range,
        seed: int = 0,
        predictor: type[GuidedPrediction] = GuidedPrediction,
    ) -> tuple[Tensor, int]:
        """Images uint8 [n, 3, S, S] and evaluations per image."""
        model, positions = self.model.network, torch.tensor(indices)
        network, labels = Network.of(model, config.order), positions % model.config.num_classes
        return sample_batch(model, network, labels, positions, config, seed, predictor=predictor)

    def distance(self, statistics: Statistics) -> float:
        return frechet_distance(statistics, self.real)


def measure_quality(run: Run, count: int) -> dict:
    """Rows of solver, steps, evaluations and distance (dopri5, the exact solution, the others), and the distance of
    dopri5 with another seed."""
    variants = [(REFERENCE, 0), *((solver, n) for solver, steps in STEPS.items() for n in steps)]
    exact = run.generate(replace(run.recipe, solver=EXACT[0], steps=EXACT[1]), count)
    rows = []
    for solver, steps in variants:
        config = replace(run.recipe, solver=solver, steps=steps or run.recipe.steps)
        rows.append(quality_row(solver, steps, run.generate(config, count), exact[0], rows))
        if solver == REFERENCE:
            rows.append(quality_row("exact", 0, exact, exact[0], rows))
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


def quality_row(
    solver: str, steps: int, generated: tuple[Tensor, float, float], exact: Tensor, rows: list[dict]
) -> dict:
    """The next row after `rows`, from the result of `Run.generate`."""
    images, evaluations, distance = generated
    return {
        "solver": solver,
        "steps": steps,
        "evaluations": evaluations,
        "distance": distance,
        "against_dopri5": distance / rows[0]["distance"] - 1 if rows else 0.0,
        "image_difference": rms(images, exact),
    }


def rms(images: Tensor, others: Tensor) -> float:
    """RMS difference, for pixels in [0, 1]."""
    return float(((images.double() - others.double()) / 255).square().mean().sqrt())


def choose(results: list[dict]) -> tuple[str, int] | None:
    """Solver and steps with the fewest evaluations that match dopri5 on every run. All larger numbers of steps of that
    solver must match as well: a single one can match by chance."""
    matching = []
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
                matching.append((cost, solver, steps))
    return min(matching)[1:] if matching else None


def measure_time(run: Run, chosen: tuple[str, int], count: int) -> dict:
    """Seconds for `count` images by each procedure, batch by batch in turn, and the distances of these images."""
    ours = backend.current()
    released, fast = (replace(run.recipe, solver=solver, steps=n) for solver, n in ((REFERENCE, 1), chosen))
    procedures = {
        "released": (released, AlwaysBoth, "reference"),
        "released, our kernels": (released, AlwaysBoth, ours),
        "chosen": (fast, GuidedPrediction, ours),
    }
    timings = {
        name: {"cpu_seconds": 0.0, "wall_seconds": 0.0, "moments": Moments(run.features.dimension)}
        for name in procedures
    }
    run.sample(fast, range(run.batch))  # warm up
    for start in range(0, count, run.batch):
        for name, (config, predictor, kernels) in procedures.items():
            cpu, wall = time.process_time(), time.perf_counter()
            with backend.using(kernels):
                images, _ = run.sample(config, range(start, min(start + run.batch, count)), predictor=predictor)
            timings[name]["cpu_seconds"] += time.process_time() - cpu
            timings[name]["wall_seconds"] += time.perf_counter() - wall
            timings[name]["moments"].update(run.features(images).pool)
    for part in timings.values():
        part["distance"] = run.distance(part.pop("moments").statistics())
        part["cpu_ratio"], part["wall_ratio"] = (
            part[f"{kind}_seconds"] / timings["chosen"][f"{kind}_seconds"] for kind in ("cpu", "wall")
        )
    return {"images": count, "batch": run.batch, "procedures": timings}


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
            "| solver | steps | evaluations per image | Frechet distance | against dopri5 | difference to exact |",
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
                f"{spent['images']} images, batch {spent['batch']}, timed in turn:",
                "",
                "| procedure | CPU seconds | CPU ratio to chosen | wall ratio to chosen | Frechet distance |",
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
        axes.set(title=result["run"], xlabel="network evaluations per image", ylabel="Frechet distance (PCA pixels)")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="trained runs with images of at most 64 x 64")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=1000, help="images per solver and number of steps [1000]")
    parser.add_argument("--timed", type=int, default=1000, help="timed images [1000]; 0: no timing")
    parser.add_argument("--batch", type=int, default=250, help="batch size [250]")
    parser.add_argument("--data", default="", help="folder of the data [that of the training]")
    parser.add_argument("--guidance", type=float, help="guidance scale [that of the recipe]")
    parser.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guidance interval [that of the recipe]"
    )
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
