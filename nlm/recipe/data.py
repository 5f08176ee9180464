"""Calibration data that recipes and commands name, as batches: unlabelled inputs of a model.

``inputs.safetensors``, ``inputs.npz``
    Named tensors, the keyword arguments of the model, with one entry per sample in each; a tensor
    that stands alone is the model's main input under any name.
``package.module:function``
    Returns batches: anything that :mod:`nlm.statistics.data` walks over.
``lines.jsonl``
    A sample per line: a text, or a mapping with the key "text". Cut to the longest input, padded,
    and masked where it is padded.
any other file
    A text, cut into windows without padding.

Texts become tokens by the tokenizer in the model's folder. A model with an encoder and a decoder
reads the same tokens in both.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from nlm.checkpoint import DamagedFileError, read_tensors
from nlm.checkpoint.entries import TORCH_TYPES
from nlm.checkpoint.headers import read_header
from nlm.checkpoint.texts import parse_json
from nlm.recipe.functions import find_function
from nlm.statistics import batches

TENSORS = (".safetensors", ".npz")
_TOKENS = {"input_ids", "decoder_input_ids"}
_POSITIONS = ("position_embeddings", "position_embedding", "wpe")  # tables that are looked up in
BATCH = 16  # samples
_WINDOW = 128  # tokens
_UNPACKED, _PACKED = 1 << 30, 100  # bytes of an archive, or times its size
_CHARACTERS = 16  # of a text that are read for a token, where not all is needed
_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def open_data(
    text: str, model: nn.Module, folder: str | None, caller: str, samples: int | None = None
) -> list[Any]:
    """What ``text`` names, as batches.

    Parameters
    ----------
    model : what reads them.
    folder : of the model, where the tokenizer for a text lies.
    caller : for messages.
    samples : the most that are read; by default all there are.

    Raises
    ------
    FileNotFoundError
        There is no such file, or no tokenizer for a text.
    ValueError
        A damaged file, inputs that the model does not have, none, tokens that are not in its
        vocabulary, a function that is not there; what :func:`nlm.statistics.batches` raises.
    """
    path = Path(text)
    if not path.is_file():
        if ":" not in text:
            raise FileNotFoundError(
                f"{caller}: data is a file or package.module:function, got {text!r}"
            )
        found = find_function(text, f"{caller}: the data")()
        found = list(found) if isinstance(found, Iterator) else found
        return list(batches(found, samples, None, caller))
    if path.suffix in TENSORS:
        inputs = _named(_read(path), model)
        check_inputs(
            {name: tuple(each.shape) for name, each in inputs.items()}, model, path, caller
        )
        parts: Iterable[Any] = _parts(inputs)
    else:
        parts = _text_batches(path, model, folder, caller, samples)
    made = list(batches(list(parts), samples, None, caller))
    _check_tokens(made, model, path, caller)
    return made


def check_data(text: str, model: nn.Module, folder: str | None, caller: str) -> None:
    """Raises what :func:`open_data` would, as far as it shows before anything is read: the model
    may be without weights, no tensor is read and no function called."""
    path = Path(text)
    if not path.is_file() and ":" not in text:
        raise FileNotFoundError(
            f"{caller}: data is a file or package.module:function, got {text!r}"
        )
    if not path.is_file():
        find_function(text, f"{caller}: the data")
    elif path.suffix in TENSORS:
        check_inputs(_named(_shapes(path), model), model, path, caller)
    else:
        _check_reads_text(model, path, caller)
        open_tokenizer(folder, path, caller)


def batch_shapes(
    text: str, model: nn.Module, samples: int | None = None, most: int = BATCH
) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Input -> shape and type of a batch of ``most`` samples, or of all where there are fewer, from
    what shows before anything is read; texts count as long as they may be. None for a function's.
    """
    path = Path(text)
    if not path.is_file():
        return None
    rows = most if samples is None else min(most, samples)
    if path.suffix == ".safetensors":
        entries = read_header(path)[0].items()
        known = {n: (each.shape, getattr(torch, TORCH_TYPES[each.dtype])) for n, each in entries}
    elif path.suffix in TENSORS:
        known = dict(_arrays(path, lambda each: (each.shape, torch.from_numpy(each[:1]).dtype)))
    else:
        names = ["input_ids", *(["attention_mask"] if path.suffix == ".jsonl" else [])]
        names += [n for n in ("decoder_input_ids",) if n in _parameters(model)[0]]
        return dict.fromkeys(names, ((rows, _longest(model)), torch.int64))
    named = _named(known, model).items()
    return {name: ((min(rows, shape[0]), *shape[1:]), dtype) for name, (shape, dtype) in named}


