"""PyTorch's own files: their tensors are merged as they lie, and nothing in them is run."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import nlm
from nlm.checkpoint import DamagedFileError, open_checkpoint
from nlm.checkpoint import pickles as own
from nlm.checkpoint.mapping import MappedFiles
from nlm.cli.app import run
from nlm.streaming import Plan
from nlm.streaming import run as stream

DTYPES = {
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool,
    torch.uint8, torch.int8,
}  # fmt: skip


def state() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 4, generator=made)
    found = {f"of {dtype}": (10 * whole).to(dtype) for dtype in sorted(DTYPES, key=str)}
    found |= {"scalar": torch.tensor(3), "empty": torch.empty(0, 3), "whole": whole}
    return found | {"rows": whole[2:5], "tied": whole}


def read(path: Path) -> dict[str, bytes]:
    found = open_checkpoint(path)
    with MappedFiles([found]) as files:
        return {name: files.bytes(entry).tobytes() for name, entry in found.tensors.items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("within", [None, "state_dict", "model"])
def test_tensors_are_found_where_they_lie(tmp_path, within):
    """Of all types, views and tied ones too; beside other things that are no code."""
    file = tmp_path / "weights.pt"
    torch.save(state() if within is None else {"epoch": 3, within: state()}, file)
    entries = open_checkpoint(file).tensors
    assert list(entries) == list(state())
    for name, tensor in state().items():
        assert entries[name].shape == tuple(tensor.shape)
    assert read(file) == {name: bytes_of(tensor) for name, tensor in state().items()}


def test_axes_in_another_order(tmp_path):
    """As models in channels_last, and transposed weights, are saved; merged like others."""
    made = torch.Generator().manual_seed(0)
    usual = {
        "conv": torch.randn(4, 3, 5, 2, generator=made),
        "one": torch.randn(4, 1, 3, generator=made),
        "w": torch.randn(6, 8, generator=made).bfloat16(), "steps": torch.arange(6).view(2, 3),
    }  # fmt: skip
    other = {
        "conv": usual["conv"].to(memory_format=torch.channels_last),
        "one": usual["one"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "w": usual["w"].t().contiguous().t(), "steps": usual["steps"].t().contiguous().t(),
    }  # fmt: skip
    assert not any(each.is_contiguous() for each in other.values())
    torch.save(other, tmp_path / "other.pt")
    assert read(tmp_path / "other.pt") == {name: bytes_of(each) for name, each in usual.items()}
    for recipe, model in (("merge", "other.pt"), ("plain", "usual.safetensors")):
        save_file(usual, tmp_path / "usual.safetensors")
        (tmp_path / f"{recipe}.yaml").write_text(
            f"experts: {{one: usual.safetensors, two: {model}}}\nmethod: linear\n"
        )
        out = str(tmp_path / f"{recipe}.safetensors")
        assert run(["merge", str(tmp_path / f"{recipe}.yaml"), "-o", out, "--quiet"]) == 0
    merged, plain = (load_file(tmp_path / f"{name}.safetensors") for name in ("merge", "plain"))
    assert all(torch.equal(merged[name], plain[name]) for name in usual)
    experts = {name: open_checkpoint(tmp_path / name) for name in ("usual.safetensors", "other.pt")}
    plan = Plan(tmp_path / "o.safetensors", experts, None, "linear", lambda *_: 1.0, {})
    stream(plan)  # without the copy that a recipe makes
    merged = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(merged[name], plain[name]) for name in usual)


def test_a_torch_that_says_the_places_of_fake_tensors_alone(tmp_path):
    torch.save(state(), tmp_path / "weights.pt")
    meta = own._loaded(tmp_path / "weights.pt")
    fake = own._loaded(tmp_path / "weights.pt", FakeTensorMode())
    places = {name: own._place(tensor) for name, tensor in meta.items()}
    assert places == {name: own._place(tensor) for name, tensor in fake.items()}
    assert None not in places.values()


def test_a_folder_of_several(tmp_path):
    """An index as transformers writes it; of tied weights of a model one is kept; what a training
    leaves beside them is not looked at."""
    halves = {"pytorch_model-1.bin": {}, "pytorch_model-2.bin": {}}
    for number, (name, tensor) in enumerate(state().items()):
        halves[f"pytorch_model-{1 + (number > 4)}.bin"][name] = tensor
    for name, half in halves.items():
        torch.save(half, tmp_path / name)
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    weights = {name: file for file, half in halves.items() for name in half}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    assert set(open_checkpoint(tmp_path).tensors) == set(state())
    (tmp_path / "config.json").write_text("{}")
    assert set(open_checkpoint(tmp_path).tensors) == set(state()) - {"tied"}
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "other.pth"])
def test_a_folder_of_one(tmp_path, name):
    torch.save(state(), tmp_path / name)
    torch.save({}, tmp_path / "optimizer.pt")
    assert set(open_checkpoint(tmp_path).tensors) == set(state())
    torch.save(state(), tmp_path / "more.bin")
    if name == "other.pth":
        with pytest.raises(DamagedFileError, match="several files of weights has one index"):
            open_checkpoint(tmp_path)


class Evil:
    """What a pickle can do: run anything as it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "old"])
