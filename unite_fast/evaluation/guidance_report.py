"""A guidance search as files (JSON, a Markdown table, a picture of the curves) and as lines for a terminal."""

import json
from dataclasses import asdict
from pathlib import Path

from unite_fast.evaluation.guidance_search import UNGUIDED, Found, Grid, Measured, Objective
from unite_fast.evaluation.provenance import described_machine
from unite_fast.utils.files import atomic_write, save_text

JSON, TABLE, CURVES = "guidance.json", "guidance.md", "guidance.png"


def save(found: Found, grid: Grid, objective: Objective, out: Path) -> None:
    """guidance.json, guidance.md and guidance.png; those of an earlier search in the same folder are replaced.

    Raises:
        UserError: no space left, or no permission.
    """
    result = {
        "best": asdict(found.confirmed[0]),
        "confirmed": [asdict(measured) for measured in found.confirmed],
        "searched": [asdict(measured) for measured in found.searched],
        "grid": asdict(grid),
        "evaluations": found.evaluations,
        "full_grid_evaluations": found.full_grid_evaluations,
        "checkpoint": objective.checkpoint,
        "settings": objective.settings,
        "notes": objective.notes,
        "seconds": found.seconds,
        **described_machine(objective.model.network.device, objective.ranks),
    }
    save_text(json.dumps(result, indent=1) + "\n", out / JSON)
    save_text(table(found, grid, objective), out / TABLE)
    save_curves(found, objective.judge.features.title, out / CURVES)


def lines(found: Found, grid: Grid, objective: Objective) -> list[str]:
    best, title = found.confirmed[0], objective.judge.features.title
    said = [f"{title}, {best.count} samples: {best.distance:.4f} with {_named(best)}"]
    said += [f"next best, {one.count} samples: {one.distance:.4f} with {_named(one)}" for one in found.confirmed[1:]]
    ratio = found.full_grid_evaluations / found.evaluations
    said.append(
        f"{found.evaluations:,} network evaluations for {len(found.searched)} of {len(grid.all())} candidates with "
        f"{objective.count} samples each and {len(found.confirmed)} with {objective.final_count}; all with "
        f"{objective.final_count} would take about {found.full_grid_evaluations:,.0f}: "
        f"{ratio:.{0 if ratio >= 10 else 1}f} times as many"
    )
    return said + [f"note: {note}" for note in objective.notes]


def _named(measured: Measured) -> str:
    candidate = measured.candidate
    if candidate == UNGUIDED:
        return "no guidance"
    return f"guidance {candidate.scale:g} for t in ({candidate.low:g}, {candidate.high:g})"


def table(found: Found, grid: Grid, objective: Objective) -> str:
    settings, weights = objective.settings, objective.checkpoint
    steps = settings["sampling.steps"] or "its own"
    rows = [
        f"| {_named(one)} | {one.count} | {one.distance:.4f} | {one.evaluations / one.count:.1f} |"
        for one in (*found.confirmed, *found.searched)
    ]
    return "\n".join(
        [
            "# Guidance search",
            "",
            *(f"- {line}" for line in lines(found, grid, objective)),
            f"- weights {weights['weights_sha256'][:16]} ({weights['weights']}) of {weights['name']} after "
            f"{weights['step']} steps; solver {settings['sampling.solver']}, {steps} steps, order "
            f"{settings['sampling.order']}; seed {settings['seed']}, batch {settings['batch']}, "
            f"{settings['precision']}",
            f"- reference: {settings['reference']['path'] or 'the training images'}, {settings['reference']['images']} "
            "images",
            "",
            f"| guidance | samples | {objective.judge.features.title} | network evaluations an image |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def save_curves(found: Found, title: str, path: Path) -> None:
    """Distance against scale, a curve an interval; the confirmed ones are stars."""
    from matplotlib.figure import Figure  # slow to import

    intervals: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for one in found.searched:
        if one.candidate != UNGUIDED:
            intervals.setdefault((one.candidate.low, one.candidate.high), []).append(
                (one.candidate.scale, one.distance)
            )
    unguided = [(1.0, one.distance) for one in found.searched if one.candidate == UNGUIDED]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    # The best interval first; colours repeat after ten, so the marks change then.
    ordered = sorted(intervals.items(), key=lambda item: min(distance for _, distance in item[1]))
    for i, ((low, high), points) in enumerate(ordered):
        scales, distances = zip(*sorted(points + unguided), strict=True)
        axes.plot(
            scales, distances, marker="os^v"[i // 10 % 4], markersize=4, linewidth=1, label=f"({low:g}, {high:g})"
        )
    best = found.confirmed[0]
    scales, distances = zip(*((one.candidate.scale, one.distance) for one in found.confirmed), strict=True)
    axes.plot(scales, distances, "k*", markersize=11, label=f"confirmed, {best.count} samples")
    axes.set(xlabel="guidance scale", ylabel=f"{title}, {found.searched[0].count} samples", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="interval", fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
