"""Parse JSON from files that may have come from elsewhere, and check it against a schema."""

import json
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON (RFC 8259): numbers are finite, and no object names a key twice.

    Raises:
        ValueError: anything else; the message is one line.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_as(kind: type[Kind], text: str | bytes) -> Kind:
    """Parse JSON as `kind`, a pydantic model or a dataclass; types are strict: "1" and true are no integers.

    Raises:
        ValueError: not JSON, or not of this kind; the message is one line and names the field.
    """
    return check_kind(kind, parse_json(text))


def check_kind(kind: type[Kind], tree: Any) -> Kind:
    """Like `parse_as`, for JSON that is parsed already. Bytes of file names that are not text become question marks,
    which the tree does not have."""
    try:
        # In Python mode a strict check wants instances of dataclasses; in JSON mode it makes them.
        text = json.dumps(tree, ensure_ascii=False).encode("utf-8", "replace")
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = repr(".".join(str(part) for part in first["loc"]))[1:-1]
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:80]!r} stands twice")
    return tree
