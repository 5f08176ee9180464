"""DARE and the consensus of TALL-masks against their formulas, written once more in numpy."""

import hashlib

import numpy as np
import pytest
import torch
from _networks import mlp
from merge.test_merge import _mergekit_ties, _peft_ties

import nlm
from nlm.ops.dare import random_words

DROP = 0.6
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}
BASE = mlp(9).state_dict()
EXPERTS = {task: mlp(seed).state_dict() for seed, task in enumerate(WEIGHTS)}


def kept(seed: int, task: str, name: str) -> np.ndarray:
    """Which entries are kept: what a seed means must not change between releases."""
    digest = hashlib.sha256(f"{seed}\0{task}\0{name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little") // 2
    words = random_words(key, 0, BASE[name].numel(), torch.device("cpu"))
    return (words.numpy() / 2**32 >= DROP).reshape(BASE[name].shape)


def vectors(seed: int, name: str, rescale: str) -> list[np.ndarray]:
    """The task vectors of one tensor, dropped and rescaled."""
    found = []
    for task, state in EXPERTS.items():
        vector = (state[name] - BASE[name]).numpy()
        left = vector * kept(seed, task, name)
        if rescale == "expected":
            left = left / (1 - DROP)
        elif rescale == "l1":
            left = left * np.abs(vector).sum() / (np.abs(left).sum() or 1)
        found.append(left)
    return found


@pytest.mark.parametrize("rescale", ["expected", "l1", "none"])
def test_dare_is_task_arithmetic_on_what_is_left(rescale: str) -> None:
    merged = nlm.merge(
        EXPERTS, BASE, "dare", drop=DROP, seed=3, rescale=rescale, scale=0.7, weights=WEIGHTS
    )
    for name, start in BASE.items():
        left = zip(WEIGHTS.values(), vectors(3, name, rescale), strict=True)
        expected = start.numpy() + 0.7 * sum(weight * vector for weight, vector in left)
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("dialect", "oracle"), [("peft", _peft_ties), ("mergekit", _mergekit_ties)]
)
def test_dare_ties_elects_among_what_is_left(dialect, oracle) -> None:
    merged = nlm.merge(
        EXPERTS, BASE, "dare_ties", drop=DROP, seed=4, scale=0.7, weights=WEIGHTS, dialect=dialect
    )
    for name, start in BASE.items():
        direction = oracle(vectors(4, name, "expected"), list(WEIGHTS.values()), 1.0)
        expected = start.numpy() + 0.7 * direction
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=2e-5, atol=2e-6)


def test_a_task_is_dropped_from_alike_whoever_else_is_there() -> None:
    one = {"0.weight": BASE["0.weight"]}
    alone = nlm.merge({"a": {n: EXPERTS["a"][n] for n in one}}, one, "dare", seed=1)
    turned = dict(reversed(BASE.items()))
    whole = nlm.merge(
        EXPERTS, turned, "dare", seed=1, weights=dict.fromkeys(EXPERTS, 0.0) | {"a": 1.0}
    )
    assert torch.equal(alone["0.weight"], whole["0.weight"])
    other = nlm.merge({"a": EXPERTS["a"]}, BASE, "dare", seed=2)
    assert not torch.equal(alone["0.weight"], other["0.weight"])


def test_dropping_all_of_a_small_tensor_leaves_the_base() -> None:
    base, expert = {"w": torch.ones(1)}, {"t": {"w": torch.full((1,), 3.0)}}
    for rescale in ("expected", "l1", "none"):
        merged = nlm.merge(expert, base, "dare", drop=1 - 2.0**-30, seed=0, rescale=rescale)
        assert merged["w"].item() == 1


@pytest.mark.parametrize("agreement", [1, 2, 3])
def test_consensus_keeps_what_enough_masks_have(agreement: int) -> None:
    limits = {"a": 0.6, "b": 0.5, "c": 1.5}
    merged = nlm.merge(
        EXPERTS, BASE, "consensus", agreement=agreement, mask_threshold=limits, scale=0.3,
        weights=WEIGHTS,
    )  # fmt: skip
    assert not merged.masks and not merged.base
    shares = []
    for name, start in BASE.items():
        base = start.double().numpy()
        states = {task: state[name].double().numpy() for task, state in EXPERTS.items()}
        total = sum(WEIGHTS[task] * (state - base) for task, state in states.items())
        count = sum(
            np.abs(state - base) > limits[task] * np.abs(state - base - total)
            for task, state in states.items()
        )
        expected = base + 0.3 * total * (count >= agreement)
        shares.append((count >= agreement).mean())
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert 0.01 < np.mean(shares) < 0.99


def test_consensus_of_one_is_its_mask() -> None:
    alone = {"a": EXPERTS["a"]}
    merged = nlm.merge(alone, BASE, "consensus", agreement=1)
    masked = nlm.merge(alone, BASE, "tall_mask").for_task("a")
    assert all(torch.equal(merged[name], masked[name]) for name in BASE)


def test_a_mask_is_an_eighth_of_a_byte_for_an_entry() -> None:
    merged = nlm.merge(EXPERTS, BASE, "tall_mask")
    for own in merged.masks.values():
        for name, mask in own.items():
            assert mask.dtype == torch.uint8 and mask.numel() == (BASE[name].numel() + 7) // 8
