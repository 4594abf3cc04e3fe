"""Read YAML files and values: YAML's safe part, of bounded size, with each key once."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from unite_fast.errors import UserError, one_line, require, shown

LARGEST_RECIPE = 2**18
"""Bytes of a YAML file."""

LARGEST_TREE = 10_000
"""Values in a YAML text, each alias counted as often as it stands for something."""
LARGEST_INTEGER = 2**12
"""Bits. Python reads hexadecimal numbers of any length, and refuses to print those of more than 4,300 digits."""
TOO_MANY = f"it has more than {LARGEST_TREE:,} values, and settings need far fewer"


class _Loader(yaml.SafeLoader):
    """YAML as its readers expect it. YAML 1.1 has numbers in base 60 (10:13, a range of steps, would be 613), octal
    ones (010 would be 8) and dates (2024-11-28 would be no text); here they are text. A key may stand once, and the
    number of values is checked while the text is read."""

    values = 0

    def compose_node(self, parent, index):
        self.values += 1
        if self.values > LARGEST_TREE:
            raise yaml.MarkedYAMLError(None, None, TOO_MANY)
        return super().compose_node(parent, index)

    def resolve(self, kind, value, implicit):
        if kind is yaml.ScalarNode and (":" in value or re.fullmatch(r"[-+]?0[0-9_]+", value)):
            implicit = (False, implicit[1])
        tag = super().resolve(kind, value, implicit)
        return "tag:yaml.org,2002:str" if tag == "tag:yaml.org,2002:timestamp" else tag

    def construct_yaml_int(self, node):
        number = super().construct_yaml_int(node)
        if number.bit_length() > LARGEST_INTEGER:
            raise ValueError("a number of thousands of digits")
        return number

    def compose_mapping_node(self, anchor):
        # Here and not when it is constructed: by then, what << takes over stands among the keys.
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {shown(key.value)} stands twice", key.start_mark)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None)
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path) -> Any:
    """
    Raises:
        UserError: see `parse_yaml`; or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_RECIPE + 1).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: it is not UTF-8") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML.

    Args:
        origin: what the text is, for messages.

    Raises:
        UserError: not YAML, nested too deeply, too many values, or a key stands twice.
    """
    try:
        require(len(text) <= LARGEST_RECIPE, f"{origin} has {len(text):,} letters; settings need far fewer")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            size = _size(node, {}) if node else 0
            require(size <= LARGEST_TREE, f"{origin} cannot be read: {TOO_MANY}")
            return loader.construct_document(node) if node else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        kind = "cannot be read" if problem == TOO_MANY else "is not YAML"
        raise UserError(f"{origin} {kind}: {one_line(problem)}{place}") from error
    except RecursionError:
        raise UserError(f"{origin} is nested too deeply") from None
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        # PyYAML's constructors raise these on scalars such as 0x_ or !!bool x.
        raise UserError(f"{origin} is not YAML: {one_line(str(error))}") from error


def _size(node, known: dict) -> float:
    """Values that a node stands for; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while its parts are counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in flat)
    return known[id(node)]