def check_inputs(
    shapes: Mapping[str, tuple[int, ...]], model: nn.Module, path: Path, caller: str
) -> None:
    """Raises ValueError where tensors in a file are no inputs of a model, sample by sample."""
    lengths = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            f"{caller}: a file of inputs has one entry per sample in every tensor, got lengths "
            f"{lengths} in {str(path)!r}"
        )
    known, takes_any = _parameters(model)
    main = _main_input(model)  # of transformers, whose models pass over what they do not know
    strangers = [name for name in shapes if name not in known and (main or not takes_any)]
    missing = [] if main is None or {main, "inputs_embeds"} & shapes.keys() else [main]
    if strangers or missing:
        raise ValueError(
            f"{caller}: a file of inputs has those of the model, {', '.join(known)}, got "
            f"{', '.join(map(repr, shapes))} for {type(model).__name__} in {str(path)!r}"
        )
    most = _positions(model)
    for name in _TOKENS & shapes.keys():
        if len(shapes[name]) != 2 or (most is not None and shapes[name][1] > most):
            raise ValueError(
                f"{caller}: tokens are [samples, length]"
                f"{'' if most is None else f', of at most {most} positions'}, got "
                f"{list(shapes[name])} for {name!r} in {str(path)!r}"
            )


def open_tokenizer(folder: str | None, path: Path, caller: str) -> Any:
    """The tokenizer in a model's folder, for a text."""
    error: Exception | None = None
    if folder is not None and any((Path(folder) / name).is_file() for name in _TOKENIZERS):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as caught:  # each of transformers' tokenizers has errors of its own
            error = caught
    why = "" if error is None else f" ({' '.join(str(error).split())})"
    raise FileNotFoundError(
        f"{caller}: a text needs the tokenizer in the model's folder, got none in {str(folder)!r} "
        f"for {str(path)!r}{why}"
    ) from error


# --- tensors --------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    return {name: torch.from_numpy(array) for name, array in _arrays(path, lambda each: each)}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        return {name: entry.shape for name, entry in read_header(path)[0].items()}
    return dict(_arrays(path, lambda each: tuple(each.shape)))


def _arrays(path: Path, of: Callable[[np.ndarray], Any]) -> list[tuple[str, Any]]:
    """What there is to know of each array of a NumPy archive; pickles are not opened."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            _check_archive(archive, path.stat().st_size)
            return [(name, of(archive[name])) for name in archive.files]
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds for broken archives
        said = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFileError(
            f"nlm: a file of inputs is a whole .npz archive of arrays, got {str(path)!r} ({said})"
        ) from error


def _check_archive(archive: Any, size: int) -> None:
    """Raises ValueError where a header promises what its file does not have, or no numbers: NumPy
    makes room for it before it looks. A file of ``size`` bytes may not unpack to any others."""
    unpacked = sum(member.file_size for member in archive.zip.infolist())
    if unpacked > max(_UNPACKED, _PACKED * size):
        raise ValueError(f"{unpacked} bytes that are packed in {size}")
    for member in archive.zip.infolist():
        with archive.zip.open(member) as opened:
            version = np.lib.format.read_magic(opened)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(opened)
        if math.prod(shape) * dtype.itemsize > member.file_size or dtype.kind not in "biuf":
            raise ValueError(f"{dtype} of shape {list(shape)} for {member.filename!r}")


def _named(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The inputs by the model's names: one that stands alone is its main one."""
    main = _main_input(model)
    if len(inputs) == 1 and main is not None:
        (name,) = inputs
        if name not in _parameters(model)[0]:
            return {main: inputs[name]}
    return dict(inputs)


