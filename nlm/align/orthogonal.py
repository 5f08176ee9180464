"""Orthogonal matching: the continuous symmetries of a pre-norm model, found by Procrustes.

Both foundations are folded (:mod:`nlm.gauge`) and see the same inputs. With S = sum_k C_k / |C_k|
the centred cross-moments of a stream over all depths k (each in units of both models' spread), the
orthogonal map that brings B closest to A,

    Q = argmax tr(Q^T S) = U V^T,    S = U D V^T,

is one for the whole network (Schoenemann 1966); with LayerNorm on the complement of the all-ones
vector. The units inside heads likewise, with one map per head; heads are matched by what their best
maps are worth, tr D, which does not depend on the gauge that a head happens to be in. All other
groups (feed-forward units, query heads in their key head) are matched by the correlation of their
activations (:mod:`nlm.align.activations`), which does not depend on the gauge of the stream.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlm.align.activations import activation_matching
from nlm.align.assignment import best_assignment, matched
from nlm.align.result import AlignmentReport, AlignmentResult, Move
from nlm.checkpoint import read_kind, write_tensors
from nlm.checkpoint.texts import build, parse_json, whole
from nlm.gauge import Gauge, Rotation
from nlm.gauge.gauge import around_ones, complement_of_ones
from nlm.statistics import CrossMoments, Data, Forward, Mask, attention_mask, collect_cross_moments
from nlm.symmetry import Permutation, PermutationSpec
from nlm.symmetry.blocks import Block, blocks
from nlm.symmetry.permutation import check


@dataclass
class OrthogonalAlignment(AlignmentResult):
    """A permutation and a rotation of the second model's units.

    Attributes
    ----------
    permutation, report, similarity : as of an :class:`AlignmentResult`.
    rotation : group -> orthogonal float64 ``[*parent sizes, n, n]``, in the permuted order.
    gauge : what may be rotated, and how norms are folded.
    """

    rotation: Rotation
    gauge: Gauge

    def fold(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first model, or an expert of it, in the form with which the second is aligned.

        ``state_dict`` keeps its function, its norms become plain (:meth:`nlm.gauge.Gauge.fold`).
        """
        return self.gauge.fold(state_dict)

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The second model, or an expert of it, aligned with the first; its function is the same.

        Computed in float64, returned in the dtypes of ``state_dict``.
        """
        gauge = self.gauge
        wide = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in state_dict.items()
        }
        moved = gauge.apply(self.rotation, gauge.spec.apply(self.permutation, gauge.fold(wide)))
        return {name: moved[name].to(tensor.dtype) for name, tensor in state_dict.items()}

    def moves(self, spec: PermutationSpec) -> tuple[Move, Move]:
        """:meth:`fold` for the first model, :meth:`apply` for the second, of the same ``spec``."""
        return self.fold, self.apply

    def receiver(self, model: nn.Module) -> nn.Module:
        return self.gauge.untie(model)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Writes both to ``path`` as safetensors, the report and the gauge in the header.

        ``force`` replaces a file that is there.
        """
        tensors = {f"permutation.{name}": index for name, index in self.permutation.items()}
        tensors |= {f"rotation.{name}": q for name, q in self.rotation.items()}
        texts = {"report": asdict(self.report), "gauge": self.gauge.to_mapping()}
        header = {name: json.dumps(text) for name, text in texts.items()}
        write_tensors(path, tensors, {"nlm": type(self).__name__, **header}, force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "OrthogonalAlignment":
        """Reads what :meth:`save` wrote to ``path``.

        Raises
        ------
        DamagedFileError, ValueError
            The file is damaged, or holds something else.
        """
        tensors, metadata = read_kind(path, cls.__name__, "nlm.align")
        parts: dict[str, dict[str, Tensor]] = {"permutation": {}, "rotation": {}}
        with whole(path, cls.__name__, "nlm.align"):
            for name, tensor in tensors.items():
                part, _, group = name.partition(".")
                parts[part][group] = tensor
            report = build(AlignmentReport, parse_json(metadata["report"]))
            gauge = Gauge.from_mapping(parse_json(metadata["gauge"]))
            if lost := gauge.spec.groups.keys() - parts["permutation"].keys():
                raise ValueError(
                    f"nlm.align: an alignment has an index array for every group, got none for "
                    f"{', '.join(sorted(lost))}"
                )
            check(gauge.spec.groups, parts["permutation"])
            gauge.check(parts["rotation"])
        return cls(parts["permutation"], report, parts["rotation"], gauge)


def orthogonal_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    gauge: Gauge,
    data: Data,
    *,
    forward: Forward | None = None,
    mask: Mask | None = None,
    max_samples: int | None = None,
    stride: int = 1,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    device: torch.device | str | None = None,
    process_group: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> OrthogonalAlignment:
    """The rotation and permutation of ``model_b``'s units that align it with ``model_a``.

    Parameters
    ----------
    gauge : the continuous symmetries of both models (:func:`nlm.gauge.find`).
    data, forward, mask, max_samples, stride, max_tokens, seed, precision, device, process_group,
    progress : see :func:`activation_matching`; the data is walked twice, once for what rotates and
        once for the rest.

    Raises
    ------
    ValueError
        See :func:`nlm.align`; also a stream that no module's output shows.
    """
    started = time.perf_counter()
    spec = gauge.spec
    a, b = (_folded(gauge, model) for model in (model_a, model_b))
    places = _places(gauge)
    points = {module: spec.sites[module].dim for of in places.values() for module, _ in of}

    def report_batch(number: int) -> None:
        if progress is not None:
            progress(number, time.perf_counter() - started)

    walk: dict[str, Any] = {
        "forward": forward, "mask": mask or attention_mask, "max_samples": max_samples,
        "stride": stride, "max_tokens": max_tokens, "seed": seed, "precision": precision,
        "device": device, "process_group": process_group,
    }  # fmt: skip
    moments = collect_cross_moments(
        a, b, points, data, progress=report_batch, caller="nlm.align", **walk
    )
    seen = {
        group: torch.stack([_similarity(moments[module], block) for module, block in of]).sum(0)
        for group, of in places.items()
    }
    permutation: Permutation = {}
    agreement: dict[str, float] = {}
    for head in dict.fromkeys(parent for group in places for parent in spec.groups[group].parents):
        inside = [group for group in seen if spec.groups[group].parents == (head,)]
        worth = torch.stack([torch.linalg.svdvals(seen[group]).sum(-1) for group in inside]).sum(0)
        if head in seen:
            worth += seen.pop(head)
        same = torch.arange(len(worth))
        permutation[head] = best_assignment(worth) if head in spec.free else same
        count = sum(len(places[group]) for group in (head, *inside) if group in places)
        agreement[head] = float(matched(worth, permutation[head]).sum()) / count
        for group in inside:
            seen[group] = seen[group][same, permutation[head]]
    rotation: Rotation = {}
    for group, similarity in seen.items():
        rotation[group], value = _nearest(similarity, gauge.keeps_ones(group))
        agreement[group] = float(value.sum()) / len(places[group])
    samples = {group: int(moments[places[group][0][0]].count) for group in seen}
    rest = [group for group in spec.free if group not in rotation and group not in permutation]
    permutation = spec.compose(permutation, {})
    report = AlignmentReport("orthogonal", [], agreement, 0.0, samples)
    if rest:
        b.load_state_dict(gauge.apply(rotation, spec.apply(permutation, b.state_dict())))
        found = activation_matching(a, b, spec.restrict(rest), data, progress=progress, **walk)
        permutation = spec.compose(permutation, found.permutation)
        agreement |= {group: found.report.correlation[group] for group in rest}
        samples |= found.report.samples
        report.by_weights = found.report.by_weights
        report.histogram = found.report.histogram
    report.seconds = time.perf_counter() - started
    return OrthogonalAlignment(permutation, report, rotation, gauge)


def _folded(gauge: Gauge, model: nn.Module) -> nn.Module:
    """A copy of a model with folded weights."""
    folded = gauge.untie(model)
    folded.load_state_dict(gauge.fold(model.state_dict()))
    return folded


def _places(gauge: Gauge) -> dict[str, list[tuple[str, Block]]]:
    """Where each group that rotates is seen, and the heads around it: modules and their blocks.

    A stream is seen behind its norms (where these are no modules, wherever it is whole). What is
    seen nowhere, or stands in heads of heads, is left to permutations.
    """
    spec = gauge.spec
    seen = [
        (module, block)
        for module, site in spec.sites.items()
        for block in blocks((site.layout,), (site.layout.size,), partial=True)
    ]
    found: dict[str, list[tuple[str, Block]]] = {}
    for group, stream in gauge.streams.items():
        whole = [each for each in seen if [axis.group for axis in each[1].axes] == [group]]
        found[group] = [each for each in whole if each[0] in stream.shown] or whole
        if not whole:
            raise ValueError(
                f"nlm.align: a stream is seen at the output of a module, got none that shows "
                f"{group!r} ({spec.groups[group].origin})"
            )
    for group in gauge.inner:
        parents = spec.groups[group].parents
        if len(parents) > 1 or any(spec.groups[parent].parents for parent in parents):
            continue
        places = [each for each in seen if _standing(each[1]) == {group, *parents}]
        if places:
            found[group] = places
            for head in parents:
                found[head] = [each for each in seen if _standing(each[1]) == {head, None}]
    return {group: places for group, places in found.items() if places}


def _standing(block: Block) -> set[str | None]:
    return {axis.group for axis in block.axes}


def _similarity(cross: CrossMoments, block: Block) -> Tensor:
    """The cross-moments of a block's units, [*heads in A, *in B, units in A, units in B].

    In units of both models' spread. What stands in order is compared position by position.
    """
    count = len(block.axes)
    steps = cross.comoment.stride()
    view = cross.comoment.as_strided(
        [axis.size for axis in block.axes] * 2,
        [axis.stride * step for step in steps for axis in block.axes],
        block.start[0] * sum(steps),
    )
    in_b = [number + count * (axis.group is not None) for number, axis in enumerate(block.axes)]
    out = [
        label
        for number, axis in enumerate(block.axes)
        if axis.group is not None
        for label in (number, number + count)
    ]
    spread = (block.view(cross.x.m2).sum() * block.view(cross.y.m2).sum()).sqrt()
    similarity = torch.einsum(view, [*range(count), *in_b], out)
    return (similarity / torch.where(spread > 0, spread, 1.0)).cpu()


def _nearest(similarity: Tensor, keeps_ones: bool) -> tuple[Tensor, Tensor]:
    """The orthogonal maps of the greatest similarity, and what they are worth."""
    if keeps_ones:
        basis = complement_of_ones(similarity.shape[-1])
        similarity = basis.mT @ similarity @ basis
    u, worth, v = torch.linalg.svd(similarity)
    return around_ones(u @ v, keeps_ones), worth.sum(-1)
