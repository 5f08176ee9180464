"""The eight tasks of the demo, in the order in which they are merged, and the pre-training task.

digits     handwritten digits of scikit-learn
upper      capital Latin letters
cyrillic   small Cyrillic letters
arrows     24 arrows
greek      small Greek letters
math       24 mathematical operators
lower      small Latin letters
style      regular, bold, italic or bold italic, of Latin letters: another kind of question

The splits of a task share nothing that could leak: handwritten digits are split by image
(1000, 200 and 597) and glyphs by draw, each split with random numbers of its own. `assert_disjoint`
checks it by content.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nlm.demo._extras import require
from nlm.demo.augmentation import CANVAS, augment, stream
from nlm.demo.glyphs import STYLES, Glyphs

TASKS = ("digits", "upper", "cyrillic", "arrows", "greek", "math", "lower", "style")

_ALPHABETS = {name: name for name in TASKS[1:-1]} | {"style": "letters"}
_DIGIT_SPLITS = {"train": 1000, "validation": 200, "test": 597}
_DIGIT_STRENGTH = 0.6
_DIGIT_SIDE = 26


@dataclass(frozen=True)
class Split:
    """Labelled images: inputs float32 [n, 1, 16, 16], labels int64 [n]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = 500) -> list[tuple[Tensor, Tensor]]:
        """The images in order as batches (inputs, labels)."""
        return list(zip(self.inputs.split(size), self.labels.split(size), strict=True))


@dataclass(frozen=True)
class Task:
    """A classification task: its classes by name, and four splits that share no image."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    calibration: Tensor  # [n, 1, 16, 16], no labels
    test: Split

    def images(self) -> dict[str, Tensor]:
        """The inputs of each split."""
        return {
            "train": self.train.inputs,
            "validation": self.validation.inputs,
            "calibration": self.calibration,
            "test": self.test.inputs,
        }


@dataclass(frozen=True)
class Pretraining:
    """The task that both foundations were trained on; their training draws are not kept."""

    classes: tuple[str, ...]
    validation: Split
    calibration: Tensor  # [n, 1, 16, 16], no labels
    test: Split


@dataclass(frozen=True)
class Sizes:
    """Images per split. Handwritten digits have all 200 and 597 images to validate and to test."""

    train: int = 4000
    validation: int = 300
    calibration: int = 512
    test: int = 800


def make_task(name: str, glyphs: Glyphs, seed: int, sizes: Sizes) -> Task:
    """Draw the splits of one task; other seeds draw other images."""
    if name not in TASKS:
        raise ValueError(f"nlm.demo: a task must be one of {', '.join(TASKS)}, got {name!r}")

    def draw(split: str, n: int) -> Split:
        generator = stream(seed, "task", name, split)
        if name == "digits":
            return _draw_digits(split, n, generator)
        label = "style" if name == "style" else "code point"
        return Split(*glyphs.draw(_ALPHABETS[name], n, generator, label))

    if name == "digits":
        classes = tuple("0123456789")
    elif name == "style":
        classes = STYLES
    else:
        classes = _characters(glyphs, _ALPHABETS[name])
    return Task(
        name,
        classes,
        train=draw("train", sizes.train),
        validation=draw("validation", sizes.validation),
        calibration=draw("calibration", sizes.calibration).inputs,
        test=draw("test", sizes.test),
    )


def make_pretraining(glyphs: Glyphs, seed: int, sizes: Sizes) -> Pretraining:
    """Draw the held-out splits of the pre-training task."""

    def draw(split: str, n: int) -> Split:
        return Split(*glyphs.draw("pretraining", n, stream(seed, "pretraining", split)))

    return Pretraining(
        _characters(glyphs, "pretraining"),
        validation=draw("validation", sizes.validation),
        calibration=draw("calibration", sizes.calibration).inputs,
        test=draw("test", sizes.test),
    )


def handwritten() -> dict[str, tuple[Tensor, Tensor]]:
    """The handwritten digits as (uint8 [n, 32, 32], labels) per split: disjoint images."""
    pictures, labels = _load_digits()
    order = torch.from_numpy(np.random.default_rng(12345).permutation(len(labels)))
    parts = order.split(list(_DIGIT_SPLITS.values()))
    return {
        split: (pictures[part], labels[part])
        for split, part in zip(_DIGIT_SPLITS, parts, strict=True)
    }


def assert_disjoint(splits: Mapping[str, Tensor]) -> None:
    """Raise where two splits hold an image of the same bytes."""
    owner: dict[bytes, str] = {}
    for split, images in splits.items():
        for image in images.numpy():
            digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            first = owner.setdefault(digest, split)
            if first != split:
                raise ValueError(
                    "nlm.demo: splits must be disjoint, "
                    f"got the same image in {first!r} and {split!r}"
                )


def _draw_digits(split: str, n: int, generator: torch.Generator) -> Split:
    """Views of handwritten digits: each held-out image once, training images n times in all.

    Calibration images are views of training images: they are never shown with their labels.
    """
    pictures, labels = handwritten()["train" if split == "calibration" else split]
    if split in ("train", "calibration"):
        chosen = torch.randint(len(labels), (n,), generator=generator)
    else:
        chosen = torch.arange(min(n, len(labels)))
    return Split(augment(pictures[chosen], generator, _DIGIT_STRENGTH), labels[chosen])


@cache
def _load_digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits enlarged from 8x8 (values 0..16) to the canvas: uint8 [1797, 32, 32]."""
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    large = F.interpolate(small, size=(_DIGIT_SIDE, _DIGIT_SIDE), mode="bilinear")
    pictures = F.pad(large, [(CANVAS - _DIGIT_SIDE) // 2] * 4)
    return (pictures * 255).round().byte().squeeze(1), torch.tensor(digits.target)


def _characters(glyphs: Glyphs, alphabet: str) -> tuple[str, ...]:
    return tuple(map(chr, glyphs.alphabets[alphabet].tolist()))
