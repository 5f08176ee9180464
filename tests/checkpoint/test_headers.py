"""Headers of checkpoints: what the format allows is read, everything else is named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nlm.checkpoint import DamagedFileError, open_checkpoint
from nlm.checkpoint.headers import check_unchanged, read_header
from nlm.checkpoint.mapping import MappedFiles

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1, 2], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "steps": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
}


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def folder_of(path: Path, parts: dict[str, dict[str, torch.Tensor]]) -> Path:
    path.mkdir()
    for name, tensors in parts.items():
        save_file(tensors, path / name)
    weights = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return path


def test_entries_are_those_of_the_library(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors", {"format": "pt"})
    found = open_checkpoint(tmp_path / "t.safetensors")
    assert found.metadata == {"format": "pt"} and found.folder is None and found.config is None
    with safe_open(tmp_path / "t.safetensors", "pt") as library, MappedFiles([found]) as files:
        assert set(found.tensors) == set(library.keys())
        for name, entry in found.tensors.items():
            tensor = library.get_tensor(name)
            assert entry.shape == tuple(tensor.shape) and entry.size == tensor.numel()
            assert entry.dtype == library.get_slice(name).get_dtype()
            own = tensor.reshape(-1).view(torch.uint8).numpy()
            assert files.bytes(entry).tobytes() == own.tobytes()


def test_a_folder_has_an_index_or_one_file(tmp_path):
    whole = {
        "model-1.safetensors": {"a": torch.ones(2)},
        "model-2.safetensors": {"b": torch.ones(3)},
    }
    folder = folder_of(tmp_path / "sharded", whole)
    (folder / "config.json").write_text('{"hidden_size": 2}')
    found = open_checkpoint(folder)
    assert [entry.file.name for entry in found.tensors.values()] == list(whole)
    assert found.config == {"hidden_size": 2} and found.folder == folder
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(DamagedFileError, match="several files of weights has one index"):
        open_checkpoint(folder)
    (folder / "model-2.safetensors").rename(folder / "model.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update(b="../outside.safetensors"), "a file outside its folder"),
        (lambda weights: weights.update(b="/etc/passwd"), "a file outside its folder"),
        (lambda weights: weights.update(b="none.safetensors"), "must exist, got none called"),
        (lambda weights: weights.update(c="two.safetensors"), "got 'c', which is not in"),
        (lambda weights: weights.pop("c2"), "got 'c2' of .*, which it does not name"),
        (lambda weights: weights.update(b=3), "weight_map that does not name files"),
        (lambda weights: weights.clear(), "weight_map that does not name files"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path, change, message):
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(3), "c2": torch.ones(1)}
    save_file(one, tmp_path / "outside.safetensors")
    folder = folder_of(tmp_path / "f", {"one.safetensors": one, "two.safetensors": two})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises((DamagedFileError, FileNotFoundError), match=message):
        open_checkpoint(folder)


def test_a_tensor_stands_in_one_file(tmp_path):
    parts = {"one.safetensors": {"a": torch.ones(2)}, "two.safetensors": {"b": torch.ones(3)}}
    folder = folder_of(tmp_path / "f", parts)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "two.safetensors")
    with pytest.raises(DamagedFileError, match="stands in one file of a checkpoint, got 'a'"):
        open_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="a checkpoint must exist, got"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds safetensors or PyTorch files, got none"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"pytorch_model.bin' \(no zip archive"):
        open_checkpoint(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": ENTRY}, b"1234567", "tensors that end at byte"),
        ({"a": ENTRY}, b"123456789", "tensors that end at byte"),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"12345678", "an unknown type 'F31' of 'a'"),
        ({"a": {**ENTRY, "shape": [3]}}, b"12345678", "8 bytes for 12 of 'a'"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"12345678", "no whole numbers"),
        ({"a": {**ENTRY, "shape": [2.0]}}, b"12345678", "no whole numbers"),
        ({"a": {**ENTRY, "data_offsets": [8, 16]}}, b"1" * 16, "a gap or an overlap"),
        ({"a": ENTRY, "b": ENTRY}, b"1" * 8, "a gap or an overlap at byte .*, before 'b'"),
        ({"a": {"dtype": "F32"}}, b"", "shape"),
        (b"{", b"", "got "),
        (b"[1]", b"", "got "),
        (b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": 3}', b"1" * 8, "stands twice"),
        ({"__metadata__": {"n": 3}}, b"", "metadata that is not text"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_named(tmp_path, header, data, message):
    path = file_of(tmp_path / "t.safetensors", header, data)
    with pytest.raises(DamagedFileError, match=message):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_a_header_that_is_cut_is_named(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a header of .* bytes in a file of"):
        read_header(path)


@given(st.data())
def test_changed_bytes_are_refused_or_read_as_the_library_reads_them(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bits") / "t.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found, _ = read_header(path)
    except DamagedFileError:
        return
    try:
        with safe_open(path, "pt") as library:
            shapes = {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()}
    except SafetensorError:
        return  # stricter: the library checks the types of what it does not use
    assert {name: entry.shape for name, entry in found.items()} == shapes


def test_a_change_under_way_is_seen(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path)
    found = open_checkpoint(path)
    check_unchanged(found.stamps)
    path.unlink()
    save_file(TENSORS, path)
    with pytest.raises(RuntimeError, match="an input must stay as it is while it is read"):
        check_unchanged(found.stamps)
    with pytest.raises(RuntimeError, match="an input must stay as it is while it is read"):
        MappedFiles([found])
