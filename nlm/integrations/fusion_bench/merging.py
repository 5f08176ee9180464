"""The host's merges of task vectors, in memory of about the models themselves."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, auto_register_config
from torch import Tensor, nn

import nlm.ops  # noqa: F401  (registers the operators)
from nlm._names import is_statistic
from nlm._state_dict import StateDict, check_alike, count_not_finite, place_of
from nlm.integrations.fusion_bench.pools import WHERE, module_of, own_module, pool_of, state_of
from nlm.merge import merge
from nlm.merge.linear import alike, computable
from nlm.ops import magnitude_threshold

_MERGES = ("sum", "mean", "max")
_BASE = "_pretrained_"


@auto_register_config
class NlmTies(BaseAlgorithm):
    """TIES-Merging as the host has it: one threshold for a whole task vector.

    Of each task vector the ``threshold`` percent of the largest entries are kept, and the next
    one; the sign of the sum of what is kept is elected, where it is 0 that of most entries, and
    those that have it are added, averaged, or the largest is taken. float32 results are the host's,
    bit by bit for two models. But for: running statistics, which are no task vectors: they are the
    models' mean; integer entries, which are the base's; narrow types, which are computed in
    float32 and rounded once. The models of the pool stay as they are.

    Parameters
    ----------
    scaling_factor : on the merged task vector.
    threshold : percent; a number up to 1 is a share.
    remove_keys : entries that are the base's in the result.
    merge_func : "sum", "mean" or "max".

    References
    ----------
    Yadav et al.: TIES-Merging, arXiv:2306.01708.
    """

    def __init__(
        self,
        scaling_factor: float = 0.3,
        threshold: float = 20,
        remove_keys: Sequence[str] | None = None,
        merge_func: str = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """The merged model, of the class of the pool's "_pretrained_"."""
        pool = pool_of(modelpool)
        if self.merge_func not in _MERGES:
            raise ValueError(
                f"{WHERE}: merge_func is one of {', '.join(_MERGES)}, got {self.merge_func!r}"
            )
        share = self.threshold / 100 if self.threshold > 1 else self.threshold
        if not 0 <= share <= 1:
            raise ValueError(f"{WHERE}: the threshold is 0 to 100 percent, got {self.threshold}")
        start = _pretrained(pool)
        base, experts = state_of(start), _experts(pool)
        check_alike(WHERE, {_BASE: base, **experts})
        removed = set(self.remove_keys or ())
        floating = [n for n in base if n not in removed and base[n].is_floating_point()]
        merged = [name for name in floating if not is_statistic(name)]
        if not merged:
            raise ValueError(f"{WHERE}: there is at least one entry to merge, got none")
        limits = torch.stack([_limit(expert, base, merged, share) for expert in experts.values()])
        module = own_module(pool, _BASE, start)
        if module is start:  # what is written twice is read from a copy
            places = Counter(place_of(tensor) for tensor in base.values())
            base = {n: x.clone() if places[place_of(x)] > 1 else x for n, x in base.items()}
        target, states = _Target(module), list(experts.values())
        self._write(target, base, states, merged, limits)
        for name in floating:
            if is_statistic(name):
                target.put(name, torch.stack([x[name] for x in states]).double().mean(0))
            if bad := count_not_finite(target[name]):
                raise ValueError(
                    f"{WHERE}: merged weights are finite, got {bad} NaN or inf in {name!r} "
                    f"({target[name].dtype}) at scaling_factor {self.scaling_factor}"
                )
        return module

    def _write(
        self,
        target: "_Target",
        base: StateDict,
        experts: list[StateDict],
        merged: list[str],
        limits: Tensor,
    ) -> None:
        """Merges one entry after the other; those with votes of 0 again, where most signs are -."""
        balance = 0
        contested: dict[str, Tensor] = {}
        for name in merged:
            start, *models = (computable(state[name]) for state in (base, *experts))
            together = alike(start, *models)
            found, ballot, _ = torch.ops.nlm.sign_merge.default(
                together[0], together[1:], limits, [1.0] * len(models), self._scale(), "global"
            )
            signs, ties = ballot.tolist()
            if self.merge_func != "mean":
                found = self._elected(together, limits, 1)
            if ties:
                contested[name] = start.clone()
            target.put(name, found)
            balance += signs
        for name, start in contested.items() if balance <= 0 else ():
            models = [computable(state[name]) for state in experts]
            target.put(name, self._elected(alike(start, *models), limits, balance))

    def _scale(self) -> float:
        return float(self.scaling_factor)

    def _elected(self, models: Sequence[Tensor], limits: Tensor, balance: int) -> Tensor:
        """An entry of the base and the others merged, with this sign where a vote is 0."""
        if self.merge_func == "max":
            wide = torch.promote_types(models[0].dtype, torch.float32)
            start, *others = (x.to(wide) for x in models)
            kept = torch.stack([x - start for x in others])
            kept *= kept.abs() >= limits.to(wide).view(-1, *[1] * start.dim())
            vote = kept.sum(0).sign_()
            vote.masked_fill_(vote == 0, (balance > 0) - (balance < 0))
            return start + self._scale() * ((kept * vote).clamp_(min=0).amax(0) * vote)
        dialect = {"mean": "global", "sum": "mergekit_sum"}[self.merge_func]
        start, *others = models if balance > 0 else (-x for x in models)  # + where a vote is 0
        found, _, _ = torch.ops.nlm.sign_merge.default(
            start, others, limits, [1.0] * len(others), self._scale(), dialect
        )
        return found if balance > 0 else -found


