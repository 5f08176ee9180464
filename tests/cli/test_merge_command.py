"""``nlm merge`` as its users meet it: progress, exit codes, quiet, JSON; completion, quick help."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from nlm.cli.app import run
from nlm.cli.progress import _now_and_then

ROWS = 3000


@pytest.fixture
def recipe(tmp_path):
    for seed, name in enumerate(("base", "one", "two")):
        made = torch.Generator().manual_seed(seed)
        state = {f"{k}.weight": torch.randn(ROWS, 100, generator=made) for k in range(6)}
        save_file(state, tmp_path / f"{name}.safetensors")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "base: base.safetensors\nexperts: {one: one.safetensors, two: two.safetensors}\n"
        "method: task_arithmetic\noutput: {path: out, shard: 2MB}\n"
    )
    return file


def test_progress_in_bytes(recipe, capsys):
    """Where stderr is no terminal a line at first, one at the end, and not one for each tensor."""
    assert run(["merge", str(recipe)]) == 0
    said = capsys.readouterr()
    size = f"{4 * 6 * ROWS * 100 * 4 / 1e6:.3g} MB"  # three models are read and one is written
    pattern = rf" *[\d.]+ s 100%  {size} of {size}, [\d.]+ .?B a second, 0 s left  5.weight"
    assert re.fullmatch(pattern, said.err.splitlines()[-1]), said.err
    assert 2 <= said.err.count("\n") <= 6
    assert re.match(r"6 tensors, 7.2 MB in .* the output is .*out\n", said.out)


def test_the_time_that_is_left(capsys):
    """A second after a quarter is done, three are left."""
    clock = iter([0.0, 0.5, 0.6, 1.0, 1.0, 1.4, 2.0, 5.0])
    report = _now_and_then(Console(stderr=True), 400_000_000, lambda: next(clock))
    for tensor in "ab":
        report(f"permuting: {tensor}", 0.0)
    for share in (0.0, 0.01, 0.1, 0.26, 1.0):
        report("a", share)
    assert capsys.readouterr().err.splitlines() == [
        "   0.5 s   0%  0 B of 400 MB  permuting: a",
        "   1.0 s   0%  0 B of 400 MB  a",
        "   1.0 s   1%  4 MB of 400 MB  a",
        "   2.0 s  26%  104 MB of 400 MB, 100 MB a second, 3 s left  a",
        "   5.0 s 100%  400 MB of 400 MB, 99 MB a second, 0 s left  a",
    ]


def test_quiet_and_json(recipe, capsys):
    assert run(["merge", str(recipe), "--quiet", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err == "" and found["tensors"] == 6 and len(found["files"]) == 6
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found["files"].values())


def test_exit_codes(recipe, capsys):
    """0 done, 1 failed with a sentence, 2 wrong use; as the help says."""
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done, 1 failed, with a sentence on stderr, 2 wrong use, 130" in text
    assert run(["merge", str(recipe), "--quiet"]) == 0
    assert run(["merge", str(recipe), "--quiet"]) == 1
    assert "replaced only with force" in capsys.readouterr().err
    assert run(["merge", str(recipe), "--much"]) == 2
    assert run(["merge", str(recipe), "--memory", "much"]) == 1
    assert "--memory is bytes such as 512MiB, got 'much'" in capsys.readouterr().err


def test_stopped_by_the_user(recipe):
    """Ctrl-C: exit code 130, one line, and what was finished is taken up."""
    out = recipe.parent / "out"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from nlm.cli import app, merge_command\n"
        "from nlm.checkpoint.partial import PartialCheckpoint\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "finish = PartialCheckpoint.finish\n"
        "def stopped(self, *given):\n"
        "    finish(self, *given)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "PartialCheckpoint.finish = stopped\n"
        "sys.exit(app.run(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", str(recipe), "--quiet"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "nlm: stopped\n")
    assert not out.exists()
    assert run(["merge", str(recipe), "--quiet", "--resume"]) == 0 and out.exists()


COMPLETE = """
export PATH={folder}:$PATH
eval "$(nlm --show-completion)"
complete() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
    _nlm_completion nlm
    echo "${{COMPREPLY[@]}}"
}}
complete nlm mer
complete nlm merge --me
complete nlm spec dis
"""


def test_completion_in_bash(tmp_path):
    """The shell asks the program itself, which imports no torch for it; and it can be installed."""
    program = tmp_path / "nlm"
    log = tmp_path / "imports"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -X importtime -m nlm "$@" 2>>{log}\n')
    program.chmod(0o755)
    script = tmp_path / "script.sh"
    script.write_text(COMPLETE.format(folder=tmp_path) + "nlm --install-completion\n")
    done = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines()[:3] == ["merge", "--memory", "discover"], done.stderr
    assert "nlm.cli" in log.read_text() and not re.search(r"\| +torch$", log.read_text(), re.M)
    installed = tmp_path / ".bash_completions" / "nlm.sh"
    assert "_NLM_COMPLETE=complete_bash" in installed.read_text()
    assert str(installed) in (tmp_path / ".bashrc").read_text()


def test_help_takes_a_quarter_of_the_time_that_torch_takes():
    """Of the processor, in one run."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert seconds("-m", "nlm", "--help") < seconds("-c", "import torch") / 4
