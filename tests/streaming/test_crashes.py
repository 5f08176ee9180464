"""Killed, resumed, out of disk, two at once: an output is whole or not there."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming._checkpoints import write
from streaming._plans import completed, plan_of

from nlm.checkpoint import open_checkpoint
from nlm.checkpoint.shards import sha256_of
from nlm.streaming import run

MERGE = """
import signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from streaming._plans import plan_of
from nlm.streaming import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root = Path({root!r})
experts = {{task: root / task for task in ("one", "two", "three")}}
plan = plan_of(root / "out", root / "base", experts, "ties", dialect={dialect!r}, shard_bytes=1500)
def progress(what, share):
    print(what, flush=True)
    {act}
print(run(plan, "r", resume={resume}, progress=progress).resumed)
"""


def child(root: Path, act: str = "pass", resume: bool = False, dialect: str = "global", **kw):
    tests = str(Path(__file__).parents[1])
    code = textwrap.dedent(MERGE).format(
        root=str(root), act=act, resume=resume, tests=tests, dialect=dialect
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, text=True, capture_output=True, **kw)


@pytest.mark.parametrize("dialect", ["global", "peft"])
def test_a_killed_merge_is_resumed(models, tmp_path, dialect):
    """After kill -9 there is no output; what was finished is taken up, and the end is the same."""
    _, _, base_path, paths = models()
    expected = tmp_path / "expected"
    run(plan_of(expected, base_path, paths, "ties", dialect=dialect, shard_bytes=1500))
    kill = "import os; os.kill(os.getpid(), 9) if what == 'norm.weight' else None"
    done = child(tmp_path, kill, dialect=dialect)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / ".nlm" / "journal.json").exists()
    torn = next(iter(sorted((tmp_path / ".out.partial").glob("*.safetensors"))))
    data = bytearray(torn.read_bytes())
    data[-1] ^= 1  # a finished file that the disk did not keep is not taken up
    torn.write_bytes(data)
    done = child(tmp_path, resume=True, dialect=dialect)
    assert done.returncode == 0, done.stderr
    resumed = eval(done.stdout.splitlines()[-1])
    assert len(resumed) >= 1 and torn.name not in resumed
    for file in open_checkpoint(expected).files:
        assert sha256_of(file) == sha256_of(tmp_path / "out" / file.name)
    assert not list(tmp_path.glob(".*"))


def test_another_recipe_is_not_resumed(models, tmp_path):
    models()
    child(tmp_path, "import os; os.kill(os.getpid(), 9) if what == 'norm.weight' else None")
    done = child(tmp_path, resume=True, dialect="peft")
    assert done.returncode != 0 and "without --resume it is begun anew" in done.stderr
    assert (tmp_path / ".out.partial" / ".nlm" / "journal.json").exists()
    assert child(tmp_path, dialect="peft").returncode == 0


def test_a_full_disk_is_an_error_and_can_be_resumed(models, tmp_path):
    """The system refuses to let a file grow, as it does on a full disk."""
    models()
    limit = 900

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = child(tmp_path, preexec_fn=limited)
    assert done.returncode != 0 and "OSError" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_input_that_becomes_shorter_ends_the_process_with_a_sentence(models, tmp_path):
    _, _, _, paths = models()
    cut = f"import os; os.truncate({str(paths['one'] / 'model.safetensors')!r}, 4096)"
    big = {"a.weight": torch.zeros(64), "w.weight": torch.zeros(400_000)}
    for path in (tmp_path / "base", *paths.values()):
        save_file(big, path / "model.safetensors")
    done = child(tmp_path, cut, dialect="peft")
    assert done.returncode == 1 and done.stderr == (
        "nlm: an input must stay as it is while it is read, got "
        f"'{paths['one'] / 'model.safetensors'}', which became shorter or cannot be read\n"
    )
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_output(models, tmp_path):
    models()
    sleep = "import time; time.sleep(30) if what == 'norm.weight' else None"
    tests = str(Path(__file__).parents[1])
    code = MERGE.format(root=str(tmp_path), act=sleep, resume=False, tests=tests, dialect="peft")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.strip() == "norm.weight":
                break
        second = child(tmp_path)
        first.kill()
    assert "one process at a time writes an output" in second.stderr
    assert child(tmp_path).returncode == 0


LIGHT = """
import re, sys, threading
from pathlib import Path
from nlm.checkpoint import open_checkpoint
from nlm.streaming import Plan, run
root, method, memory = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
models = {name: open_checkpoint(root / name) for name in ("base", "one", "two")}
base = models.pop("base")
plan = Plan(
    root / method, models, base, method, lambda what, task, name: 0.5, {"seed": 1}, memory=memory
)
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, peak, ended = own(), 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, own())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
run(plan, sync=False)
ended.set()
watcher.join()
print(peak - before, "torch" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts memory so")
def test_memory_is_what_is_allowed_and_torch_is_not_imported(tmp_path):
    """Three models of 48 MB each, merged in 12 MiB of the process's own (RssAnon): what the
    process takes more than before is within them."""
    for name in ("base", "one", "two"):
        write(tmp_path / name, {f"w{k}.weight": torch.randn(3000, 1000) for k in range(4)})
    for method in ("ties", "dare"):
        command = [sys.executable, "-c", LIGHT, str(tmp_path), method, str(12 << 20)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, text=True, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        grown, has_torch = done.stdout.split()
        assert has_torch == "False" and 0 < int(grown) < 12 * 1024


def test_what_was_finished_for_another_recipe_is_not_taken_up(models, tmp_path):
    """Also where a process died as it was making room for the new one."""
    models()
    kill = "import os; os.kill(os.getpid(), 9) if what == 'norm.weight' else None"
    child(tmp_path, kill)
    (tmp_path / ".out.partial" / ".nlm" / "journal.json").unlink()
    done = child(tmp_path, resume=True, dialect="peft")
    assert done.returncode == 0 and eval(done.stdout.splitlines()[-1]) == ()


def test_a_replaced_folder_comes_back(models, tmp_path):
    """A process that dies between the two renames leaves the old checkpoint under another name."""
    _, _, base_path, paths = models()
    out = tmp_path / "out"
    run(plan_of(out, base_path, paths, "linear"))
    before = sha256_of(out / "model.safetensors")
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(FileExistsError, match="overwritten only with force"):
        run(plan_of(out, base_path, paths, "ties"))
    assert sha256_of(out / "model.safetensors") == before
    assert not list(tmp_path.glob(".*"))


def test_what_is_not_nlms_is_left_alone(models, tmp_path):
    _, _, base_path, paths = models()
    plan = plan_of(tmp_path / "out", base_path, paths, "linear")
    for name in (".out.partial", ".out.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("dear")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.json").write_text("mine")
    with pytest.raises(FileExistsError):
        run(plan, force=True)
    (tmp_path / ".out.replaced" / "letter.txt").unlink()
    (tmp_path / ".out.replaced").rmdir()
    with pytest.raises(FileExistsError):
        run(plan, force=True)
    assert (tmp_path / ".out.partial" / "letter.txt").read_text() == "dear"
    assert (tmp_path / "out" / "journal.json").read_text() == "mine"


def test_inputs_are_not_overwritten(models, tmp_path):
    _, _, base_path, paths = models()
    for output in (paths["one"], tmp_path, paths["one"] / "model.safetensors"):
        with pytest.raises((ValueError, FileExistsError), match=r"an input|no other folders"):
            run(plan_of(output, base_path, paths, "linear"), force=True)
    assert all((path / "model.safetensors").exists() for path in paths.values())


def test_an_output_that_is_a_link(models, tmp_path):
    _, _, base_path, paths = models()
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for force in (False, True, True):
        run(plan_of(tmp_path / "out", base_path, paths, "linear"), force=force)
    assert (tmp_path / "out").is_symlink() and open_checkpoint(tmp_path / "disk" / "real").tensors
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_an_input_that_was_replaced_after_its_header_was_read(models, tmp_path):
    _, experts, base_path, paths = models()
    plan = plan_of(tmp_path / "out", base_path, paths, "linear")
    save_file(dict(reversed(experts["two"].items())), paths["two"] / "model.safetensors")
    with pytest.raises(RuntimeError, match="must stay as it is while it is read"):
        run(plan)


def test_names_of_tasks_are_names_of_files(models, tmp_path):
    _, _, base_path, paths = models()
    named = {"a/b": paths["one"], "a_b": paths["two"], "..": paths["three"]}
    plan = plan_of(tmp_path / "out", base_path, named, "linear", heads=("norm",))
    run(plan, write_others=lambda to, files: completed(to, plan, "", files))
    heads = [load_file(file)["norm.weight"] for file in (tmp_path / "out" / "heads").iterdir()]
    assert len(heads) == 3 and not torch.equal(heads[0], heads[1])
    for name in ("x" * 300, "x\0y", ""):
        with pytest.raises(ValueError, match="a task's name is printable and at most 200 bytes"):
            run(plan_of(tmp_path / "other", base_path, {name: paths["one"]}, "linear"))
    with pytest.raises(ValueError, match="heads are written to a folder"):
        run(plan_of(tmp_path / "o.safetensors", base_path, named, "linear", heads=("norm",)))
