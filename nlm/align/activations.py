"""Activation matching: units are matched by the correlation of what they compute.

Both models see the same inputs; for every group the signed correlation matrix of its units is
collected in one streamed pass (nothing is kept but moments), and linear assignments maximise the
sum of the matched correlations (Li et al. 2015, arXiv:1511.07543; Ainsworth, Hayase and Srinivasa,
arXiv:2209.04836, section 3.1). Signed, because a unit matched with its negative would be averaged
away. A group is solved together
with the units inside it (:mod:`nlm.align.nested`); what is seen at different modules is
independent. Groups that no module shows (the heads of a projection that is a bare parameter,
experts in one stacked tensor) are matched by their weights then, with all others in place; where
that is every group of a traced network, the whole network is.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from nlm._state_dict import check_weight
from nlm.align.descent import Descent
from nlm.align.result import AlignmentReport, AlignmentResult, histograms, means
from nlm.align.similarity import Correlation
from nlm.align.variants import restricted, stream_sites, streams
from nlm.align.weights import weight_matching
from nlm.statistics import Data, Forward, Mask, attention_mask, collect_cross_moments
from nlm.symmetry import Layout, PermutationSpec, Ref, Site
from nlm.symmetry.blocks import Block, blocks
from nlm.symmetry.layout import product


def activation_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Data,
    *,
    observe: Mapping[str, str | tuple[str, int]] | None = None,
    heads: str = "matched",
    residual: str = "last",
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    stride: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    device: torch.device | str | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> AlignmentResult:
    """The permutation of ``model_b``'s units whose activations correlate best with ``model_a``'s.

    Parameters
    ----------
    data : a re-iterable of batches; a few hundred samples suffice.
    observe : group -> name of the module whose output shows it; by default the last one that
        carries nothing else but its parents, after the activation function. Or (name, dimension)
        for a module of which the specification says nothing: the group stands there alone, or as
        the last factor behind its parents (heads x units).
    heads : "matched": by what their units are worth, which are matched inside each; "monotonic":
        the order of heads is kept; "identity": that of their units too. Experts alike.
    residual : where residual streams are seen, which many modules write and read: "last" (what
        ``observe`` would be), "first" or "all" of their norms (the mean correlation); "identity":
        they stay in order. A permuted copy of a model comes back only with them; of transformers
        trained apart the average was better without (barrier 1.6 against 1.9, 2.1 unaligned),
        and better still with them rotated (:func:`orthogonal_matching`).
    forward, max_samples, device : how a batch is run, ``forward(model, batch)``, how many samples
        are used, and where.
    mask : ``mask(batch)`` says which positions count (:mod:`nlm.statistics.positions`); by default
        the attention mask of a batch by name, where it has one. ``lambda batch: None``: all count.
        Special tokens count; :func:`nlm.statistics.tokens_except` leaves them out.
    stride, max_tokens, seed : one position of every ``stride`` is taken, and at most ``max_tokens``
        of a batch at each module, drawn evenly: the same in both models.
    precision : of the products of activations, see :func:`nlm.ops.cross_moments_`.
    progress : called after each batch with its number and the seconds so far (where no module
        shows any group as in :func:`weight_matching`); what it raises cancels.

    Raises
    ------
    ValueError
        See :func:`nlm.align`; also an unknown variant, an unknown group in ``observe`` or one that
        is not seen there, an output of another size than the group, fewer than two positions, or a
        hand-written specification that names no module, without ``observe``.
    """
    started = time.perf_counter()
    whole, spec = spec, restricted(spec, heads, residual)
    for who, model in (("model_a", model_a), ("model_b", model_b)):
        state = model.state_dict()
        spec.check_state_dict(state)
        for name, tensor in state.items():
            check_weight("nlm.align", who, name, tensor)
    sites = _sites(spec, observe or {}, residual)
    points: dict[str, int] = {}
    for (module, dim, _), groups in sites.items():
        if points.setdefault(module, dim) != dim:
            raise ValueError(
                f"nlm.align: a module is observed on one dimension, got {points[module]} and {dim} "
                f"of {module!r} (for {groups[0]!r})"
            )

    def report_batch(number: int) -> None:
        if progress is not None:
            progress(number, time.perf_counter() - started)

    moments = {}
    if points:
        moments = collect_cross_moments(
            model_a, model_b, points, data, forward=forward, mask=mask or attention_mask,
            max_samples=max_samples, stride=stride, max_tokens=max_tokens, seed=seed,
            precision=precision, device=device, progress=report_batch, caller="nlm.align",
        )  # fmt: skip
    comparisons: list[Correlation] = []
    samples: dict[str, int] = {}
    for (module, _, layout), groups in sites.items():
        seen = moments[module]
        count = int(seen.count)
        if count < 2:
            raise ValueError(
                f"nlm.align: a correlation needs at least two positions, got {count} for group "
                f"{groups[0]!r}"
            )
        correlation = seen.correlation().cpu()
        if correlation.shape != (layout.size, layout.size):
            raise ValueError(
                f"nlm.align: a group is observed on a dimension of its size, got "
                f"{list(correlation.shape)} for {groups[0]!r} of {layout.size} units at {module!r}"
            )
        comparisons.append(Correlation(correlation, layout, _used(spec, layout, groups)))
        for block in comparisons[-1].blocks:
            samples |= dict.fromkeys(_standing(spec, block), count)
    descent = _best_descent(spec, comparisons)
    permutation, similarity = descent.permutation, descent.agreement()
    objective = descent.objective[-1:]
    unseen = [group for group in spec.free if group not in samples]
    if unseen:
        in_order = spec.apply(permutation, model_b.state_dict())
        rest = weight_matching(
            model_a.state_dict(), in_order, spec.restrict(unseen),
            progress=None if points else progress,
        )  # fmt: skip
        permutation = spec.compose(permutation, rest.permutation)
        similarity |= {group: rest.similarity[group] for group in unseen}
        objective = objective if points else rest.report.objective
    report = AlignmentReport(
        "activations",
        objective,
        means(similarity),
        time.perf_counter() - started,
        samples,
        by_weights=unseen,
        histogram=histograms(similarity),
    )
    return AlignmentResult(whole.compose(permutation, {}), report, similarity=similarity)


def _best_descent(spec: PermutationSpec, comparisons: list[Correlation]) -> Descent:
    """From the order as it is; where groups of one parent stand side by side at some module
    (queries of a key, and the units of both), also from where other modules lead, and the better.

    There those that other modules show come first, then the rest with these in place.
    """
    descent = Descent(spec.groups, comparisons)
    descent.run()
    if all(_is_chain(spec, block) for seen in comparisons for block in seen.blocks):
        return descent
    clear = [seen.where(lambda block: _is_chain(spec, block)) for seen in comparisons]
    shown = {name for seen in clear for block in seen.blocks for name in _standing(spec, block)}
    first = Descent(spec.groups, clear)
    first.run()
    other = Descent(spec.groups, comparisons, first.permutation)
    other.run(but=shown)
    other.run()
    return max(descent, other, key=lambda each: each.objective[-1])


def _is_chain(spec: PermutationSpec, block: Block) -> bool:
    """Whether of any two groups of a block one is inside the other."""
    return all(
        one in spec.groups[other].parents or other in spec.groups[one].parents
        for one, other in itertools.combinations(_standing(spec, block), 2)
    )


def _sites(
    spec: PermutationSpec, observe: Mapping[str, str | tuple[str, int]], residual: str
) -> dict[tuple[str, int, Layout], list[str]]:
    """The modules to observe with the dimension of their output and its layout, and what is seen.

    What is written as (module, dimension) is taken as it is, a group inside others as the product
    of these and itself. Groups that no module shows are left out; where a hand-written
    specification (one without outputs) names no module at all, the caller has to.
    """
    if unknown := [group for group in observe if group not in spec.groups]:
        raise ValueError(
            f"nlm.align: what is observed are groups of the specification "
            f"({', '.join(spec.groups)}), got {', '.join(map(repr, unknown))}"
        )
    chosen: dict[str, Sequence[str | tuple[str, int]]] = {
        group: [module] for group, module in spec.observation_sites().items()
    }
    if residual in ("first", "all"):
        for stream in streams(spec):
            found = stream_sites(spec, stream)
            chosen[stream] = found[:1] if residual == "first" else found
    chosen |= {group: [place] for group, place in observe.items()}
    sites: dict[tuple[str, int, Layout], list[str]] = {}
    for group, place in ((name, each) for name in spec.free for each in chosen.get(name, ())):
        if isinstance(place, tuple):
            chain = (*spec.groups[group].parents, group)
            layout = product(*(Ref(name, spec.groups[name].size) for name in chain))
            sites.setdefault((*place, layout), []).append(group)
            continue
        site = spec.sites.get(place)
        if site is not None and _used(spec, site.layout, [group]):
            sites.setdefault((place, site.dim, site.layout), []).append(group)
        elif group in observe:
            raise _not_seen(group, place, site)
    if spec.free and not sites and not spec.outputs:
        raise _not_seen(next(iter(spec.free)), None, None)
    return sites


def _not_seen(group: str, place: str | None, site: Site | None) -> ValueError:
    return ValueError(
        f"nlm.align: a group is observed where it stands with its parents on a dimension of a "
        f"module's output (or at observe={{group: (module, dimension)}}), got "
        f"{'no module' if site is None else repr(str(site.layout))} for {group!r} at {place!r}"
    )


def _used(spec: PermutationSpec, layout: Layout, groups: list[str]) -> list[Block]:
    """The blocks of a module's output in which some groups are the innermost ones."""
    found = []
    for block in blocks((layout,), (layout.size,), partial=True):
        standing = _standing(spec, block)
        outer = {parent for group in standing for parent in spec.groups[group].parents}
        complete = all(block.holds(parent) for parent in outer)
        if complete and not (standing - outer).isdisjoint(groups):
            found.append(block)
    return found


def _standing(spec: PermutationSpec, block: Block) -> set[str]:
    return {axis.group for axis in block.axes if axis.group in spec.free}
