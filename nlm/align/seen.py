"""What two models' modules show of their units: correlations over the same inputs."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nlm._state_dict import check_weight
from nlm.align.descent import Descent
from nlm.align.similarity import Correlation
from nlm.align.variants import stream_sites, streams
from nlm.statistics import Data, Mask, attention_mask, collect_cross_moments
from nlm.symmetry import Layout, PermutationSpec, Ref, Site
from nlm.symmetry.blocks import Block, blocks
from nlm.symmetry.layout import product
from nlm.symmetry.permutation import Groups, is_free


@dataclass(frozen=True)
class Seen:
    """The modules of two models under comparison.

    Attributes
    ----------
    comparisons : of every module that shows a group.
    samples : group that is shown -> positions that its statistics saw.
    """

    comparisons: list[Correlation]
    samples: dict[str, int]


def correlate(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Data,
    *,
    observe: Mapping[str, str | tuple[str, int]] | None = None,
    residual: str = "all",
    mask: Mask | None = None,
    progress: Callable[[int, float], None] | None = None,
    **walk: Any,
) -> Seen:
    """The correlations of the units that modules show, streamed over data.

    Parameters
    ----------
    observe, residual, mask, progress : see :func:`nlm.align.activation_matching`.
    walk : see :func:`nlm.statistics.collect_cross_moments`.

    Raises
    ------
    ValueError, TypeError
        See :func:`nlm.align.activation_matching`.
    """
    started = time.perf_counter()
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

    found = Seen([], {})
    if not points:
        return found
    moments = collect_cross_moments(
        model_a, model_b, points, data, mask=mask or attention_mask, progress=report_batch,
        caller="nlm.align", **walk,
    )  # fmt: skip
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
        found.comparisons.append(Correlation(correlation, layout, _used(spec, layout, groups)))
        for block in found.comparisons[-1].blocks:
            found.samples.update(dict.fromkeys(standing(spec.groups, block), count))
    return found


def by_correlation(groups: Groups, comparisons: Sequence[Correlation]) -> Descent:
    """The best descent on correlations alone: from the order as it is; where groups of one parent
    stand side by side at some module (queries of a key, and the units of both), also from where
    other modules lead.

    There those that other modules show come first, then the rest with these in place.
    """
    descent = Descent(groups, comparisons)
    descent.run()
    if all(_is_chain(groups, block) for seen in comparisons for block in seen.blocks):
        return descent
    clear = [seen.where(lambda block: _is_chain(groups, block)) for seen in comparisons]
    shown = {name for seen in clear for block in seen.blocks for name in standing(groups, block)}
    first = Descent(groups, clear)
    first.run()
    other = Descent(groups, comparisons, first.permutation)
    other.run(but=shown)
    other.run()
    return max(descent, other, key=lambda each: each.objective[-1])


def _is_chain(groups: Groups, block: Block) -> bool:
    """Whether of any two groups of a block one is inside the other."""
    return all(
        one in groups[other].parents or other in groups[one].parents
        for one, other in itertools.combinations(standing(groups, block), 2)
    )


def standing(groups: Groups, block: Block) -> set[str]:
    """The groups that may move of a block."""
    return {
        axis.group for axis in block.axes if axis.group is not None and is_free(groups, axis.group)
    }


def innermost(groups: Groups, block: Block) -> set[str]:
    """Those of them that are around no other."""
    found = standing(groups, block)
    return found - {parent for name in found for parent in groups[name].parents}


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
        outer = {
            parent for name in standing(spec.groups, block) for parent in spec.groups[name].parents
        }
        complete = all(block.holds(parent) for parent in outer)
        if complete and not innermost(spec.groups, block).isdisjoint(groups):
            found.append(block)
    return found
