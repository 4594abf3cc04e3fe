"""The command that makes molecule sets."""

from pathlib import Path
from typing import Annotated

import typer

from unite_fast.errors import require

app = typer.Typer()


@app.command()
def molecules(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCES...", help="qm9 (write ./qm9 for a file of that name), or .xyz, .extxyz, .sdf, .npz files"
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.npz", help="the molecule set")],
) -> None:
    """Make a molecule set: elements, positions and splits, for training.

    `qm9` reads QM9 from the package qm9pack: `pip install 'unite-fast[molecules]'`. Molecules of files are split by
    their contents, 8 : 1 : 1.

    Examples:

    `unite-fast molecules qm9 qm9.npz`

    `unite-fast molecules a.xyz b.sdf mine.npz`
    """
    from unite_fast.data_pipeline.molecules.frames import LeftOut
    from unite_fast.data_pipeline.molecules.import_files import import_files
    from unite_fast.data_pipeline.molecules.qm9 import import_qm9
    from unite_fast.data_pipeline.molecules.set_file import MEMBER, write_set
    from unite_fast.utils.files import check_npz, check_target

    is_qm9 = sources == ["qm9"]
    require(is_qm9 or "qm9" not in sources, "qm9 stands alone: give it as the only source, or give files")
    check_target(out, (".npz",), () if is_qm9 else tuple(sources))
    check_npz(out, MEMBER)
    made, left_out = (import_qm9(), LeftOut()) if is_qm9 else import_files(sources)
    write_set(out, made)
    typer.echo(f"{len(made):,} molecules in {out}")
    for line in describe(made, left_out):
        typer.echo(line)


def describe(made, left_out) -> list[str]:
    """Lines about a `MoleculeSet` and the `LeftOut` of its import."""
    import numpy as np

    from unite_fast.data_pipeline.molecules.elements import SYMBOLS
    from unite_fast.data_pipeline.molecules.molecule_set import SPLITS

    atoms = np.bincount(made.numbers[made.numbers > 0], minlength=len(SYMBOLS))
    by_element = ", ".join(f"{SYMBOLS[number]} {atoms[number]:,}" for number in np.flatnonzero(atoms))
    splits = zip(SPLITS, np.bincount(made.split, minlength=len(SPLITS)), strict=True)
    lines = [
        f"atoms: {by_element}",
        f"sizes: {made.sizes.min()} to {made.sizes.max()} atoms, mean {made.sizes.mean():.2f}",
        f"splits: {', '.join(f'{name} {count:,}' for name, count in splits)}",
    ]
    return lines + left_out_lines(left_out)


def left_out_lines(left_out) -> list[str]:
    """Lines about what an import left out."""
    lines = []
    if left_out.duplicates:
        lines.append(f"duplicates: {left_out.duplicates:,} molecules were there already and are left out")
    if left_out.broken:
        lines.append(f"skipped: {left_out.broken:,} broken molecules")
        lines += [f"  {example}" for example in left_out.examples]
        more = left_out.broken - len(left_out.examples)
        lines += [f"  and {more:,} more"] if more else []
    return lines
