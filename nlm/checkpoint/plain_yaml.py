"""YAML that others wrote, as plain values. Imports no torch."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

_MOST = 10_000_000  # parts of a text, aliases written out
_DEEPEST = 100  # brackets within each other
_LONGEST = 100  # characters of a whole number


class Loader(yaml.SafeLoader):
    """PyYAML's, which makes nothing but plain values, without the time that it takes, squared, for
    brackets within brackets."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise ScannerError(
                None, None, f"more than {_DEEPEST} brackets within each other", self.get_mark()
            )
        super().fetch_flow_collection_start(token)


def _short(loader: Loader, node: yaml.ScalarNode) -> int:
    """A whole number; of "1:1:1:...", which is one to the base 60, the time grows as the square."""
    if len(node.value) > _LONGEST:
        raise ConstructorError(
            None, None, f"a number of more than {_LONGEST} characters", node.start_mark
        )
    return int(loader.construct_yaml_int(node))


Loader.add_constructor("tag:yaml.org,2002:int", _short)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds: plain values alone, whatever its tags ask for.

    Raises
    ------
    ValueError
        It is no YAML, names something to make, or its aliases stand for more than ten million
        parts.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _parts(node, {}) > _MOST:
            raise ValueError(f"its aliases stand for more than {_MOST} parts")
        return loader.construct_document(node)
    except Exception as error:  # its constructors raise KeyError, IndexError, AttributeError, ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _parts(node: Any, counted: dict[int, int]) -> int:
    """The nodes of a tree in which every alias is written out; a cycle has too many."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = _MOST + 1  # until it is done
    inner = node.value if isinstance(node.value, list) else []
    flat = [each for pair in inner for each in (pair if isinstance(pair, tuple) else (pair,))]
    counted[id(node)] = 1 + sum(_parts(each, counted) for each in flat)
    return counted[id(node)]