def test_a_malicious_file_runs_nothing(tmp_path, is_old):
    victim, file = tmp_path / "victim", tmp_path / "pytorch_model.bin"
    content = {"a": torch.ones(2), "b": Evil(victim)}
    torch.save(content, file, _use_new_zipfile_serialization=not is_old)
    with pytest.raises(DamagedFileError) as error:
        open_checkpoint(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert is_old or "got one that names posix.system in" in str(error.value)
    assert not victim.exists()
    torch.load(file, weights_only=False)  # it is malicious indeed
    assert victim.exists()


def broken(file: Path, kind: str) -> None:
    weights: object = {"a": torch.ones(2, 3)}
    if kind == "strides":
        weights = {"a": torch.ones(4, 6)[:, :3]}
    elif kind == "sparse":
        weights = {"a": torch.eye(3).to_sparse()}
    elif kind == "a number":
        weights = {"a": torch.ones(2), "steps": 3}
    elif kind == "a list":
        weights = [torch.ones(2)]
    torch.save(weights, file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif kind == "text":
        file.write_text("no archive")
    elif kind == "compressed":
        with zipfile.ZipFile(file) as archive:
            parts = {each: archive.read(each) for each in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, part in parts.items():
                archive.writestr(name, part)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("strides", r"without gaps .* got strides \[6, 1\] of \[4, 3\] for 'a'"),
        ("sparse", "'a' of type torch.float32, torch.sparse_coo"),
        ("a number", "a int under 'steps'"),
        ("a list", "a list without tensors"),
        ("cut", "must be whole"),
        ("text", "no zip archive as torch.save writes it"),
        ("compressed", r"compressed, as torch\.save writes none"),
    ],
)
def test_what_cannot_be_merged_as_it_lies(tmp_path, kind, message):
    file = tmp_path / "weights.pt"
    broken(file, kind)
    with pytest.raises(DamagedFileError, match=message) as error:
        open_checkpoint(file)
    assert str(file) in str(error.value)


def test_a_merge_of_both_kinds(tmp_path):
    """A folder with a pickle, one with safetensors and a lone file: as if all were safetensors."""
    states = []
    for seed in range(3):
        made = torch.Generator().manual_seed(seed)
        states.append({n: torch.randn(40, 30, generator=made) for n in ("a.weight", "b.weight")})
    for name in ("one", "plain"):
        (tmp_path / name).mkdir()
    torch.save(states[0], tmp_path / "base.pt")
    torch.save(states[1], tmp_path / "one" / "pytorch_model.bin")
    save_file(states[2], tmp_path / "two.safetensors")
    save_file(states[0], tmp_path / "plain" / "base.safetensors")
    save_file(states[1], tmp_path / "plain" / "one.safetensors")
    of = {"both": ("base.pt", "one"), "plain": ("plain/base.safetensors", "plain/one.safetensors")}
    for name, (base, one) in of.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            f"base: {base}\nexperts: {{one: {one}, two: two.safetensors}}\nmethod: ties\n"
            "parameters: {density: 0.3, scale: 0.5}\n"
        )
        out = str(tmp_path / f"{name}.safetensors")
        assert run(["merge", str(recipe), "--output", out, "--quiet"]) == 0
    both, plain = (load_file(tmp_path / f"{name}.safetensors") for name in of)
    assert all(torch.equal(both[name], plain[name]) for name in plain)


def test_an_expert_in_another_order_of_its_units(tmp_path):
    """A PyTorch file is permuted, and a foundation in one aligned, as safetensors files are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    spec = nlm.trace(model, torch.randn(2, 6))
    spec.save(tmp_path / "spec.json")
    base = model.state_dict()
    moved = spec.apply(spec.random(1), base)
    for suffix, save in (("pt", torch.save), ("safetensors", save_file)):
        save(base, tmp_path / f"base.{suffix}")
        save(moved, tmp_path / f"moved.{suffix}")
        (tmp_path / f"{suffix}.yaml").write_text(
            f"foundations: {{a: base.{suffix}, b: moved.{suffix}}}\nbase: a\n"
            f"experts: {{one: {{path: moved.{suffix}, foundation: b}}}}\n"
            "method: task_arithmetic\nalign: {method: weights, spec: spec.json}\n"
        )
        out = tmp_path / f"out {suffix}.safetensors"
        assert run(["merge", str(tmp_path / f"{suffix}.yaml"), "-o", str(out), "--quiet"]) == 0
        merged = load_file(out)
        assert all(torch.equal(merged[name], base[name]) for name in base)
