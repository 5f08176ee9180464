"""Glyphs of the fonts that matplotlib ships: real pictures without a network.

Sixteen faces have Latin, Greek and Cyrillic; twelve of them also arrows and the pre-training
scripts. The other fonts there do not serve: the Computer Modern ones have private encodings, and
LastResort maps every code point to a placeholder box, which would poison the labels.

Each (face, code point) is rendered once; what a network sees are random views of the renderings
(`nlm.demo.augmentation`). The code points of pre-training and of the tasks are disjoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlm.demo._extras import require
from nlm.demo.augmentation import CANVAS, augment

# Regular, bold, slanted, bold slanted: the position in the row is the style of the face.
STYLES = ("regular", "bold", "italic", "bold italic")
_FAMILIES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
FACES = tuple(family + style for family, styles in _FAMILIES.items() for style in styles)

FONT_SIZE = 29
_PRETRAINING_CLASSES = 240
_SYMBOL_CLASSES = 24
_PRETRAINING_RANGES = (
    (0x250, 0x2AF),  # IPA
    (0x180, 0x24F),  # Latin extended B
    (0x460, 0x4FF),  # Cyrillic extended
    (0x531, 0x556),  # Armenian capitals
    (0x561, 0x586),  # Armenian
    (0x10D0, 0x10F0),  # Georgian
    (0x1401, 0x1676),  # Canadian syllabics
    (0xC0, 0xFF),  # Latin 1
)
_ARROWS = (0x2190, 0x21FF)
_OPERATORS = (0x2200, 0x22FF)
_FINAL_SIGMA = 0x3C2
_UPPER = list(range(0x41, 0x5B))
_LOWER = list(range(0x61, 0x7B))
_CYRILLIC = list(range(0x430, 0x450))
_GREEK = [code for code in range(0x3B1, 0x3CA) if code != _FINAL_SIGMA]


@dataclass(frozen=True)
class Glyphs:
    """Renderings of F faces and K code points, and the alphabets made of them.

    Attributes
    ----------
    code_points : int64 [K], ascending
    present : bool [F, K], whether the face has the code point
    pictures : uint8 [F, K, 32, 32], zero where it does not
    alphabets : name -> int64 [classes], the code points that are its classes
    """

    code_points: Tensor
    present: Tensor
    pictures: Tensor
    alphabets: dict[str, Tensor]

    def draw(
        self, alphabet: str, n: int, generator: torch.Generator, label: str = "code point"
    ) -> tuple[Tensor, Tensor]:
        """Draw n views: a class uniformly, then one of the faces that have it.

        ``label`` is "code point" (the class within the alphabet) or "style" (of the face).
        """
        codes = self.alphabets[alphabet]
        classes = torch.randint(len(codes), (n,), generator=generator)
        columns = torch.searchsorted(self.code_points, codes)[classes]
        rank = (torch.rand(n, generator=generator) * self._faces_having[columns]).long()
        faces = self._faces_of[columns, rank]
        inputs = augment(self.pictures[faces, columns], generator)
        return inputs, classes if label == "code point" else faces % len(STYLES)

    @cached_property
    def _faces_having(self) -> Tensor:
        return self.present.sum(0)  # [K]

    @cached_property
    def _faces_of(self) -> Tensor:
        """The faces of each code point, those that have it first: int64 [K, F]."""
        return torch.argsort((~self.present).byte(), dim=0, stable=True).T.contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """The plain tensors that `from_tensors` takes back."""
        alphabets = {f"alphabet.{name}": codes for name, codes in self.alphabets.items()}
        return {
            "code_points": self.code_points,
            "present": self.present,
            "pictures": self.pictures,
            **alphabets,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Glyphs":
        prefix = "alphabet."
        alphabets = {
            name.removeprefix(prefix): codes
            for name, codes in tensors.items()
            if name.startswith(prefix)
        }
        return cls(tensors["code_points"], tensors["present"], tensors["pictures"], alphabets)


def render() -> Glyphs:
    """Render every face and code point that the demo uses (two seconds)."""
    fonts = [_Font(face) for face in FACES]
    alphabets = _alphabets(fonts)
    codes = sorted({code for alphabet in alphabets.values() for code in alphabet})
    present = torch.tensor([[code in font.codes for code in codes] for font in fonts])
    pictures = np.zeros((len(fonts), len(codes), CANVAS, CANVAS), np.uint8)
    for face, column in present.nonzero().tolist():
        pictures[face, column] = fonts[face].picture(codes[column])
    return Glyphs(
        torch.tensor(codes),
        present,
        torch.from_numpy(pictures),
        {name: torch.tensor(alphabet) for name, alphabet in alphabets.items()},
    )


class _Font:
    """A face of matplotlib's: the code points it has, and their pictures."""

    def __init__(self, face: str) -> None:
        data = require("matplotlib", "matplotlib").get_data_path()
        path = Path(data, "fonts", "ttf", f"{face}.ttf")
        with require("fontTools.ttLib", "fonttools").TTFont(path, lazy=True) as font:
            self.codes = set(font.getBestCmap())
        self._font: Any = require("PIL.ImageFont", "pillow").truetype(str(path), FONT_SIZE)
        self._image: Any = require("PIL.Image", "pillow")
        self._draw: Any = require("PIL.ImageDraw", "pillow")

    def picture(self, code: int) -> np.ndarray:
        """The glyph, its ink centred on the canvas: uint8 [32, 32]."""
        image = self._image.new("L", (CANVAS, CANVAS), 0)
        pen = self._draw.Draw(image)
        left, top, right, bottom = pen.textbbox((0, 0), chr(code), font=self._font)
        corner = ((CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2)
        pen.text(corner, chr(code), fill=255, font=self._font)
        return np.asarray(image)


def _alphabets(fonts: list[_Font]) -> dict[str, list[int]]:
    """The classes of pre-training and of the tasks: the same on every machine with these fonts."""
    random = np.random.default_rng(7)

    def pick(ranges: Iterable[tuple[int, int]], faces: int, count: int) -> list[int]:
        candidates = [
            code
            for first, last in ranges
            for code in range(first, last + 1)
            if sum(code in font.codes for font in fonts) >= faces and _has_ink(fonts, code)
        ]
        return sorted(random.choice(candidates, size=count, replace=False).tolist())

    return {
        "pretraining": pick(_PRETRAINING_RANGES, 4, _PRETRAINING_CLASSES),
        "arrows": pick([_ARROWS], 9, _SYMBOL_CLASSES),
        "math": pick([_OPERATORS], 9, _SYMBOL_CLASSES),
        "upper": _UPPER,
        "lower": _LOWER,
        "letters": _UPPER + _LOWER,
        "cyrillic": _CYRILLIC,
        "greek": _GREEK,
    }


def _has_ink(fonts: list[_Font], code: int) -> bool:
    """Whether the first face that has the code point draws more than a dot or a blank."""
    first = next(font for font in fonts if code in font.codes)
    return bool(first.picture(code).sum() > 5 * 255)
