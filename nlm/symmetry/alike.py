"""Symmetry between modules: experts in a list, parallel branches, heads that are modules.

Siblings are n modules whose state dict entries differ by one number in their names. They may be
exchanged for one another where the graph treats them alike. Every node that depends on sibling i
only, on its parameters and on position i of what is *picked* for it (column i of a router's
gates), belongs to i and is an expression in i. The siblings are alike if all that leaves them

- sums up (or multiplies, ...) the same expressions of every sibling: the order does not matter; or
- lays one expression of all, in order, along a dimension: the siblings' index stands there.

A node that mixes siblings otherwise ends the attempt. Then any permutation of the siblings together
with the picked positions leaves the function as it is, provided that these positions are
interchangeable in the rest of the network. That is for the algebra of axes to say: the graph is
read once more, with the siblings' index as an axis (:mod:`nlm.symmetry.siblings`).
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from nlm._state_dict import overlapping, place_of
from nlm.symmetry.graph import Graph, is_write, operation_name
from nlm.symmetry.siblings import Pick, Siblings, Space, picks

_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "logical_and", "logical_or", "bitwise_or"}
_MIXED = -1  # in place of a sibling: of several

Names = dict[str, tuple[str, ...]]
Terms = Counter[tuple[int | None, Hashable]]  # (sibling or None, expression)


def siblings(
    graph: Graph, state: Mapping[str, Tensor], values: Mapping[fx.Node, Any]
) -> list[Siblings]:
    """All siblings that a graph treats alike; ``values`` are the axes of its nodes."""
    candidates = list(_candidates(state))
    if not candidates or any(map(is_write, graph.nodes.nodes)):
        return []
    search = _Search(graph, candidates, values)
    found: list[Siblings] = []
    taken: set[str] = set()
    for number in sorted(range(len(candidates)), key=search.depth, reverse=True):
        names = set(candidates[number])
        members = {name for of in candidates[number].values() for name in of}
        if taken.isdisjoint(names | members) and (new := search.attempt(number)):
            members = {name for of in new.names.values() for name in of}
            if taken.isdisjoint(members | set(new.names)):
                found.append(new)
                taken |= members | set(new.names)
    return found


def _candidates(state: Mapping[str, Tensor]) -> Iterator[Names]:
    """Modules that differ by a number in their name and have equal entries, none of them shared."""
    times = Counter(map(place_of, state.values()))
    shared = {name for name in state if times[place_of(state[name])] > 1} | overlapping(state)
    families: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in state.items():
        for match in re.finditer(r"\d+", name):
            family = families[name[: match.start()]]
            family[match.group()][name[match.end() :]] = tensor
    for prefix, modules in families.items():
        alike: dict[Hashable, list[str]] = defaultdict(list)
        for number, entries in modules.items():
            if shared.isdisjoint(f"{prefix}{number}{end}" for end in entries):
                forms = ((end, tensor.shape, tensor.dtype) for end, tensor in entries.items())
                alike[frozenset(forms)].append(number)
        for numbers in alike.values():
            numbers.sort(key=int)
            if len(numbers) > 1:
                yield {
                    f"{prefix}*{end}": tuple(f"{prefix}{number}{end}" for number in numbers)
                    for end in modules[numbers[0]]
                }


class _Search:
    """Looks for alike siblings in one graph.

    Attributes
    ----------
    places : node -> its place in the order of execution.
    numbers : node -> a number that equal expressions share.
    parameters : node -> (candidate, sibling, name of the stack), for the siblings' parameters.
    picks : node -> what it picks.
    seeds : candidate or axis -> its nodes.
    touched : node -> candidate or axis -> the sibling, of all that it depends on.
    """

    def __init__(
        self, graph: Graph, candidates: Sequence[Names], values: Mapping[fx.Node, Any]
    ) -> None:
        self.candidates = candidates
        self.nodes = graph.nodes
        self.places = {node: place for place, node in enumerate(graph.nodes.nodes)}
        self.interned: dict[Hashable, int] = {}
        self.numbers: dict[fx.Node, int] = {}
        self.picks = dict(picks(graph.nodes, values))
        self.seeds: dict[Space, list[fx.Node]] = defaultdict(list)
        self.parameters: dict[fx.Node, list[tuple[Space, int, str]]] = {}
        self.touched: dict[fx.Node, dict[Space, int]] = {}
        owners: dict[str, list[tuple[Space, int, str]]] = defaultdict(list)
        for number, names in enumerate(candidates):
            for name, members in names.items():
                for index, member in enumerate(members):
                    owners[member].append((number, index, name))
        for node in graph.nodes.nodes:
            own = owners.get(graph.entries.get(node.name, ""), [])
            if node.op == "placeholder" and own:
                self.parameters[node] = own
            for space, *_ in own:
                self.seeds[space].append(node)
            if node in self.picks:
                self.seeds[self.picks[node].space].append(node)
            self.numbers[node] = self._number(node, graph)
            self.touched[node] = self._touches(node)

    def count(self, space: Space) -> int:
        """How many siblings or positions there are."""
        if isinstance(space, int):
            return len(next(iter(self.candidates[space].values())))
        return self.picks[self.seeds[space][0]].count

    def depth(self, candidate: int) -> tuple[int, int]:
        """The innermost modules, and of these the most, are tried first."""
        name, members = next(iter(self.candidates[candidate].items()))
        return name.partition("*")[0].count("."), len(members)

    def attempt(self, candidate: int) -> Siblings | None:
        """The siblings of a candidate with all that belongs to them, where they are alike."""
        spaces: list[Space] = [candidate]
        while True:
            trial = _Trial(self, spaces, self.count(candidate))
            if trial.run():
                names: Names = {}
                for space in spaces:
                    if isinstance(space, int):
                        names |= self.candidates[space]
                return Siblings(names, trial.index, trial.picks, trial.joins)
            more = [space for space in trial.companions() if space not in spaces]
            if not more:
                return None
            spaces += more

    def intern(self, key: Hashable) -> int:
        return self.interned.setdefault(key, len(self.interned))

    def _number(self, node: fx.Node, graph: Graph) -> int:
        value = graph.constants.get(node.name)
        if node.op == "placeholder" and value is not None and not value.is_meta:
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            key: Hashable = (value.dtype, value.shape, data.numpy().tobytes())
            return self.intern(("constant", key))
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags:
            return self.intern(node)
        return self.intern(expression(node, self.numbers))

    def _touches(self, node: fx.Node) -> dict[Space, int]:
        found = {space: index for space, index, _ in self.parameters.get(node, ())}
        if pick := self.picks.get(node):
            found[pick.space] = pick.index
        for source in node.all_input_nodes:
            for space, index in self.touched[source].items():
                if found.setdefault(space, index) != index:
                    found[space] = _MIXED
        return found


class _Trial:
    """One attempt: the siblings' nodes in order of execution, from their seeds.

    Attributes
    ----------
    index : node -> the sibling to which it belongs.
    expressions : node of a sibling -> its expression.
    terms : node that adds up (or multiplies, ...) -> what.
    """

    def __init__(self, search: _Search, spaces: Sequence[Space], count: int) -> None:
        self.search = search
        self.spaces = spaces
        self.count = count
        self.index: dict[fx.Node, int] = {}
        self.expressions: dict[fx.Node, int] = {}
        self.terms: dict[fx.Node, Terms] = {}
        self.open: set[fx.Node] = set()  # sums of some siblings, or not of all alike
        self.picks: dict[fx.Node, Pick] = {}
        self.joins: dict[fx.Node, list[range]] = {}
        self.left = False  # whether a sum over all siblings was met
        self.met: dict[Space, set[tuple[int, int]]] = defaultdict(set)

    def companions(self) -> list[Space]:
        """What else belongs to the siblings: each meets the part of its own index there."""
        every = {(index, index) for index in range(self.count)}
        return [
            space
            for space, met in self.met.items()
            if met == every and self.search.count(space) == self.count
        ]

    def run(self) -> bool:
        """Whether the siblings are alike."""
        places = self.search.places
        seeds = [node for space in self.spaces for node in self.search.seeds[space]]
        waiting = [(places[node], node) for node in seeds]
        heapq.heapify(waiting)
        done: set[fx.Node] = set()
        while waiting:
            _, node = heapq.heappop(waiting)
            if node in done:
                continue
            done.add(node)
            if not self._visit(node):
                return False
            if node in self.index or node in self.open:
                for user in node.users:
                    heapq.heappush(waiting, (places[user], user))
        return self.left or bool(self.joins)

    def _visit(self, node: fx.Node) -> bool:
        """Says what a node is; False where it mixes siblings."""
        if node.op == "output":
            return False
        for space, index, name in self.search.parameters.get(node, ()):
            if space in self.spaces:
                return self._belongs(node, index, ("parameter", name))
        sources = node.all_input_nodes
        pick = self.search.picks.get(node)
        if pick and pick.space in self.spaces and pick.source not in self.index:
            if not self.open.isdisjoint(sources):
                return False
            self.picks[node] = pick
            source = self.search.numbers[pick.source]
            return self._belongs(node, pick.index, ("pick", str(node.target), source, pick.dim))
        if operation_name(node.target) in _COMMUTATIVE and len(node.args) == 2 and not node.kwargs:
            return self._adds(node)
        if not self.open.isdisjoint(sources):
            return False
        found = {self.index[source] for source in sources if source in self.index}
        if len(found) != 1:
            return self._lays(node)
        [index] = found
        self._meets(node, index)
        return self._belongs(node, index, expression(node, self.search.numbers, self.expressions))

    def _belongs(self, node: fx.Node, index: int, key: Hashable) -> bool:
        self.index[node] = index
        self.expressions[node] = self.search.intern(key)
        return True

    def _meets(self, node: fx.Node, index: int) -> None:
        """Notes what a sibling's node depends on that is not known to be the sibling's."""
        for source in node.all_input_nodes:
            if source not in self.index and source not in self.open:
                for space, other in self.search.touched[source].items():
                    self.met[space].add((index, other))

    def _adds(self, node: fx.Node) -> bool:
        name = operation_name(node.target)
        terms: Terms = Counter()
        for source in node.args:
            if not isinstance(source, fx.Node) or not (source in self.open or source in self.index):
                terms[None, frozen(source, self.search.numbers)] += 1
            elif source in self.terms and operation_name(source.target) == name:
                terms += self.terms[source]
            elif source in self.index:
                terms[self.index[source], self.expressions[source]] += 1
            else:
                return False
        found = {index for index, _ in terms if index is not None}
        if len(found) == 1:
            self._meets(node, *found)
        if self._balanced(terms):
            self.left = True
            return True
        self.terms[node] = terms
        if len(found) > 1:
            self.open.add(node)
            return True
        key = frozenset((index is None, key, times) for (index, key), times in terms.items())
        return self._belongs(node, found.pop(), (name, key))

    def _balanced(self, terms: Terms) -> bool:
        """Whether every expression is there of all siblings, and as often of each."""
        times: dict[Hashable, Counter[int]] = defaultdict(Counter)
        for (index, key), count in terms.items():
            if index is not None:
                times[key][index] = count
        return all(
            len(each) == self.count and len(set(each.values())) == 1 for each in times.values()
        )

    def _lays(self, node: fx.Node) -> bool:
        """Whether a node lays the siblings' results along a dimension, in order."""
        name = operation_name(node.target)
        if name not in ("stack", "cat", "concat", "concatenate"):
            return False
        parts: Any = node.args[0]
        runs: list[range] = []
        place = 0
        while place < len(parts):
            if parts[place] in self.index:
                run = range(place, place + self.count)
                of = [parts[at] for at in run if at < len(parts)]
                if [self.index.get(each) for each in of] != list(range(self.count)):
                    return False
                if len({self.expressions[each] for each in of}) > 1:
                    return False
                runs.append(run)
                place += self.count
            else:
                place += 1
        if name == "stack" and runs != [range(len(parts))]:
            return False
        self.joins[node] = runs
        return True


# --- expressions ----------------------------------------------------------------------------------


def expression(
    node: fx.Node, numbers: Mapping[fx.Node, int], own: Mapping[fx.Node, int] | None = None
) -> Hashable:
    """A key that operations share which compute the same; ``own`` holds expressions of siblings."""
    return (
        str(node.target),
        frozen(node.args, numbers, own or {}),
        frozen(node.kwargs, numbers, own or {}),
    )


def frozen(
    value: Any, numbers: Mapping[fx.Node, int], own: Mapping[fx.Node, int] | None = None
) -> Hashable:
    """Arguments of an operation as a key."""
    if isinstance(value, fx.Node):
        if own and value in own:
            return "own", own[value]
        return "node", numbers[value]
    if isinstance(value, (tuple, list)):
        return tuple(frozen(each, numbers, own) for each in value)
    if isinstance(value, dict):
        return tuple((key, frozen(each, numbers, own)) for key, each in sorted(value.items()))
    if isinstance(value, slice):
        return frozen((value.start, value.stop, value.step), numbers, own)
    return type(value), str(value)
