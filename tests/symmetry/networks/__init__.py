"""The operations of random networks: each writes one line of source about a writer's value."""

import itertools
import random
from collections.abc import Callable

from symmetry.networks.writer import CLASSES, Network, Pick, Program, Writer, needed

__all__ = ["Network", "Program", "write"]

Step = Callable[[Writer], str]


def along(w: Writer, expression: str) -> str:
    """An operation on the last dimension, done on dimension d."""
    return expression.replace("$", f"{w.v}.movedim({w.d}, -1)") + f".movedim(-1, {w.d})"


def linear(w: Writer) -> str:
    bias = w.pick(["", f", {w.P(w.m)}"])
    return along(w, f"F.linear($, {w.P(w.m, w.n)}{bias})")


def changed_weight(w: Writer) -> str:
    square = w.P(w.n, w.n)
    how = w.pick(
        [
            "({0} + {0}.t())", "({0} - {0}.t())", "{0}.softmax(0)", "{0}.softmax(1)", "{0}.triu()",
            "{0}.flip(0)", "{0}.roll(1, 1)", "{0}.cumsum(0)", "({0} @ {0}.t())", "({0} @ {0})",
            "{0}.flatten().softmax(0).view_as({0})", "F.normalize({0}, dim=0)", "{0}.t()",
            "({0} + torch.eye(len({0})).to({0}))", "torch.cat({0}.split([{1}, {2}])[::-1])",
            "{0}.view(-1, {3}, len({0})).transpose(0, 1).reshape({0}.shape)", "{0}.sort(0).values",
        ]
    )  # fmt: skip
    weight = how.format(square, w.k, w.n - w.k, w.part)
    return along(w, f"F.linear($, {weight})")


def attention(w: Writer) -> str:
    """[..., time, units] to the same, in heads, with a fused projection in one of three orders."""
    units, heads = w.value.shape[-1], w.pick([1, 2, 3, 4])
    inner = w.pick([2, 3])
    fused = f"F.linear({w.v}, {w.P(3 * heads * inner, units)})"
    order = w.pick(
        [
            f"{fused}.unflatten(-1, (3, {heads}, {inner})).unbind(-3)",
            f"{fused}.unflatten(-1, ({heads}, 3, {inner})).unbind(-2)",
            f"[z.unflatten(-1, ({heads}, {inner})) for z in {fused}.chunk(3, -1)]",
            f"[z.unflatten(-1, ({heads}, {inner})) for z in {fused}.split({heads * inner}, -1)]",
        ]
    )
    causal = w.pick([False, False, True])
    return (
        f"F.scaled_dot_product_attention(*[z.transpose(-2, -3) for z in {order}], "
        f"is_causal={causal}).transpose(-2, -3).flatten(-2)"
    )


def grouped_queries(w: Writer) -> str:
    units, keys, times, inner = w.value.shape[-1], 2, w.pick([2, 3]), w.pick([2, 3])
    q = f"F.linear({w.v}, {w.P(keys * times * inner, units)})"
    kv = [f"F.linear({w.v}, {w.P(keys * inner, units)})" for _ in range(2)]
    heads = f".unflatten(-1, (-1, {inner})).transpose(-2, -3)"
    repeat = w.pick(
        [
            f".repeat_interleave({times}, -3)",
            f".unsqueeze(-3).expand(*[-1] * {w.value.dim() - 1}, {times}, -1, -1).flatten(-4, -3)",
            f".repeat(*[1] * ({w.value.dim()} - 2), {times}, 1, 1)",
        ]
    )
    queries, (key, value) = q + heads, (each + heads + repeat for each in kv)
    scores = f"(({queries}) @ ({key}).transpose(-1, -2)).softmax(-1)"
    return f"({scores} @ ({value})).transpose(-2, -3).flatten(-2)"


