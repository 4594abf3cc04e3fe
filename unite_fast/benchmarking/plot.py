"""Plot of images/s or molecules/s over time, from the table of measurements."""

from pathlib import Path

from unite_fast.benchmarking import csv_file
from unite_fast.errors import UserError
from unite_fast.utils.files import atomic_write

RATES = ("images_per_s", "images_per_s_slow", "images_per_s_fast")


def draw(table: Path, out: Path) -> tuple[int, str]:
    """Draw one panel per recipe, card and number of GPUs: images/s by date, labelled with date and commit; error bars
    from slow to fast steps.

    Returns:
        Number of measurements, and a line about rows that were left out, or an empty one.

    Raises:
        UserError: no table, or an empty one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, left_out = csv_file.measurements(table, RATES)
    if not rows:
        raise UserError(f"{table} has no measurements; unite-fast bench RECIPE adds one")
    rows.sort(key=lambda row: row["date"])
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['recipe']}, {row['gpus']} x {row['card']}", []).append(row)
    width = max(6, 0.5 * max(map(len, groups.values())))
    figure, panels = pyplot.subplots(len(groups), squeeze=False, figsize=(width, 3 * len(groups)), layout="constrained")
    for axes, (title, group) in zip(panels.flat, groups.items(), strict=True):
        rates, slow, fast = ([float(row[key]) for row in group] for key in RATES)
        below = [max(0.0, rate - low) for rate, low in zip(rates, slow, strict=True)]
        above = [max(0.0, high - rate) for rate, high in zip(rates, fast, strict=True)]
        axes.errorbar(range(len(group)), rates, yerr=(below, above), marker="o", capsize=3)
        marks = [f"{row['date'][:10]}\n{row['commit']}" for row in group]
        axes.set_xticks(range(len(group)), marks, rotation=90, fontsize=7, parse_math=False)
        axes.set_ylabel("samples/s")  # the table does not say of what
        axes.set_ylim(0, 1.1 * max(rates + fast))
        axes.set_title(title, fontsize=9, parse_math=False)
    with atomic_write(out) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    return len(rows), left_out
