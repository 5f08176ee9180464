"""What importing nlm costs: next to nothing until a name is used, and then no slow package.

``import nlm`` may take 0.3 s beyond PyTorch, and says nothing.
"""

import json
import subprocess
import sys

import nlm

#: Packages that take a tenth of a second and more, and that few functions need.
SLOW = (
    "scipy.optimize", "scipy.sparse", "scipy.linalg", "scipy.cluster", "torch._dynamo",
    "torch._inductor", "torch.onnx", "transformers", "matplotlib", "typer", "pydantic", "sklearn",
)  # fmt: skip


def ran(code: str) -> dict:
    """What a fresh Python prints as JSON in its last line; it says nothing else."""
    command = [sys.executable, "-W", "error", "-c", f"import json, sys\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def test_the_package_alone_imports_neither_torch_nor_numpy() -> None:
    found = ran("import nlm\nprint(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "numpy", "scipy", "triton"} & set(found)


def test_the_public_names_import_no_slow_package() -> None:
    """Those that PyTorch itself imports are its own."""
    names = [name for name in nlm.__all__ if name != "__version__"]
    found = ran(
        "import torch\nbefore = set(sys.modules)\nimport nlm\n"
        f"for name in {names}: getattr(nlm, name)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert [name for name in SLOW if name in found] == []
    assert "nlm.symmetry.trace" in found


def test_the_import_takes_three_tenths_of_a_second_at_most() -> None:
    """Of the processor, the best of three: another job on the machine does not count."""
    code = "import time, torch\nstart = time.process_time()\nimport nlm\n"
    assert min(ran(f"{code}print(time.process_time() - start)") for _ in range(3)) <= 0.3
