"""``nlm check``: a sentence for each problem and exit code 1, or what a merge will read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nlm.cli.app import run

RECIPE = "base: base.safetensors\nexperts: {a: a.safetensors}\nmethod: %s\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a"):
        save_file({"layer.weight": np.zeros((500, 4), np.float32)}, f"{name}.safetensors")
    Path("good.yaml").write_text(RECIPE % "task_arithmetic")


def test_a_good_recipe(capsys):
    assert run(["check", "good.yaml"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "one pass over 1 tensors" in out and "16 kB" in out and "8 kB" in out


def test_every_problem_is_a_line(capsys):
    Path("bad.yaml").write_text(RECIPE % "tie" + "seed: x\n")
    assert run(["check", "bad.yaml"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and [line.partition(": ")[0] for line in err.splitlines()] == [
        "bad.yaml:3", "bad.yaml:4",
    ]  # fmt: skip
    Path("a.safetensors").unlink()
    assert run(["check", "good.yaml"]) == 1
    assert capsys.readouterr() == (
        "", "good.yaml:2: a checkpoint must exist, got 'a.safetensors'\n",
    )  # fmt: skip


def test_json(capsys):
    assert run(["check", "good.yaml", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["problems"] == [] and content["forecast"]["written"] == 8000
    Path("base.safetensors").unlink()
    assert run(["check", "good.yaml", "--json"]) == 1
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert content["problems"] == err.splitlines() and content["forecast"] is None


def test_the_time_is_predicted(tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run(["merge", "good.yaml", "-o", "out", "--dry-run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["read"] == 16000 and content["seconds"] > 0
    assert min(content["rates"].values()) > 0
    assert run(["merge", "good.yaml", "-o", "out", "--dry-run"]) == 0
    assert "takes about" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_no_torch():
    code = (
        "import sys\nfrom nlm.cli.app import run\n"
        "code = run(['check', 'good.yaml'])\nsys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
