"""What an installed wheel must do, in any environment with its core dependencies alone.

``python _installed.py torch|core [NAME==VERSION ...]`` imports PyTorch or the compiled core first,
runs every example in the docstrings of the operations, a trace, an alignment, merges, a correction
and a streamed merge, and prints what it saw as JSON. nlm and PyTorch then share one OpenMP runtime.
Where versions are named these must be what is installed, and the demonstration and a network of
transformers run too; after them other packages' runtimes may be mapped (scikit-learn's wheel brings
its own), which are named. Nothing of the checkout is imported.
"""

import doctest
import importlib
import json
import sys
import tempfile
from pathlib import Path


def runtimes() -> list[str]:
    """The OpenMP runtimes of GCC that are mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in maps if "libgomp" in line})


def examples() -> dict[str, int]:
    import nlm.ops

    folder = Path(nlm.ops.__file__).parent
    stems = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    found = [doctest.testmod(importlib.import_module(f"nlm.ops.{stem}")) for stem in stems]
    return {"examples": sum(each.attempted for each in found),
            "failed": sum(each.failed for each in found)}  # fmt: skip


def whole_way() -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from torch import nn

    import nlm
    from nlm.checkpoint import open_checkpoint
    from nlm.streaming import Plan, run

    def made(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()

    one, other, x = made(0), made(1), torch.randn(32, 6)
    spec = nlm.trace(one, x)
    moved = spec.apply(spec.random(0), one.state_dict())
    found = nlm.align(one.state_dict(), moved, spec)
    back = spec.apply(found.permutation, moved)
    assert all(torch.equal(back[name], tensor) for name, tensor in one.state_dict().items())
    merged = nlm.merge({"a": one, "b": other}, base=made(2), method="ties", density=0.5)
    model = made(3)
    model.load_state_dict(dict(merged))
    tact = nlm.Tact.fit(model, {"a": one, "b": other}, {"a": [x], "b": [x]})
    assert torch.allclose(tact(x, task="a"), tact.fold("a")(x), atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in ("a", "b", "out")}
        save_file(one.state_dict(), files["a"])
        save_file(other.state_dict(), files["b"])
        experts = {name: open_checkpoint(files[name]) for name in ("a", "b")}
        run(Plan(files["out"], experts, None, "linear", lambda *_: 1.0, {}))
        halves = {name: (t + other.state_dict()[name]) / 2 for name, t in one.state_dict().items()}
        assert all(torch.allclose(t, halves[name]) for name, t in load_file(files["out"]).items())


def pinned(pins: list[str]) -> dict[str, str]:
    """The versions that are installed, which are those that are named."""
    from importlib.metadata import version

    found = {}
    for pin in pins:
        name, _, wanted = pin.partition("==")
        found[name] = version(name).partition("+")[0]
        parts = [[int(each) for each in text.split(".")] for text in (wanted, found[name])]
        assert parts[1] == parts[0] + [0] * (len(parts[1]) - len(parts[0])), (pin, found[name])
    return found


def with_extras() -> None:
    """The command line and all that the demonstration needs; a model of transformers."""
    import torch
    import transformers

    import nlm
    from nlm.cli.app import run

    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("demo.json", "report.html")]
        done = run(["demo", "--tasks", "2", "--quiet", "--json", files[0], "--report", files[1]])
        assert done == 0 and all(Path(file).stat().st_size > 1000 for file in files)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    spec = nlm.trace(model, {"input_ids": torch.arange(20).view(2, 10)})
    assert spec.proven and len(spec.free) > 4


def main() -> None:
    first = "torch" if sys.argv[1] == "torch" else "nlm._C"
    importlib.import_module(first)
    assert first == "torch" or "torch" not in sys.modules
    import nlm.kernels  # the folder is in the wheel
    import torch

    import nlm

    assert "site-packages" in nlm.__file__, nlm.__file__
    before = examples()
    whole_way()
    x = torch.randn(3000, 64)
    torch.set_num_threads(2)
    threaded = nlm.ops.channel_moments(x)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(threaded, nlm.ops.channel_moments(x), strict=True))
    shared = runtimes()
    assert len(shared) == 1, shared
    pins = pinned(sys.argv[2:])
    if pins:
        with_extras()
    others = [each.split("site-packages/")[-1] for each in runtimes() if each not in shared]
    assert not any(each.startswith(("nlm", "torch")) for each in others), others
    known = nlm.info()
    assert known["compiled core"] == "loaded", known["compiled core"]
    report = {
        "first": first, "python": sys.version.split()[0], "versions": known["versions"],
        "instruction set": known["instruction set"], "libgomp": len(shared), **before,
        **({"least": pins, "libgomp of others": others} if pins else {}),
    }  # fmt: skip
    print(json.dumps(report))
    sys.exit(1 if before["failed"] else 0)


if __name__ == "__main__":
    main()
