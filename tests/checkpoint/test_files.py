"""Files appear whole or not at all, are not overwritten by accident, and damage is named."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nlm.checkpoint import (
    DamagedFileError,
    atomic_path,
    cache_folder,
    read_shapes,
    read_tensors,
    write_tensors,
)


def test_tensors_come_back(tmp_path):
    path = tmp_path / "t.safetensors"
    shared = torch.arange(6.0)
    tensors = {"a": shared.view(2, 3).T, "b": shared, "c": torch.tensor(3), "d": torch.ones(0, 4)}
    write_tensors(path, tensors, {"who": "me"})
    found, metadata = read_tensors(path)
    assert metadata == {"who": "me"} and list(found) == list("abcd")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    arrays = read_tensors(path, framework="np")[0]
    np.testing.assert_array_equal(arrays["a"], tensors["a"].numpy())


def test_arrays_come_back_however_they_lie_in_memory(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    arrays = {"T": array.T, "step": array[::2, ::-1], "fortran": np.asfortranarray(array),
              "scalar": np.array(3.0)}  # fmt: skip
    write_tensors(tmp_path / "a", arrays)
    found, _ = read_tensors(tmp_path / "a", framework="np")
    for name, expected in arrays.items():
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name], expected)
    with pytest.raises(TypeError, match=r"all NumPy arrays, got both \(ndarray for 'a'\)"):
        write_tensors(tmp_path / "b", {"a": array, "t": torch.ones(2)})
    assert not (tmp_path / "b").exists()


def test_an_existing_file_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(1)})
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"overwritten only with force \(--force\), got"):
        write_tensors(path, {"a": torch.ones(1)})
    assert path.read_bytes() == before
    write_tensors(path, {"a": torch.ones(1)}, force=True)
    assert path.read_bytes() != before
    with pytest.raises(FileExistsError, match="must not be a folder"):
        write_tensors(tmp_path, {}, force=True)
    with pytest.raises(FileNotFoundError, match="the folder of an output file must exist"):
        write_tensors(tmp_path / "no" / "t.safetensors", {})


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path, force=True) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept.txt"]


def test_a_file_that_came_into_being_meanwhile_is_kept(tmp_path):
    path = tmp_path / "new.txt"
    with pytest.raises(FileExistsError), atomic_path(path) as temporary:
        temporary.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs"


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "header"])
def test_damage_is_named(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[:-7], "garbage": b"x" * 99, "empty": b"",
         "header": b"\xff" * 8 + content[8:]}[damage]
    )  # fmt: skip
    with pytest.raises(DamagedFileError, match=r"must be a whole safetensors file, got .*t\.safe"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError, match="a tensor file must exist"):
        read_tensors(tmp_path / "none")


def test_the_room_imports_no_torch():
    code = "import nlm.checkpoint, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the rule of another operating system")
def test_the_cache_folder_follows_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLM_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("NLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/cache")
    assert cache_folder() == Path("/var/tmp/cache/nlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "nlm"


def test_shapes_are_read_without_the_tensors(tmp_path):
    write_tensors(tmp_path / "1.safetensors", {"a": torch.zeros(2, 3), "b": torch.tensor(1)})
    write_tensors(tmp_path / "2.safetensors", {"c": torch.ones(4, dtype=torch.bfloat16)})
    assert read_shapes(tmp_path / "1.safetensors") == {"a": (2, 3), "b": ()}
    assert read_shapes(tmp_path) == {"a": (2, 3), "b": (), "c": (4,)}
    (tmp_path / "empty").mkdir()
    for missing in ("nowhere", "empty"):
        with pytest.raises(FileNotFoundError, match=missing):
            read_shapes(tmp_path / missing)
    (tmp_path / "3.safetensors").write_bytes(b"short")
    with pytest.raises(DamagedFileError, match=r"3\.safetensors"):
        read_shapes(tmp_path)


def test_the_same_content_is_the_same_bytes(tmp_path):
    metadata = {name: f'{name} "é"\n' for name in "qwertyuiopasdf"}
    tensors = {"b": torch.arange(4), "a": torch.ones(2, 3)}
    for number in range(4):
        write_tensors(tmp_path / f"{number}.safetensors", tensors, metadata)
    first, *others = [(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)]
    assert all(each == first for each in others)
    found, kept = read_tensors(tmp_path / "0.safetensors")
    assert kept == metadata and torch.equal(found["a"], tensors["a"])
