"""A tensor in a file: its name, type and shape, and where its bytes lie."""

from dataclasses import dataclass
from pathlib import Path

from nlm._names import is_statistic

#: Bytes of an element, by the names of the format.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

#: PyTorch's names of them.
TORCH_TYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: ``begin`` and ``end`` are its bytes, counted from the file's start.

    ``name``, ``shape`` and ``dtype`` are its own, the last as safetensors writes it ("BF16").

    ``order`` names the axes as they lie in a PyTorch file, outermost first, where that is another
    order than theirs ("channels last").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    order: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return (self.end - self.begin) // ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """How many bytes it takes in its file."""
        return self.end - self.begin

    @property
    def is_float(self) -> bool:
        """Whether its numbers are floating and 16 bits wide or more."""
        return self.dtype in ("F16", "BF16", "F32", "F64")

    @property
    def is_weight(self) -> bool:
        """Whether it is merged: no statistic and no integer."""
        return self.is_float and not is_statistic(self.name)

    def type_as(self, dtype: str | None) -> str:
        """Its type in a result whose weights have the type ``dtype``, or their own where None."""
        return dtype if dtype and self.is_weight else self.dtype
