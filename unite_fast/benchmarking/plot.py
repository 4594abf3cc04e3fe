"""images/s over time, from the table of measurements."""

from pathlib import Path

from unite_fast.benchmarking import csv_file
from unite_fast.errors import UserError, writing_aside


def draw(table: Path, out: Path) -> int:
    """A line for each recipe, card and number of GPUs: images/s of its measurements in their order, each marked with
    date and commit; bars from the slow to the fast steps.

    Returns:
        How many measurements there are.

    Raises:
        UserError: no table, or none in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(csv_file.read(table), key=lambda row: row["date"])
    if not rows:
        raise UserError(f"{table} holds no measurement; unite-fast bench RECIPE adds one")
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(f"{row['recipe']}, {row['gpus']} x {row['card']}", []).append(place)
    figure, axes = pyplot.subplots(figsize=(max(6, 0.5 * len(rows)), 5), layout="constrained")
    for title, places in groups.items():
        rates, slow, fast = (
            [float(rows[place][key]) for place in places]
            for key in ("images_per_s", "images_per_s_slow", "images_per_s_fast")
        )
        below = [max(0.0, rate - low) for rate, low in zip(rates, slow, strict=True)]
        above = [max(0.0, high - rate) for rate, high in zip(rates, fast, strict=True)]
        axes.errorbar(places, rates, yerr=(below, above), marker="o", capsize=3, label=title)
    marks = [f"{row['date'][:10]}\n{row['commit']}" for row in rows]
    axes.set_xticks(range(len(rows)), marks, rotation=90, fontsize=7)
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    with writing_aside(out) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    return len(rows)
