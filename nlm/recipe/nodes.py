"""A YAML file, read so that everything that is wrong with it is found and knows its line.

A reader's methods give what a node holds, or None after they have noted a problem.
"""

import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from nlm.checkpoint.names import printable
from nlm.checkpoint.plain_yaml import Loader
from nlm.recipe.methods import Number
from nlm.recipe.recipe import RecipeError
from nlm.recipe.values import Rule, Values

_TAG = "tag:yaml.org,2002:"
_SIZE = re.compile(r"(\S*?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


class Reader:
    """One file that is being read.

    Attributes
    ----------
    content : the text of the file, read once: it may be a pipe.
    root : the mapping that the file is.
    lines : key -> line, of what was marked.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self._problems: list[tuple[int, str]] = []
        self.root = self._composed()

    def problem(self, node: Node, sentence: str) -> None:
        """Notes what is wrong at a node."""
        self._problems.append((_line(node), sentence))

    @property
    def noted(self) -> int:
        """How many problems there are so far."""
        return len(self._problems)

    def raise_problems(self) -> None:
        """Raises if there are any, in the order of their lines."""
        if self._problems:
            ordered = sorted(dict.fromkeys(self._problems), key=lambda each: each[0])
            raise RecipeError(f"{self.file}:{line}: {what}" for line, what in ordered)

    def mark(self, key: str, node: Node) -> None:
        """Keeps the line of what a recipe calls ``key``."""
        self.lines[key] = _line(node)

    def mapping(self, node: Node, what: str, known: Iterable[str] | None = None) -> dict[str, Node]:
        """key -> node; keys that are not known, or stand twice, are problems."""
        if not isinstance(node, MappingNode):
            self.problem(node, f"{what} is a mapping of keys, got {described(node)}")
            return {}
        names = None if known is None else tuple(known)
        found: dict[str, Node] = {}
        own, inherited = _pairs(node)
        for place, (key, value) in enumerate([*own, *inherited]):
            if not isinstance(key, ScalarNode) or is_empty(key):
                self.problem(key, f"the keys of {what} are names, got {described(key)}")
            elif names is not None and key.value not in names:
                self.problem(key, f"{what} has no {key.value!r}: {instead(key.value, names)}")
            elif key.value not in found:
                found[key.value] = value
            elif place < len(own):
                self.problem(key, f"a key of {what} stands once, got {key.value!r} twice")
        return found

    def items(self, node: Node, what: str) -> Sequence[Node]:
        """The nodes of a list."""
        if isinstance(node, SequenceNode):
            return node.value
        self.problem(node, f"{what} is a list, got {described(node)}")
        return ()

    def text(self, node: Node, what: str) -> str | None:
        """A text, as it is written."""
        if isinstance(node, ScalarNode) and not is_empty(node) and node.value:
            return str(node.value)
        self.problem(node, f"{what} is a text, got {described(node)}")
        return None

    def choice(self, node: Node, what: str, known: Iterable[str]) -> str | None:
        """One of several words."""
        names = tuple(known)
        if isinstance(node, ScalarNode) and node.value in names:
            return str(node.value)
        self.problem(node, f"{what} is one of {', '.join(names)}, got {described(node)}")
        return None

    def switch(self, node: Node, what: str) -> bool | None:
        """true or false."""
        if isinstance(node, ScalarNode) and _kind(node) == "bool":
            return node.value.lower() in ("true", "yes", "on")
        self.problem(node, f"{what} is true or false, got {described(node)}")
        return None

    def whole(self, node: Node, what: str, least: int) -> int | None:
        """A whole number."""
        number = _number(node)
        if number is not None and number == int(number) and least <= number <= 2**63:
            exact = _exact(node.value, number)  # the float of the largest ones is 2^63
            if exact < 2**63:
                return exact
        below = " and below 2^63" if number is not None and number >= 2**63 else ""
        self.problem(node, f"{what} is a whole number from {least}{below}, got {described(node)}")
        return None

    def size(self, node: Node, what: str) -> int | None:
        """Bytes: a number, or one with a unit such as 5GB or 512MiB."""
        if isinstance(node, ScalarNode) and (size := size_of(node.value)) is not None:
            return size
        self.problem(node, f"{what} is bytes such as 5GB or 512MiB, got {described(node)}")
        return None

    def values(self, node: Node, what: str, of: Number) -> Values | None:
        """A number, a gradient of numbers, or rules for parts of the names."""
        if isinstance(node, SequenceNode) and any(
            isinstance(each, MappingNode) for each in node.value
        ):
            rules = [self._rule(each, what, of) for each in node.value]
        elif isinstance(node, MappingNode):
            rules = [self._rule(node, what, of)]
        else:
            numbers = self._numbers(node, what, of)
            rules = [None if numbers is None else Rule(None, numbers)]
        good = tuple(rule for rule in rules if rule is not None)
        return Values(good) if len(good) == len(rules) else None

    def _rule(self, node: Node, what: str, of: Number) -> Rule | None:
        keys = self.mapping(node, f"a rule of {what}", ("filter", "value"))
        if "value" not in keys and isinstance(node, MappingNode):
            self.problem(node, f"a rule of {what} has a value, got none: write 'value: NUMBER'")
            return None
        if "value" not in keys:
            return None
        numbers = self._numbers(keys["value"], what, of)
        part = self.text(keys["filter"], f"a filter of {what}") if "filter" in keys else "*"
        if numbers is None or part is None:
            return None
        return Rule(None if part == "*" else part, numbers)

    def _numbers(self, node: Node, what: str, of: Number) -> tuple[float, ...] | None:
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        found = []
        for each in nodes:
            number = _number(each)
            if number is None:
                self.problem(each, f"{what} is a number, a list of numbers or of rules with "
                             f"'filter' and 'value', got {described(each)}")  # fmt: skip
            elif not of.holds(number):
                self.problem(each, f"{what} lies {of.range}, got {number:g}")
            else:
                found.append(number)
        if not nodes:
            self.problem(node, f"{what} has at least one number, got an empty list")
        return tuple(found) if found and len(found) == len(nodes) else None

    def _composed(self) -> Node:
        """The file's root.

        Raises
        ------
        RecipeError
            The file cannot be read, or is no YAML.
        """
        try:
            self.content = self.file.read_text(encoding="utf-8")
            node = Loader(self.content).get_single_node()
        except OSError as error:
            raise RecipeError([f"{self.file}: a recipe is a file, got {error.strerror}"]) from error
        except UnicodeDecodeError as error:
            raise RecipeError([f"{self.file}: a recipe is text in UTF-8, got {error}"]) from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = "" if mark is None else f"{mark.line + 1}:"
            said = " ".join(filter(None, (error.context, error.problem)))
            raise RecipeError([f"{self.file}:{line} a recipe is YAML, got {said}"]) from error
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            said = " ".join(str(error).split())
            raise RecipeError([f"{self.file}: a recipe is YAML, got {said}"]) from error
        if node is None:
            raise RecipeError([f"{self.file}: a recipe is a mapping of keys, got an empty file"])
        return node


def size_of(text: str) -> int | None:
    """Bytes, as a number or with a unit such as 5GB or 512MiB; None where it is something else."""
    match = _SIZE.fullmatch(text.strip())
    number = None if match is None else _finite(match[1])
    if match is None or number is None:
        return None
    size = number * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")
    return int(size) if 1 <= size < 2**63 else None


def instead(name: str, known: Sequence[str]) -> str:
    """What to write for a name that is not known."""
    near = get_close_matches(name, known, 1)
    return f"write {near[0]!r}" if near else f"it has {', '.join(known) or 'no keys'}"


def described(node: Node) -> str:
    """What a node is, for the end of a sentence."""
    if isinstance(node, MappingNode):
        return f"the mapping of {', '.join(_name(key) for key, _ in node.value) or 'nothing'}"
    if isinstance(node, SequenceNode):
        return f"a list of {len(node.value)}"
    if is_empty(node):
        return "nothing"
    return repr(node.value) if _kind(node) == "str" else printable(str(node.value))


def is_empty(node: Node) -> bool:
    """Whether a node is YAML's null."""
    return isinstance(node, ScalarNode) and _kind(node) == "null"


def _name(key: Node) -> str:
    return repr(key.value) if isinstance(key, ScalarNode) else "a key that is no name"


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: Node) -> str:
    return str(node.tag).removeprefix(_TAG)


def _number(node: Node) -> float | None:
    """A finite number; text such as 1e-4, which YAML takes for no number, is one."""
    if not isinstance(node, ScalarNode) or _kind(node) not in ("int", "float", "str"):
        return None
    return _finite(node.value.replace("_", "") if _kind(node) != "str" else node.value)


def _exact(text: str, number: float) -> int:
    """A whole number as it is written: from 2^53 on a float is another one."""
    try:
        return int(text.replace("_", ""))
    except ValueError:  # 1e3
        return int(number)


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _pairs(
    node: MappingNode, seen: set[int] | None = None
) -> tuple[list[tuple[Node, Node]], list[tuple[Node, Node]]]:
    """The pairs of a mapping, and those that it has through the key ``<<``, nearest first.

    A mapping that is named again has nothing to add: ``seen`` are those that were.
    """
    own, inherited = [], []
    seen = {id(node)} if seen is None else seen
    for key, value in node.value:
        if _kind(key) != "merge":
            own.append((key, value))
            continue
        for each in value.value if isinstance(value, SequenceNode) else [value]:
            if isinstance(each, MappingNode) and id(each) not in seen:
                seen.add(id(each))
                theirs, further = _pairs(each, seen)
                inherited += [*theirs, *further]
    return own, inherited
