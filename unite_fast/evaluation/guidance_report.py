"""Write a guidance search as files (JSON, a Markdown table, a plot of the curves) and as lines for the terminal."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from unite_fast.evaluation.guidance_search import UNGUIDED, Grid, Measurement, Objective, SearchResult
from unite_fast.evaluation.provenance import machine_info
from unite_fast.evaluation.report import plain, reference_name
from unite_fast.utils.files import BEGINNINGS, atomic_write, save_text

JSON, TABLE, CURVES = "guidance.json", "guidance.md", "guidance.png"
FILES = {JSON: BEGINNINGS[".json"], TABLE: b"# Guidance search", CURVES: BEGINNINGS[".png"]}
"""The files of a search and their first bytes."""


def save(search: SearchResult, grid: Grid, objective: Objective, out: Path) -> None:
    """Write guidance.json, guidance.md and guidance.png; files of an earlier search in the same folder are replaced.

    Raises:
        UserError: no space left, or no permission.
    """
    result = {
        "best": search.confirmed[0].to_json(),
        "confirmed": [one.to_json() for one in search.confirmed],
        "searched": [one.to_json() for one in search.searched],
        "grid": asdict(grid),
        "evaluations": search.evaluations,
        "full_grid_evaluations": search.full_grid_evaluations,
        "checkpoint": objective.checkpoint,
        "settings": objective.provenance,
        "notes": objective.notes,
        "seconds": search.seconds,
        **machine_info(objective.model.network.device, objective.ranks),
    }
    save_text(json.dumps(result, indent=1) + "\n", out / JSON)
    save_text(table(search, grid, objective), out / TABLE)
    save_curves(search, objective.evaluator.features.title, out / CURVES)


def lines(search: SearchResult, grid: Grid, objective: Objective) -> list[str]:
    best, title, settings = search.confirmed[0], objective.evaluator.features.title, objective.settings
    text = [f"{title}, {best.count} samples: {best.distance:.4f} with {_guidance(best)}"]
    text += [
        f"next best, {one.count} samples: {one.distance:.4f} with {_guidance(one)}"
        for one in _finite(search.confirmed)[1:]
    ]
    ratio = search.full_grid_evaluations / search.evaluations
    text.append(
        f"{search.evaluations:,} network evaluations for {len(search.searched)} of {len(grid.all())} candidates with "
        f"{settings.count} samples each and {len(search.confirmed)} with {settings.final_count}; the full grid with "
        f"{settings.final_count} samples each would take about {search.full_grid_evaluations:,.0f}: "
        f"{ratio:.{0 if ratio >= 10 else 1}f} times as many"
    )
    lost = dict.fromkeys(_guidance(one) for one in (*search.confirmed, *search.searched) if math.isinf(one.distance))
    if lost:
        text.append(f"lost, because images are not finite (NaN or infinite): {', '.join(lost)}")
    return text + [f"note: {note}" for note in objective.notes]


def _finite(measurements: list[Measurement]) -> list[Measurement]:
    """Those that have not lost."""
    return [one for one in measurements if math.isfinite(one.distance)]


def _guidance(measurement: Measurement) -> str:
    candidate = measurement.candidate
    if candidate == UNGUIDED:
        return "no guidance"
    return f"guidance {candidate.scale:g} for t in ({candidate.low:g}, {candidate.high:g})"


def table(search: SearchResult, grid: Grid, objective: Objective) -> str:
    settings, weights = objective.provenance, objective.checkpoint
    reference = settings["reference"]
    steps = settings["sampling.steps"] or "its own"
    rows = [
        f"| {_guidance(one)} | {one.count} | {one.distance:.4f} | {one.evaluations / one.count:.1f} |"
        for one in (*search.confirmed, *search.searched)
    ]
    return "\n".join(
        [
            "# Guidance search",
            "",
            *(f"- {line}" for line in lines(search, grid, objective)),
            f"- weights {weights['weights_sha256'][:16]} ({weights['weights']}) of {plain(weights['name'])} after "
            f"{weights['step']} steps; solver {settings['sampling.solver']}, {steps} steps, order "
            f"{settings['sampling.order']}; seed {settings['seed']}, batch {settings['batch']}, "
            f"{settings['precision']}",
            f"- reference: {reference_name(reference)}, {reference['images']} images",
            "",
            f"| guidance | samples | {objective.evaluator.features.title} | network evaluations per image |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def save_curves(search: SearchResult, title: str, path: Path) -> None:
    """Plot distance against scale, one curve per interval; confirmed candidates are stars."""
    from matplotlib.figure import Figure  # slow to import

    intervals: dict[tuple[float, float], list[tuple[float, float]]] = {}
    searched, confirmed = map(_finite, (search.searched, search.confirmed))
    for one in searched:
        if one.candidate != UNGUIDED:
            intervals.setdefault((one.candidate.low, one.candidate.high), []).append(
                (one.candidate.scale, one.distance)
            )
    unguided = [(1.0, one.distance) for one in searched if one.candidate == UNGUIDED]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    # Best interval first; the marker changes every ten curves, because colours repeat.
    ordered = sorted(intervals.items(), key=lambda item: min(distance for _, distance in item[1]))
    for i, ((low, high), points) in enumerate(ordered):
        scales, distances = zip(*sorted(points + unguided), strict=True)
        axes.plot(
            scales, distances, marker="os^v"[i // 10 % 4], markersize=4, linewidth=1, label=f"({low:g}, {high:g})"
        )
    scales, distances = zip(*((one.candidate.scale, one.distance) for one in confirmed), strict=True)
    axes.plot(scales, distances, "k*", markersize=11, label=f"confirmed, {confirmed[0].count} samples")
    axes.set(xlabel="guidance scale", ylabel=f"{title}, {search.searched[0].count} samples", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="interval", fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