def _parts(inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for part in zip(*(each.split(BATCH) for each in inputs.values()), strict=True):
        yield dict(zip(inputs, part, strict=True))


def _parameters(model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """The names of a model's inputs, and whether it takes others too."""
    found = inspect.signature(model.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = tuple(each.name for each in found if each.kind in named)
    return names, any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found)


def _main_input(model: nn.Module) -> str | None:
    """The input that a model of transformers cannot do without."""
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) and name in _parameters(model)[0] else None


# --- texts ----------------------------------------------------------------------------------------


def _text_batches(
    path: Path, model: nn.Module, folder: str | None, caller: str, samples: int | None
) -> Iterator[dict[str, Tensor]]:
    _check_reads_text(model, path, caller)
    tokenizer = open_tokenizer(folder, path, caller)
    length = _longest(model)
    if path.suffix == ".jsonl":
        texts = _lines(path, caller, samples)
        made = _padded(texts, tokenizer, length, path, caller)
    else:
        with _opened(path, caller) as opened:
            text = opened.read(-1 if samples is None else samples * length * _CHARACTERS)
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(found, dtype=torch.int64)
        windows = tokens[: len(tokens) // length * length].reshape(-1, length)
        if not len(windows):
            raise ValueError(
                f"{caller}: a text has at least {length} tokens, got {len(tokens)} in {str(path)!r}"
            )
        made = ({"input_ids": each} for each in windows.split(BATCH))
    both = "decoder_input_ids" in _parameters(model)[0]
    for batch in made:
        yield {**batch, "decoder_input_ids": batch["input_ids"]} if both else batch


def _lines(path: Path, caller: str, samples: int | None) -> list[str]:
    """The texts of the first lines that hold one."""
    found: list[str] = []
    with _opened(path, caller) as opened:
        for number, line in enumerate(opened, 1):
            if len(found) == samples:
                break
            if not line.strip():
                continue
            try:
                content = parse_json(line)
            except ValueError:
                content = None
            text = content.get("text") if isinstance(content, dict) else content
            if not isinstance(text, str) or not text:
                raise ValueError(
                    f"{caller}: a line of a .jsonl file is a text or has the key 'text', got "
                    f"{line.strip()[:40]!r} in line {number} of {str(path)!r}"
                )
            found.append(text)
    if not found:
        raise ValueError(f"{caller}: a .jsonl file has at least one line, got {str(path)!r}")
    return found


def _padded(
    texts: list[str], tokenizer: Any, length: int, path: Path, caller: str
) -> Iterator[dict[str, Tensor]]:
    """Batches that are padded on the right; what stands there is hidden and never counts."""
    tokens = tokenizer(texts, truncation=True, max_length=length, verbose=False)["input_ids"]
    if not all(tokens):
        raise ValueError(
            f"{caller}: a line of a .jsonl file has at least one token, got none for "
            f"{texts[tokens.index([])]!r} in {str(path)!r}"
        )
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(each for each in known if each is not None)
    for begin in range(0, len(tokens), BATCH):
        chosen = tokens[begin : begin + BATCH]
        longest = max(map(len, chosen))
        ids = torch.full((len(chosen), longest), filler, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(chosen):
            ids[row, : len(each)] = torch.tensor(each)
            mask[row, : len(each)] = 1
        yield {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _opened(path: Path, caller: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as opened:
            yield opened
    except UnicodeDecodeError as error:
        raise ValueError(f"{caller}: a text is UTF-8, got {str(path)!r} ({error})") from error


def _positions(model: nn.Module) -> int | None:
    """How many positions a model has learned; None where it has no table of them."""
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min(tables) - _first_position(model) if tables else None


def _first_position(model: nn.Module) -> int:
    """RoBERTa begins to count positions at 2."""
    return 2 if "roberta" in str(getattr(model.config, "model_type", "")) else 0


def _longest(model: nn.Module) -> int:
    """The tokens of one sample."""
    positions = getattr(model.config, "max_position_embeddings", None) or _WINDOW + 2
    return max(1, min(_WINDOW, positions - _first_position(model)))


def _check_reads_text(model: nn.Module, path: Path, caller: str) -> None:
    if "input_ids" not in _parameters(model)[0]:
        raise ValueError(
            f"{caller}: a text is data of a model that reads tokens, got {type(model).__name__}, "
            f"which reads {_main_input(model)}, and {str(path)!r}"
        )


def _check_tokens(made: Iterable[Any], model: nn.Module, path: Path, caller: str) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        return
    for batch in made:
        for name in sorted(_TOKENS & batch.keys()):
            tokens = batch[name]
            if tokens.is_floating_point():
                raise ValueError(
                    f"{caller}: tokens are integers, got {tokens.dtype} for {name!r} in "
                    f"{str(path)!r}"
                )
            if not tokens.numel():
                continue
            least, most = int(tokens.min()), int(tokens.max())
            if least < 0 or most >= size:
                raise ValueError(
                    f"{caller}: tokens are those of the model's vocabulary, 0 to {size - 1}, got "
                    f"{least} to {most} for {name!r} in {str(path)!r}"
                )
