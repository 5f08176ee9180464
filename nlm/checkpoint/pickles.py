"""What PyTorch's own files hold (``torch.save``), and where: they are merged as they lie.

Such a file is a zip archive of a pickle and, not compressed, the tensors' bytes. A pickle can name
any function to run; only those of tensors are allowed (``weights_only=True``), and no tensor is
read: its bytes are found in the archive, and mapped like those of a safetensors file. Imports torch
where there is such a file.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlm.checkpoint.atomic import naming
from nlm.checkpoint.entries import TORCH_TYPES, TensorEntry
from nlm.checkpoint.texts import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth")
INDEX_SUFFIX = ".bin.index.json"
_USUAL = "pytorch_model.bin"
#: Beside weights, in the folder of a training.
_OTHERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
#: Where a file of a training keeps the weights.
_WITHIN = ("state_dict", "model_state_dict", "model")
_TYPES = {torch_name: name for name, torch_name in TORCH_TYPES.items()}
_LOCAL = struct.Struct("<26xHH")  # the end of a local header: bytes of the name, and of the rest


def is_pickle(file: Path) -> bool:
    """Whether a file's name is one of PyTorch's own files."""
    return file.suffix in SUFFIXES


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that may hold weights; one where it has the usual name."""
    usual = folder / _USUAL
    if usual.is_file():
        return [usual]
    found = (each for each in sorted(folder.iterdir()) if each.is_file() and is_pickle(each))
    return [each for each in found if not _OTHERS.fullmatch(each.name)]


def read_pickle(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file: a mapping of names to tensors, or one beside other things under
    "state_dict", "model_state_dict" or "model".

    Raises
    ------
    DamagedFileError
        It is no such file, or one that names other things than tensors; none of these is run.
    """
    with naming(file):
        places = _places(file)
    weights = _weights(file, _loaded(file))
    if any(_place(tensor) is None for tensor in weights.values()):
        from torch._subclasses.fake_tensor import FakeTensorMode

        weights = _weights(file, _loaded(file, FakeTensorMode()))
    return {name: _entry(name, tensor, file, places) for name, tensor in weights.items()}


def without_twins(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Of entries that are the same bytes (tied weights) the first, as safetensors files of models
    have it."""
    found: dict[tuple[Any, ...], str] = {}
    for name, entry in entries.items():
        key = (entry.file, entry.begin, entry.end) if entry.bytes else (name,)
        found.setdefault(key, name)
    return {name: entries[name] for name in found.values()}


def _loaded(file: Path, mode: Any = None) -> Any:
    """What a file holds, with tensors that have a place and no bytes. ``mode`` is PyTorch's for
    such tensors, where "meta" alone does not say their places."""
    import torch

    with mode or nullcontext():
        try:
            return torch.load(
                file, map_location=None if mode else "meta", weights_only=True, mmap=True
            )
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"one that names {named[1]}" if named else "one that does not"
            raise DamagedFileError(
                f"nlm: a PyTorch file is read where it holds tensors and nothing to run, got "
                f"{what} in {str(file)!r}; nothing of it was run"
            ) from error
        except OSError:
            raise
        except Exception as error:  # PyTorch's reader of pickles raises whatever a file leads to
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise _damaged(file, said) from error


def _weights(file: Path, loaded: Any) -> "Mapping[str, Tensor]":
    """The mapping of names to tensors."""
    from torch import Tensor

    within = [loaded[key] for key in _WITHIN if isinstance(loaded, Mapping) and key in loaded]
    for found in (loaded, *within):
        if isinstance(found, Mapping) and any(isinstance(each, Tensor) for each in found.values()):
            for name, value in found.items():
                if not isinstance(name, str) or not isinstance(value, Tensor):
                    raise _damaged(file, f"a {type(value).__name__} under {name!r}")
            return found
    raise _damaged(file, f"a {type(loaded).__name__} without tensors under their names")


def _entry(name: str, tensor: "Tensor", file: Path, places: Mapping[int, int]) -> TensorEntry:
    import torch

    dtype = _TYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_quantized:
        raise _damaged(file, f"{name!r} of type {tensor.dtype}, {tensor.layout}")
    order = None if tensor.is_contiguous() else _order(tensor.shape, tensor.stride())
    if order is None and not tensor.is_contiguous():
        raise DamagedFileError(
            f"nlm: tensors of a PyTorch file lie without gaps (saved after .contiguous()), got "
            f"strides {list(tensor.stride())} of {list(tensor.shape)} for {name!r} in {str(file)!r}"
        )
    storage, place = tensor.untyped_storage(), _place(tensor)
    item = tensor.element_size()
    begin, length = int(tensor.storage_offset()) * item, tensor.numel() * item
    if place is None or places.get(place, -1) < max(storage.nbytes(), begin + length):
        raise _damaged(file, f"no bytes of its own for {name!r}")
    shape = tuple(tensor.shape)
    return TensorEntry(name, dtype, shape, file, place + begin, place + begin + length, order)


def _order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The axes as they lie, outermost first; None where they leave gaps."""
    order = sorted(range(len(shape)), key=lambda axis: (shape[axis] != 1, -strides[axis]))
    step = 1
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != step:
            return None
        step *= shape[axis]
    return tuple(order)


def _place(tensor: "Tensor") -> int | None:
    """Where a tensor's storage begins in its file, as PyTorch says."""
    if str(tensor.layout) != "torch.strided":
        return -1  # nowhere in one piece
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _places(file: Path) -> dict[int, int]:
    """Where what is in an archive, uncompressed, begins, and how many bytes it has."""
    places = {}
    try:
        if not zipfile.is_zipfile(file):
            raise _damaged(file, "no zip archive as torch.save writes it since PyTorch 1.6")
        archive = zipfile.ZipFile(file)
    except DamagedFileError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _damaged(file, str(error)) from error
    with archive, file.open("rb") as opened:
        for record in archive.infolist():
            if record.header_offset < 0:
                raise _damaged(file, f"{record.filename!r} before its beginning")
            if record.compress_type != zipfile.ZIP_STORED:  # a small file of any size
                raise _damaged(file, f"{record.filename!r} compressed, as torch.save writes none")
            opened.seek(record.header_offset)
            head = opened.read(_LOCAL.size)
            if len(head) == _LOCAL.size:
                begin = record.header_offset + _LOCAL.size + sum(_LOCAL.unpack(head))
                if begin + record.file_size <= file.stat().st_size:
                    places[begin] = record.file_size
    return places


def _damaged(file: Path, reason: str) -> DamagedFileError:
    return DamagedFileError(f"nlm: a checkpoint's file must be whole, got {str(file)!r} ({reason})")