class _Target:
    """The entries of a module, to be written; parameters that stand alone are replaced by what is
    new, not overwritten: the pages of a file are not copied only to be written over.
    """

    def __init__(self, module: nn.Module) -> None:
        self._state = module.state_dict()
        places = Counter(place_of(tensor) for tensor in self._state.values())
        self._alone = {n: x for n, x in module.named_parameters() if places[place_of(x)] == 1}

    def __getitem__(self, name: str) -> Tensor:
        return self._alone[name].data if name in self._alone else self._state[name]

    def put(self, name: str, found: Tensor) -> None:
        old = self[name]
        if name in self._alone and (found.dtype, found.device) == (old.dtype, old.device):
            self._alone[name].data = found
        else:
            old.copy_(found)


@auto_register_config
class NlmTallMask(BaseAlgorithm):
    """TALL-masks on the sum of the task vectors: a model for each task.

    Task t keeps the merged entries where |theta_t - theta_0| > lambda |theta_t - theta|, as the
    host's ``generate_task_masks`` in ``method.tall_mask.utils`` and the paper define it. The host's
    own algorithm compares with theta_0 in place of theta_t - theta_0, and so keeps other entries.

    Parameters
    ----------
    tall_mask_lambda : one for all models.

    References
    ----------
    Wang et al.: Localizing Task Information, arXiv:2405.07813.
    """

    def __init__(self, tall_mask_lambda: float = 0.6, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @torch.no_grad()
    def run(self, modelpool: Any) -> dict[str, Any]:
        """``{"models": {name: module}, "metadata": None}``, as the host's program evaluates it."""
        pool = pool_of(modelpool)
        start, experts = _pretrained(pool), _experts(pool)
        found = merge(
            experts, state_of(start), "tall_mask", mask_threshold=float(self.tall_mask_lambda)
        )
        models = {}
        for name in experts:
            models[name] = module_of(start)
            models[name].load_state_dict(found.for_task(name), strict=isinstance(start, nn.Module))
        return {"models": models, "metadata": None}


def _pretrained(pool: Any) -> Any:
    if not pool.has_pretrained:
        raise ValueError(
            f"{WHERE}: task vectors start from a model {_BASE!r} of the pool, got "
            f"{', '.join(pool.all_model_names)}"
        )
    return pool.load_model(_BASE)


def _experts(pool: Any) -> dict[str, StateDict]:
    if not pool.model_names:
        raise ValueError(f"{WHERE}: there is at least one model to merge, got an empty pool")
    return {name: state_of(pool.load_model(name)) for name in pool.model_names}


def _limit(expert: StateDict, base: StateDict, names: list[str], share: float) -> Tensor:
    """The least magnitude that is kept, of one model."""
    models = [computable(expert[name]) for name in names]
    starts = [computable(base[name]) for name in names]
    entries = sum(x.numel() for x in models)
    kept = int(entries * share) + 1
    if kept > entries:
        return torch.tensor(0.0, device=models[0].device)
    return magnitude_threshold(models, kept, starts)
