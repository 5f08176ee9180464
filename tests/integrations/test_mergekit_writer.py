"""The writer that puts results into files as they come, beside the host's own."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("mergekit", reason="a host, of the extra [hosts]")

from mergekit.io import tasks
from mergekit.io.tensor_writer import TensorWriter

from nlm.checkpoint import open_checkpoint
from nlm.integrations.mergekit import writer
from nlm.integrations.mergekit.writer import Stream, StreamedWriter, streamed

pytestmark = pytest.mark.host


def tensors() -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    found = {f"layer.{i}.weight": torch.randn(7, 5 + i, generator=make) for i in range(6)}
    found["turned"] = torch.randn(4, 6, generator=make).T
    found |= {"empty": torch.zeros(0, 3), "one": torch.tensor(2.0)}
    return found


def written(kind: type[TensorWriter], folder: Path, state: dict[str, Tensor], **options) -> Path:
    made = kind(str(folder), **options)
    for name, tensor in state.items():
        made.save_tensor(name, tensor)
    made.finalize()
    return folder


def contents(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(x, other[name]) if isinstance(x, Tensor) else equal(x, other[name])
        for name, x in one.items()
    )


@pytest.mark.parametrize("size", [-1, 400, 10**9])
@pytest.mark.parametrize("use_async", [False, True])
def test_files_hold_what_the_hosts_do(tmp_path: Path, size: int, use_async: bool) -> None:
    """Names, shards and the index too; each file is read by nlm's own reader as well."""
    options = {"max_shard_size": size, "use_async": use_async}
    host = written(TensorWriter, tmp_path / "host", tensors(), **options)
    found = written(StreamedWriter, tmp_path / "found", tensors(), **options)
    assert sorted(f.name for f in host.iterdir()) == sorted(f.name for f in found.iterdir())
    assert equal(contents(host), contents(found))
    index = "model.safetensors.index.json"
    if (host / index).exists():
        assert json.loads((host / index).read_text()) == json.loads((found / index).read_text())
    assert open_checkpoint(found).tensors.keys() == tensors().keys()


def test_narrow_types_before_wide_ones_and_long_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {"narrow": torch.ones(3, dtype=torch.bfloat16), "wide": torch.randn(5)}
    host = written(TensorWriter, tmp_path / "host", odd)
    assert equal(contents(host), contents(written(StreamedWriter, tmp_path / "odd", odd)))
    monkeypatch.setattr(writer, "_room", lambda: 64)
    host = written(TensorWriter, tmp_path / "all", tensors())
    found = written(StreamedWriter, tmp_path / "found", tensors())
    assert equal(contents(host), contents(found))
    assert [file.name for file in found.iterdir()] == ["model.safetensors"]


def test_pickles_are_the_hosts(tmp_path: Path) -> None:
    found = written(StreamedWriter, tmp_path, tensors(), safe_serialization=False)
    assert [file.name for file in found.iterdir()] == ["pytorch_model.bin"]


def test_few_results_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_MOST_WAITING", 0)
    found = written(StreamedWriter, tmp_path, tensors())
    assert equal(contents(found)["model.safetensors"], tensors())


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path) -> None:
    stock = tasks.TensorWriter
    with pytest.raises(KeyError), streamed():
        assert tasks.TensorWriter is StreamedWriter
        tasks.TensorWriter(str(tmp_path)).save_tensor("a", torch.ones(3))
        assert list(tmp_path.iterdir())
        raise KeyError
    assert tasks.TensorWriter is stock and not list(tmp_path.iterdir())


def test_another_writer_of_the_host_writes_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One without the names that are used, or with other arguments; the log says it in a line."""
    assert writer.fits(TensorWriter)

    class Other(TensorWriter):
        __annotations__ = TensorWriter.__annotations__

        def _write_shard_task(self, shard: dict[str, Tensor]) -> None: ...

    class Bare: ...

    for kind in (Other, Bare):
        assert not writer.fits(kind)
        monkeypatch.setattr(writer, "TensorWriter", kind)
        caplog.clear()
        with streamed():
            assert tasks.TensorWriter is TensorWriter
        (said,) = caplog.messages
        assert said.startswith("nlm.integrations.mergekit: results are streamed by the writer of")


def test_annotations_that_only_type_checkers_know_are_seen() -> None:
    """Of the class itself, not of those that it inherits from, whichever Python computes them."""

    class Lazy(TensorWriter):
        stream: "Nowhere"  # noqa: F821

    assert writer._annotated(Lazy) == {"stream"}


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "partial", 64)
    stream._file.close()
    stream.add("a", torch.ones(3))
    with pytest.raises(ValueError, match="closed file"):
        stream.close(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_copy_that_fails_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    stream = Stream(tmp_path / "partial", 64)  # whose header needs more, so that it is copied
    stream.add("a", torch.ones(3))
    monkeypatch.setattr(writer.os, "sendfile", full)
    with pytest.raises(OSError, match="No space left"):
        stream.close(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_type_that_the_format_lacks_is_told(tmp_path: Path) -> None:
    made = StreamedWriter(str(tmp_path))
    with pytest.raises(TypeError, match=r"holds bool, .*, got torch.complex128 of 'a'"):
        made.save_tensor("a", torch.ones(3, dtype=torch.complex128))
    StreamedWriter.abandon()
    assert not list(tmp_path.iterdir())
