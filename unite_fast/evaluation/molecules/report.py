"""Write the scores of molecules as files and as lines for the terminal, the true molecules in the next column."""

import json
from pathlib import Path

from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.evaluation.molecules.pictures import molecule_grid, molecule_pairs
from unite_fast.evaluation.molecules.published import comparable
from unite_fast.evaluation.molecules.scores import GENERATION, RECONSTRUCTION
from unite_fast.evaluation.report import JSON, PAIRS, TABLE, markdown, plain
from unite_fast.utils.files import BEGINNINGS, save_text, writing
from unite_fast.utils.images import save_png

SAMPLES = "samples.png"
FILES = {
    JSON: BEGINNINGS[".json"],
    TABLE: b"# Evaluation of ",
    PAIRS: BEGINNINGS[".png"],
    SAMPLES: BEGINNINGS[".png"],
}
"""The files of an evaluation and their first bytes."""
COLUMNS = 8


def save(result: dict, samples: MoleculeSet, pairs: tuple[MoleculeSet, MoleculeSet] | None, out: Path) -> None:
    """Write evaluation.json, evaluation.md and pictures of samples and reconstructions.

    Raises:
        UserError: no space left, or no permission.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    save_png(molecule_grid(samples, COLUMNS), out / SAMPLES)
    if pairs is not None:
        truth, copies = pairs
        save_png(molecule_pairs(truth, copies.take(range(len(truth))), COLUMNS), out / PAIRS)
    for name, text in ((TABLE, table(result)), (JSON, json.dumps(result, indent=1))):
        save_text(text, out / name)


def lines(result: dict) -> list[str]:
    """The result in a few lines."""
    text, rebuilt, made, true = [], result["reconstruction"], result["generated"], result["true"]
    if rebuilt:
        scores = ", ".join(f"{name} {number(name, rebuilt[name])}" for name in RECONSTRUCTION)
        text.append(f"reconstruction of {rebuilt['counts']['molecules']} {of(rebuilt)}: {scores}")
    text.append(f"{made['counts']['molecules']} generated molecules, beside {true['counts']['molecules']} {of(true)}:")
    text += [f"  {name:<17} {number(name, made[name]):>8} {number(name, true[name]):>8}" for name in GENERATION]
    return text


def of(scores: dict) -> str:
    """What the true molecules are."""
    return scores["kind"].replace("images", "molecules")


def number(name: str, value: float | None) -> str:
    """A score for people: percent, or Angstrom."""
    if value is None:
        return "-"
    return f"{value:.3f} A" if name == "rmsd" else f"{value:.2%}"


def table(result: dict) -> str:
    """The result as Markdown."""
    checkpoint, rebuilt, made, true = (result[key] for key in ("checkpoint", "reconstruction", "generated", "true"))
    text = [
        f"# Evaluation of {plain(checkpoint['name'])}, step {checkpoint['step']}",
        "",
        f"{checkpoint['weights']} weights, SHA-256 {checkpoint['weights_sha256']}. {JSON} has all details.",
        "",
    ]
    if rebuilt:
        rows = [
            {"score": name, "reconstructions": number(name, rebuilt[name]), "definition": definition}
            for name, definition in RECONSTRUCTION.items()
        ]
        text += [f"{rebuilt['counts']['molecules']} {of(rebuilt)}, encoded and decoded:", "", *markdown(rows), ""]
    rows = [
        {
            "score": name,
            "generated": number(name, made[name]),
            "true": number(name, true[name]),
            "definition": definition,
        }
        for name, definition in GENERATION.items()
    ]
    text += [
        f"{made['counts']['molecules']} generated molecules ({made['solver']}, {made['steps'] or 'own'} steps), and "
        f"{true['counts']['molecules']} {of(true)}:",
        "",
        *markdown(rows),
    ]
    if published := comparable(made):
        rows = [
            {"published": row.model, "score": row.score, "value": f"{row.value:.1%}", "ours": number("", made[row.key])}
            for row in published
        ]
        text += ["", "Published, where the protocol is the same (10,000 samples of models of all of QM9):", ""]
        text += markdown(rows)
    for name in ("sizes", "elements"):
        keys = sorted(made[name] | true[name], key=lambda key: (len(key), key))
        rows = [
            {name: key, "generated": str(made[name].get(key, 0)), "true": str(true[name].get(key, 0))} for key in keys
        ]
        text += ["", *markdown(rows)]
    return "\n".join(text) + "\n"