def convolution(w: Writer) -> str:
    channels = w.value.shape[1]
    groups = w.pick([g for g in (1, 2, 3, 4, 6, 8) if channels % g == 0])
    target = groups * w.pick([1, 2, 3])
    spatial = w.value.dim() - 2
    size = w.pick([1, 2, 3])
    weight = w.P(target, channels // groups, *[size] * spatial)
    return f"F.conv{spatial}d({w.v}, {weight}, padding=1, groups={groups})"


def norm(w: Writer) -> str:
    channels, last = w.value.shape[1], w.value.shape[-1]
    scale = f"{w.P(channels)}, {w.P(channels)}"
    groups = w.pick([g for g in range(1, channels + 1) if channels % g == 0])
    return w.pick(
        [
            f"F.batch_norm({w.v}, {w.P(channels)}, {w.P(channels)}.square() + 1, {scale})",
            f"F.group_norm({w.v}, {groups}, {scale})",
            f"F.layer_norm({w.v}, [{last}], {w.P(last)}, {w.P(last)})",
            f"F.layer_norm({w.v}, {list(w.value.shape[1:])})",
            f"F.rms_norm({w.v}, [{last}], {w.P(last)})",
            along(w, f"F.normalize($, dim={w.pick([1, -1])})"),
        ]
    )


def view(w: Writer) -> str:
    dims = list(range(1, w.value.dim()))
    rest = w.pick(list(itertools.permutations(dims)))
    return w.pick(
        [
            f"{w.v}.unflatten({w.d}, ({w.part}, -1))",
            f"{w.v}.flatten(1)",
            f"{w.v}.flatten({w.d})",
            f"{w.v}.permute(0, {', '.join(map(str, rest))})",
            f"{w.v}.transpose({w.d}, {w.e})",
            f"{w.v}.permute(0, {', '.join(map(str, rest))}).flatten(1)",
            f"{w.v}.flatten(1).unflatten(1, ({w.m}, -1))",
            f"{w.v}.permute(0, {', '.join(map(str, rest))}).reshape({w.v}.shape)",
        ]
    )


def parts(w: Writer) -> str:
    a, b = f"{w.v}.narrow({w.d}, 0, {w.k})", f"{w.v}.narrow({w.d}, {w.k}, {w.n - w.k})"
    u = w.other()
    return w.pick(
        [
            a,
            b,
            f"torch.cat([{b}, {a}], {w.d})",
            f"torch.cat([{w.v}, {u}], {w.d})",
            f"torch.cat([{u}, {w.v}], -1)",
            f"torch.cat([{w.v}, {w.like()}, {w.v}], {w.d})",
            f"torch.stack([{w.v}, {w.like()}], {w.d})",
            f"torch.stack([{w.v}, {w.like()}, {w.like()}], 1).{w.pick(['sum', 'softmax'])}({w.e})",
            f"torch.stack({w.v}.unbind({w.d})[::-1], {w.e})",
            f"torch.cat({w.v}.chunk({w.m}, {w.d}), {w.e})",
            f"torch.stack({w.v}.tensor_split({w.part}, {w.d}), {w.e})",
            f"{w.v}.select({w.d}, {w.k - 1})",
            f"{w.v}.select({w.d}, {w.k - 1}).unsqueeze({w.d}) * {w.v}",
            f"{w.v}[..., ::{w.pick([2, 3])}]",
            f"F.glu({w.v}, {w.d})",
            f"{a} * {w.v}.narrow({w.d}, {w.n - w.k}, {w.k})",
            f"F.pad({w.v}, ({w.pick([0, 1])}, {w.pick([1, 2])}))",
            f"torch.cat([{w.v}, {w.P(*w.ones(w.m))}.expand(len(x), *{w.v}.shape[1:{w.d}], -1, "
            f"*{w.v}.shape[{w.d} + 1:])], {w.d})",
        ]
    )


def order(w: Writer) -> str:
    v, d = w.v, w.d
    return w.pick(
        [
            f"{v} + {v}.flip({d})",
            f"{v}.flip({d})",
            f"{v} * {v}.roll({w.k}, {d})",
            f"{v}.roll({w.k}, {d})",
            f"{v}.cumsum({d})",
            f"{v}.sort({d}).values",
            f"{v}.topk({w.k}, {d}).values",
            f"{v}.gather({d}, {v}.argsort({w.e}) % {w.n})",
            f"{v}.gather({d}, {v}.argsort({d}))",
            f"{v}.index_select({d}, torch.tensor({random.Random(w.k).sample(range(w.n), w.n)}))",
            f"{v} * torch.arange({w.n}).view({w.ones(w.n)})",
            f"{v}.diff(dim={d})",
            f"{v}.repeat_interleave(2, {d}) + torch.cat([{v}, {v}], {d})",
            f"{v}.repeat_interleave({w.m}, {d})",
            along(w, f"F.max_pool1d($.flatten(1, -2), {w.pick([2, 3])}, 1)")
            if w.value.dim() == 3
            else f"{v}.unfold({d}, 2, 1).sum(-1)",
        ]
    )


def statistics(w: Writer) -> str:
    how = w.pick(["mean", "amax", "var", "logsumexp", "sum"])
    keep = w.pick([f"{w.v} - {w.v}.{how}({w.d}, keepdim=True)", f"{w.v}.{how}({w.d})"])
    return w.pick(
        [
            keep,
            f"{w.v}.softmax({w.d})",
            f"{w.v} * {w.v}.flatten(1).{how}(1).view(-1, *[1] * ({w.value.dim()} - 1))",
            f"{w.v} + 0.1 * {w.v}.{how}(0)",
            f"{w.v}.{how}({w.d}, keepdim=True) * {w.P(*w.ones(w.m))}",
        ]
    )


def elements(w: Writer) -> str:
    u = w.like()
    sizes = [w.pick([size, 1]) for size in w.value.shape[1:]]
    return w.pick(
        [
            f"{w.v} + {u}",
            f"{w.v} * {u}",
            f"torch.where({w.v} > {u}, {w.v}, {w.P(*sizes)})",
            f"{w.v} * {w.P(*sizes)}",
            f"{w.v} + {w.P(*sizes)}",
            f"{w.v} + {w.P(*w.ones(w.n))}.flip({w.d - 1})",
            f"{w.v}.relu()",
            f"{w.v}.masked_fill({u} > 0.5, 0.3)",
            f"F.prelu({w.v}, {w.P(w.value.shape[1])})",
            f"{w.v}.unsqueeze({w.d}) * {u}.unsqueeze({w.d} + 1)",
            f"{w.v} + {w.v}.transpose({w.d}, {w.e})",
            f"{w.v} - {w.other()}",
        ]
    )


def product(w: Writer) -> str:
    """A contraction of two values by random letters."""
    u = w.pick([w.other(), w.like(), w.v])
    letters = "cdefgh"
    sizes: dict[str, int] = {}
    sides = []
    for name in (w.v, u):
        side = "b"
        for size in w.shape(name)[1:]:
            fits = [c for c in letters if sizes.get(c, size) == size and c not in side]
            chosen = w.pick(fits[:3])
            sizes[chosen] = size
            side += chosen
        sides.append(side)
    kept = [c for c in sorted(set("".join(sides)) - {"b"}) if w.pick([True, False])]
    kept = w.pick([kept, kept[::-1]])
    return f"torch.einsum('{sides[0]},{sides[1]}->b{''.join(kept)}', {w.v}, {u})"


def lookup(w: Writer) -> str:
    router = f"F.linear({w.v}.flatten(1), {w.P(w.m, w.value[0].numel())})"
    chosen = w.pick(
        [
            f"{router}.argmax(-1)",
            f"({router}.argmax(-1) + 1) % {w.m}",
            f"{router}.topk(2, -1).indices",
            f"{router}.topk(2, -1).indices.flip(1)",
            f"{router}.argsort(-1)[:, :2]",
            f"{w.v}.argmax({w.d}) % {w.m}",
            f"({w.v} > 0).long().sum({w.d}) % {w.m}",
        ]
    )
    table = w.P(w.m, w.pick([2, 3, 4]))
    one_hot = f"F.one_hot({chosen}, {w.m}).to({w.v})"
    return w.pick(
        [
            f"F.embedding({chosen}, {table})",
            f"{table}[{chosen}]",
            f"{one_hot} @ {table}",
            f"{one_hot}",
            f"{w.v}.gather({w.d}, {w.v}.argmax({w.d}, keepdim=True))",
            f"{w.v} * {router}.softmax(-1).amax(-1).view(-1, *[1] * ({w.value.dim()} - 1))",
        ]
    )


def experts(w: Writer) -> str:
    units, hidden, count = w.value[0].numel(), w.pick([3, 4, 5]), w.pick([3, 4])
    flat = f"{w.v}.flatten(1)"
    router = f"F.linear({flat}, {w.P(count, units)})"
    up, down = w.P(count, units, hidden), w.P(count, hidden, w.m)
    chosen = w.pick([f"{router}.topk(2).indices", f"{router}.sort(-1).indices[:, 1:3]"])
    second = w.pick([chosen, chosen, chosen, f"{chosen}.flip(1)", f"({chosen} + 1) % {count}"])
    inner = f"torch.sin(torch.einsum('bd,bkdf->bkf', {flat}, {up}[{chosen}]))"
    mixed = w.pick([inner, inner, inner, f"{inner}.cumsum(1)", f"{inner}.flip(1)"])
    every = f"torch.sin(torch.einsum('bd,edf->bef', {flat}, {up}))"
    return w.pick(
        [
            f"torch.einsum('bkf,bkfo->bo', {mixed}, {down}[{second}])",
            f"torch.einsum('bkf,bkfo->bko', {mixed}, {down}[{second}])",
            f"torch.einsum('bef,efo,be->bo', {every}, {down}, {router}.softmax(-1))",
            f"torch.einsum('bef,be->bf', {every}, {router}.softmax(-1))",
            f"torch.bmm({every}.transpose(0, 1), {down}).transpose(0, 1)",
        ]
    )


def write_in_place(w: Writer) -> str:
    v, d = w.v, w.d
    source = f"{w.like()}.narrow({d}, 0, {w.k})"
    return w.pick(
        [
            f"{v}.clone().index_fill_({d}, torch.tensor([{w.k - 1}]), 0.5)",
            f"{v}.clone().index_copy_({d}, torch.arange({w.k}), {source})",
            f"{v}.clone().index_add_({d}, torch.arange({w.k}), {source})",
            f"{v}.slice_scatter({source}, {d}, 0, {w.k})",
            f"{v}.slice_scatter({source} * 2, {d}, {w.n - w.k}, {w.n})",
            f"{v}.select_scatter({v}.select({d}, 0), {d}, {w.k - 1})",
            f"torch.zeros_like({v}).scatter_add({d}, {v}.argsort({d}), {v})",
            f"(lambda z: (z.narrow({d}, 0, {w.k}).mul_(2.0), z)[1])({v}.clone())",
            f"(lambda z: (z.select({d}, {w.k - 1}).add_(1.0), z)[1])({v}.clone())",
            f"(lambda z: (z.transpose({d}, {w.e})[:, 0].zero_(), z)[1])({v}.clone())",
            f"(lambda z: (z.narrow({d}, 0, {w.k}).copy_({source}), z)[1])(torch.zeros_like({v}))",
            f"{v}.clone().masked_fill_({v} > 1, 1.0)",
        ]
    )


def recurrent(w: Writer) -> str:
    units, cells, gates = w.value.shape[-1], w.pick([2, 4]), {"gru": 3, "rnn_tanh": 1}
    kind = w.pick(list(gates))
    both = w.pick([False, True])
    weights = []
    for _ in range(2 if both else 1):
        rows = gates[kind] * cells
        weights += [w.P(rows, units), w.P(rows, cells), w.P(rows), w.P(rows)]
    state = f"{w.v}.new_zeros({2 if both else 1}, len(x), {cells})"
    how = f"True, 1, 0.0, False, {both}, True"
    return f"torch.{kind}({w.v}, {state}, [{', '.join(weights)}], {how})[{w.pick([0, 0, 1])}]"


STEPS: list[Step] = [
    linear, linear, linear, changed_weight, attention, grouped_queries, convolution, norm, view,
    view, view, parts, parts, parts, order, statistics, elements, elements, elements, product,
    lookup, experts, write_in_place, recurrent,
]  # fmt: skip


def write(pick: Pick, length: int) -> Program:
    """A program of at most so many operations."""
    w = Writer(pick)
    for _ in range(length):
        w.choose(pick([*w.values, *w.values[-1:] * 3]))
        try:
            expression = pick(STEPS)(w)
        except IndexError:  # nothing of that kind fits
            continue
        if w.line(expression) and pick([True, False]):
            w.line(f"torch.sin({w.values[-1]})")
    ends = [w.values[-1], *(name for name in w.values[:-1] if pick([True, False, False]))]
    flat = f"torch.cat([{', '.join(f'{name}.flatten(1)' for name in ends)}], 1)"
    width = eval(flat, w.space).shape[1]
    w.program.lines.append(f"y = F.linear({flat}, {w.P(CLASSES, width)})")
    return needed(w.program)
