"""Write the result of an evaluation as files (JSON, a Markdown table, grids) and as lines for the terminal."""

import html
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from unite_fast.checkpoint.folders import checkpoint_files
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import printable, require
from unite_fast.evaluation.batches import unreadable_lines
from unite_fast.utils.file_lock import lock_output
from unite_fast.utils.files import BEGINNINGS, check_not_read, check_replaceable, clear_partial, save_text, writing
from unite_fast.utils.images import grid, pairs, save_png

JSON, TABLE, PAIRS = "evaluation.json", "evaluation.md", "reconstructions.png"
_COLUMNS = 10
GRIDS = "samples_guidance_*.png"
FILES = {
    JSON: BEGINNINGS[".json"],
    TABLE: b"# Evaluation of ",
    PAIRS: BEGINNINGS[".png"],
    GRIDS: BEGINNINGS[".png"],
}
"""The files of an evaluation (GRIDS: any number of them) and their first bytes."""


def default_folder(checkpoint: Path) -> Path:
    """evaluation/ in the run folder, or next to a checkpoint outside of one."""
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent / "evaluation"
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "evaluation"


def check_folder(out: Path, beginnings: dict[str, bytes]) -> None:
    """Check that `out` can be the folder of a report.

    Args:
        beginnings: name of each file of the report, with wildcards, and its first bytes.

    Raises:
        UserError: it exists and is not a folder, or something else has the name of a file of the report.
    """
    require(not out.exists() or out.is_dir(), f"{out} is in the way: it is not a folder; choose another --out")
    for name, beginning in beginnings.items():
        for path in sorted(out.glob(name)):
            check_replaceable(path, beginning)


@contextmanager
def report_folder(out: Path, default: Path, beginnings: dict[str, bytes], checkpoint: Path, ranks: Ranks) -> Iterator:
    """Check and lock the folder of a report while it is made. All ranks call this together.

    Args:
        default: the folder in the run folder. It may be no link: a run folder that came from elsewhere could lead
            anywhere.
        beginnings: see `check_folder`.
        checkpoint: what is read.

    Raises:
        UserError: see `check_folder` and `lock_output`; `out` is what is read.
    """
    with ExitStack() as stack:

        def enter() -> None:
            require(out != default or not out.is_symlink(), f"{out} is a link; choose another folder with --out")
            check_not_read(out, *([] if out == default else [checkpoint_files(checkpoint)]))
            check_folder(out, beginnings)
            stack.enter_context(lock_output(out))
            clear_partial(out)

        ranks.run_on_first(enter)
        yield


def save(result: dict, samples: dict[str, Tensor], reconstructions: tuple[Tensor, Tensor] | None, out: Path) -> None:
    """Write evaluation.json, evaluation.md, and grids of samples (one per guidance scale) and reconstructions. Files of
    an earlier evaluation in the same folder are replaced.

    Args:
        samples: file name -> uint8 [n, 3, S, S].
        reconstructions: originals and reconstructions, uint8 [n, 3, S, S] each.

    Raises:
        UserError: no space left, or no permission.
    """
    grids = {name: grid(images, _COLUMNS) for name, images in samples.items()}
    if reconstructions is not None:
        grids[PAIRS] = pairs(*reconstructions, min(_COLUMNS, len(reconstructions[0])))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for stale in out.glob(GRIDS):
            stale.unlink()
    for name, image in grids.items():
        save_png(image, out / name)
    for name, text in ((TABLE, table(result)), (JSON, json.dumps(result, indent=1))):
        save_text(text, out / name)


def lines(result: dict) -> list[str]:
    """The result in a few lines, with notes on missing metrics and bias."""
    text, features = [], result["features"]
    rebuilt = result["reconstruction"]
    if rebuilt:
        kind = rebuilt["kind"]
        text.append(
            f"reconstruction of {rebuilt['images']} {kind}: {rebuilt['psnr']:.2f} dB PSNR (mean over images; "
            f"{rebuilt['psnr_of_mean_error']:.2f} dB of the mean error), L1 {rebuilt['l1']:.4f}"
            f"{_optional(rebuilt, 'ssim', 'SSIM')}{_optional(rebuilt, 'lpips', 'LPIPS')}, "
            f"{_distance(features, 'r')} {rebuilt['frechet_distance']:.4f}"
        )
        text += unreadable_lines(rebuilt, kind)
        if rebuilt["real_class_agreement"] is not None:
            text.append(
                f"classifier (SVM on real pixels): {rebuilt['real_class_agreement']:.1%} correct on {kind}, "
                f"{rebuilt['class_agreement']:.1%} on their reconstructions"
            )
    for one in result["generated"]:
        parts = [f"{_distance(features, 'g')} {one['frechet_distance']:.4f}"]
        if "inception_score" in one:
            parts.append(f"IS {one['inception_score']:.2f} +- {one['inception_score_deviation']:.2f}")
        if "kid" in one:
            parts.append(f"{_kernel(features)} {one['kid']:.5f} +- {one['kid_deviation']:.5f}")
            parts.append(f"precision {one['precision']:.3f}, recall {one['recall']:.3f}")
        if "class_agreement" in one:
            parts.append(f"{one['class_agreement']:.1%} classified as their label")
        text.append(f"{one['count']} generated images, {_guidance(one)}: {', '.join(parts)}")
    text += unreadable_lines(result["reference"], "images of the reference")
    return text + [f"note: {note}" for note in result["notes"]]


