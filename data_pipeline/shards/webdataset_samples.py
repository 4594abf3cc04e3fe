"""WebDataset samples in tar files: members belong together whose paths are equal up to the last part's first dot."""

import codecs
from collections.abc import Sequence

from unite_fast.data_pipeline.listing import LeftOut
from unite_fast.data_pipeline.shards.listed import Label, parse_label

LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name", "category", "wnid", "synset")
"""Where the .json of a sample may have its class, in the order in which they are tried."""
COMPANIONS = ("cls", "json", "txt", "label", "target", "class", "index", "id", "caption", "npy", "pyd")
"""Extensions that mark a sample."""
LARGEST_JSON = 2**24
"""Bytes of a .json with a label; of a .cls no more are read."""
SECOND_IMAGE = "that are second images of a sample"
NO_MAIN_IMAGE = "of samples with several images, none of them KEY.EXTENSION"
"""Reasons to leave an image out."""


class NoClass(str):
    """Why the label of a sample is no class. Not raised at once: the sample may have no image."""


def key_of(path: str) -> str:
    """The key of the sample that a member belongs to."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def label_in(data: bytes, extension: str, path: str) -> Label | NoClass | None:
    """The class in a .cls or .json; None if there is none.

    Args:
        path: of the member, for messages.
    """
    from unite_fast.utils.parse_json import parse_json  # imports pydantic

    try:
        if extension == "cls":
            return parse_label(data.decode("utf-8-sig"))
        try:
            tree = parse_json(data.removeprefix(codecs.BOM_UTF8))
        except ValueError:
            return None
        value = next((tree[key] for key in LABEL_KEYS if key in tree), None) if isinstance(tree, dict) else None
        return None if value is None else parse_label(value)
    except ValueError as error:
        return NoClass(f"{path}: {error}")


def main_image(key: str, paths: Sequence[str], left_out: LeftOut) -> str | None:
    """The image of a sample, x.jpg before x.seg.png; None if nobody can tell."""

    def dots(path: str) -> int:
        return path[len(key) + 1 :].count(".")

    first, *rest = sorted(paths, key=lambda path: (dots(path), path))
    if rest and dots(first) and dots(first) == dots(rest[0]):
        for path in paths:
            left_out.add(NO_MAIN_IMAGE, path)
        return None
    for path in rest:
        left_out.add(SECOND_IMAGE, path)
    return first