def table(result: dict) -> str:
    """The result as Markdown."""
    features, checkpoint, reference = result["features"], result["checkpoint"], result["reference"]
    text = [
        f"# Evaluation of {plain(checkpoint['name'])}, step {checkpoint['step']}",
        "",
        f"{checkpoint['weights']} weights, SHA-256 {checkpoint['weights_sha256']}. Features: {features['name']} "
        f"({features['title']}, {features['dimension']} dimensions). Reference: "
        f"{reference_name(reference)}, {reference['images'] or 'unknown number of'} images"
        f"{', SHA-256 ' + reference['sha256'] if reference['sha256'] else ''}. "
        f"{JSON} has all details.",
        "",
    ]
    columns = {
        "guidance": lambda one: _guidance(one),
        "interval": lambda one: "{:g} to {:g}".format(*one["interval"]),
        "solver": lambda one: one["solver"],
        "steps": lambda one: str(one["steps"] or "own"),
        "dtype": lambda one: one["network_precision"],
        "images": lambda one: str(one["count"]),
        _distance(features, "g"): lambda one: f"{one['frechet_distance']:.4f}",
        "IS": lambda one: f"{one['inception_score']:.2f}" if "inception_score" in one else "",
        _kernel(features): lambda one: f"{one['kid']:.5f}" if "kid" in one else "",
        "precision": lambda one: f"{one['precision']:.3f}" if "precision" in one else "",
        "recall": lambda one: f"{one['recall']:.3f}" if "recall" in one else "",
        "classified as their label": lambda one: f"{one['class_agreement']:.1%}" if "class_agreement" in one else "",
        "seconds": lambda one: f"{one['seconds']:.1f}",
    }
    rows = [{name: cell(one) for name, cell in columns.items()} for one in result["generated"]]
    text += markdown(rows, [name for name in columns if any(row[name] for row in rows)])
    rebuilt = result["reconstruction"]
    if rebuilt:
        cells = {
            rebuilt["kind"]: str(rebuilt["images"]),
            _distance(features, "r"): f"{rebuilt['frechet_distance']:.4f}",
            "PSNR, dB": f"{rebuilt['psnr']:.2f}",
            "of the mean error": f"{rebuilt['psnr_of_mean_error']:.2f}",
            "L1": f"{rebuilt['l1']:.4f}",
            "SSIM": "" if rebuilt["ssim"] is None else f"{rebuilt['ssim']:.4f}",
            "LPIPS": "" if rebuilt["lpips"] is None else f"{rebuilt['lpips']:.4f}",
        }
        text += ["", *markdown([cells], [name for name in cells if cells[name]])]
    text += ["", *(f"- {note}" for note in result["notes"])] if result["notes"] else []
    return "\n".join(text) + "\n"


def plain(name: str) -> str:
    """A name from a model's settings for Markdown: on one line, and without HTML."""
    return html.escape(printable(name))


def reference_name(reference: dict) -> str:
    """Which images those of `Reference.info` are: a file of statistics, or a split of the data."""
    return reference["path"] or f"the {reference.get('kind', 'training images')}"


def markdown(rows: list[dict[str, str]], columns: list[str] | None = None) -> list[str]:
    """A table; its columns are all keys of the rows by default."""
    columns = list(rows[0]) if columns is None else columns
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row[name] for name in columns)} |" for row in rows),
    ]


def _distance(features: dict, prefix: str) -> str:
    """Name of the Frechet distance; gFID and rFID only for Inception features."""
    return f"{prefix}FID" if features["name"] == "inception" else features["title"]


def _kernel(features: dict) -> str:
    return "KID" if features["name"] == "inception" else "kernel distance"


def _guidance(one: dict) -> str:
    return "unguided" if one["guidance"] == 1 else f"guidance {one['guidance']:g}"


def _optional(values: dict, key: str, name: str) -> str:
    return "" if values[key] is None else f", {name} {values[key]:.4f}"
