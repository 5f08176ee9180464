"""Inputs that no one means to give, and some do: pipes and devices, names that steer a terminal,
headers that another reader would not take, archives that unpack without end, outputs among inputs.
"""

import json
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _readers import Examiner
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_security import SHAPES, state

from nlm.checkpoint import DamagedFileError, open_checkpoint
from nlm.checkpoint.plain_yaml import parse_yaml
from nlm.checkpoint.tensors import read_shapes
from nlm.cli import progress
from nlm.cli.app import run
from nlm.recipe import RecipeError, data, read_recipe
from nlm.symmetry import AxisGroup, PermutationSpec
from nlm.symmetry.layout import Ref, parse


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        save_file(state(seed), tmp_path / name / "weights.safetensors")
    return written(tmp_path / "recipe.yaml")


def written(file: Path, output: str = "out", more: str = "") -> Path:
    file.write_text(
        "base: base\nexperts: {one: one, two: two}\nmethod: task_arithmetic\n"
        f"output: {{path: {output}}}\n{more}"
    )
    return file


@contextmanager
def at_once() -> Iterator[None]:
    """Within, a minute of a clock on the wall end in an error: a pipe is waited for."""

    def late(*_: Any) -> None:
        raise TimeoutError("it waits")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


# --- pipes and devices ----------------------------------------------------------------------------


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "p.safetensors")
    return folder / "p.safetensors"


def a_pipe_of_pytorch(folder: Path) -> Path:
    os.mkfifo(folder / "p.bin")
    return folder / "p.bin"


def an_index_of_a_pipe(folder: Path) -> Path:
    a_pipe(folder)
    index = {"weight_map": dict.fromkeys(SHAPES, "p.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def a_folder_of_a_pipe(folder: Path) -> Path:
    return a_pipe(folder).parent


@pytest.mark.parametrize(
    "make",
    [
        a_pipe,
        a_pipe_of_pytorch,
        an_index_of_a_pipe,
        a_folder_of_a_pipe,
        lambda _: Path("/dev/zero"),
        lambda _: Path("/dev/null"),
    ],
)
def test_a_checkpoint_that_is_no_file(make: Callable[[Path], Path], tmp_path: Path) -> None:
    target = make(tmp_path)
    with at_once(), pytest.raises((ValueError, FileNotFoundError), match=r"^nlm: .*, got") as error:
        open_checkpoint(target)
    assert "\n" not in str(error.value)


def test_pipes_beside_weights_are_passed_over(recipe, tmp_path):
    """Where they stand for an index, a configuration or another file of a model's folder."""
    folder = tmp_path / "base"
    for name in ("model.safetensors.index.json", "config.json", "p.safetensors", "notes.txt"):
        os.mkfifo(folder / name)
    with at_once():
        assert run(["merge", str(recipe), "--quiet"]) == 0
        assert read_shapes(folder) == SHAPES
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "README.md",
        "model.safetensors",
    }


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_specification_that_is_a_device(device):
    with at_once(), pytest.raises(FileNotFoundError, match="a specification is a file"):
        PermutationSpec.load(device)


def test_a_recipe_through_a_pipe(recipe, tmp_path, capsys):
    """It is read once: another one is known for another when the merge is resumed."""
    text = recipe.read_text().replace("base: base", f"base: {tmp_path}/base")
    for name in ("one", "two"):
        text = text.replace(f"{name}: {name}", f"{name}: {tmp_path}/{name}")
    text = text.replace("path: out", f"path: {tmp_path}/out")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def merged(text: str, *arguments: str) -> int:
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        with at_once():
            code = run(["merge", str(pipe), "--quiet", *arguments])
        writer.join()
        return code

    assert merged(text) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "    method: task_arithmetic\n" in card
    assert merged(text, "--resume") == 0
    capsys.readouterr()
    assert merged(text.replace("method: task_arithmetic", "method: linear"), "--resume") == 1
    assert "is of the same recipe and the same inputs, got another" in capsys.readouterr().err


# --- names ----------------------------------------------------------------------------------------

STEERING = "\x1b]0;mine\x07\x1b[2J\r\x9b31m[/bold][red]\u202e\nnlm: all is well"


def test_names_steer_no_terminal(tmp_path, capsys):
    """Of tensors, tasks and files: in errors, lines of progress, tables."""
    for seed, name in enumerate(("base", "one", "two")):
        save_file({STEERING: torch.full((4, 4), float(seed))}, tmp_path / f"{name}.safetensors")
    recipe = tmp_path / "recipe.yaml"
    text = (
        "base: base.safetensors\nexperts: {one: one.safetensors, two: two.safetensors}\n"
        "method: task_arithmetic\noutput: {path: out}\n"
    )
    recipe.write_text(text)
    commands = [("merge", recipe), ("check", recipe), ("merge", tmp_path / STEERING)]
    save_file({STEERING: torch.full((4, 4), torch.nan)}, tmp_path / "nan.safetensors")
    for number, wrong in enumerate((
        text.replace("one.safetensors", "nan.safetensors").replace("out", "other"),
        text.replace("{one:", '{"\\e[2Jone":'),
        text.replace("task_arithmetic", '!!int "a\\nb\\e[2J"'),
        text.replace("method", '"\\e[2J": 3\nmethod'),
    )):  # fmt: skip
        file = tmp_path / f"{number}.yaml"
        file.write_text(wrong)
        commands += [("merge", file), ("check", file)]
    for command, file in commands:
        run([command, str(file)])
        said = capsys.readouterr()
        assert said.out + said.err
        for line in (said.out + said.err).split("\n"):
            assert line.isprintable(), (command, file, line)
            assert not line.startswith("nlm: all is well")


def test_names_are_no_markup_of_the_bar(monkeypatch, capsys):
    """rich would read "[/bold]" as the end of something, and raise where nothing began."""
    import io

    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=shown, force_terminal=True, width=200)
    )
    with progress.progress_bar(quiet=False, size=100) as report:
        assert report is not None
        for share in (0.1, 0.9):
            report(STEERING, share)
    text = shown.getvalue()
    assert "\\x1b]0;mine\\x07" in text and "[/bold][red]" in text
    assert "\x1b]0;" not in text and "\x1b[2J\r" not in text


def test_half_a_pair_of_utf16_on_a_page(tmp_path):
    page, group = tmp_path / "s.html", AxisGroup("g0", 2, origin="t\ud800")
    PermutationSpec({"g0": group}, {"w": (Ref("g0", 2),)}).save(tmp_path / "s.json")
    assert run(["spec", "show", str(tmp_path / "s.json"), "--html", str(page)]) == 0
    assert "t?" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": "t\ud800"}, "surrogates not allowed"),
        ({"projections": {"p" * 100_000: {"a": [[0.0, 1.0]]}}}, "a text of 100000 letters"),
        ({"projections": {"p": {"a": [[1e308, 1.0], [-1e308, 3.0]]}}}, "a number beyond 1e"),
        ({"projections": {"p": {"a": [[10**300, 1.0], [0.0, 3.0]]}}}, "a number beyond 1e"),
    ],
)
def test_results_that_no_picture_shows(change, message, tmp_path, capsys):
    """Found by drawing 2,000 examples: a singular matrix, and minutes for one name."""
    examiner = Examiner("results")
    (tmp_path / "r.json").write_text(json.dumps(json.loads(examiner.good) | change))
    examiner.close()
    page = tmp_path / "r.html"
    assert run(["report", str(tmp_path / "r.json"), "-o", str(page)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not page.exists()


def test_a_number_whose_time_grows_as_its_square(tmp_path):
    """YAML 1.1 reads "1:1:1" to the base 60: 600 kB took 46 s."""
    for text in ("1:" * 5000 + "1", "0x" + "f" * 5000):
        with pytest.raises(ValueError, match="a number of more than 100 characters"):
            parse_yaml(f"a: {text}")
    assert parse_yaml("a: 1:30") == {"a": 90}


def test_texts_of_layouts(tmp_path):
    assert str(parse("(" * 50 + "g0:6" + ")" * 50)) == "g0:6"
    with pytest.raises(ValueError, match="at most 50 brackets within each other"):
        parse("(" * 5000 + "g0:6" + ")" * 5000)
    many = {f"g{n}": AxisGroup(f"g{n}", 1 << 62) for n in range(300)}
    spec = PermutationSpec(many | {"x": AxisGroup("x", 2, tuple(many))}, {})
    assert "at least 2^18600 permutations" in spec.show()
    with pytest.raises(ValueError, match="a group has 0 or more units"):
        PermutationSpec({"x": AxisGroup("x", 1 << 63)}, {})


def test_a_name_that_is_too_long_in_an_index(tmp_path):
    index = {"weight_map": {"a": "x" * 300}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="files of a checkpoint must exist"):
        open_checkpoint(tmp_path)


def test_a_folder_whose_name_is_not_utf8(recipe, tmp_path):
    assert run(["merge", str(recipe), "--quiet"]) == 0
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    other.mkdir()
    for each in ("base", "one", "two", "recipe.yaml"):
        os.rename(tmp_path / each, other / each)
    assert run(["merge", str(other / "recipe.yaml"), "--quiet"]) == 0
    merged = [(each / "out" / "model.safetensors").read_bytes() for each in (tmp_path, other)]
    assert merged[0] == merged[1]
    assert "caf\\udce9" in (other / "out" / "README.md").read_text(encoding="utf-8")


# --- headers and archives -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}', "that are no list"),
        ('{"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}}', "that are no list"),
        ('{"a\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', "surrogates"),
        (
            '{"__metadata__": [], "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
            "whole",
        ),
        (
            '{"__metadata__": "", "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
            "whole",
        ),
    ],
)
def test_headers_that_safetensors_does_not_take(text, message, tmp_path):
    """What is merged of them would be a file that nothing else reads."""
    file = tmp_path / "a.safetensors"
    for encoded in (text.encode(), text.replace("{}", "[]").encode("utf-16")):
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"1234")
        with pytest.raises(Exception, match="Error while deserializing"):
            load_file(file)
        with pytest.raises(
            DamagedFileError, match=message if encoded == text.encode() else "whole"
        ):
            open_checkpoint(file)


def test_a_pickle_that_is_packed(tmp_path):
    """A few bytes may unpack to any number; torch.save packs none."""
    torch.save(state(0), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert open_checkpoint(tmp_path / "a.pt").tensors.keys() == SHAPES.keys()
    with pytest.raises(DamagedFileError, match=r"compressed, as torch.save writes none"):
        open_checkpoint(tmp_path / "b.pt")


def test_inputs_that_unpack_to_a_thousand_times_their_size(tmp_path, monkeypatch):
    file = tmp_path / "d.npz"
    np.savez_compressed(file, x=np.zeros((1000, 500), np.float32))
    assert file.stat().st_size < 10_000
    assert data._shapes(file) == {"x": (1000, 500)}
    monkeypatch.setattr(data, "_UNPACKED", 1_000_000)
    with pytest.raises(DamagedFileError, match=r"2000\d\d\d bytes that are packed in \d{4}"):
        data._shapes(file)


# --- recipes --------------------------------------------------------------------------------------


def test_whole_numbers_are_exact(recipe):
    most = (str(2**63 - 1), 2**63 - 1)
    for text, seed in (("9007199254740993", 2**53 + 1), ("1e3", 1000), ("1_0", 10), most):
        assert read_recipe(written(recipe, more=f"seed: {text}\n")).seed == seed
    for text in ("9223372036854775808", "1e300"):
        with pytest.raises(RecipeError, match=r"from 0 and below 2\^63, got"):
            read_recipe(written(recipe, more=f"seed: {text}\n"))


def test_nothing_that_is_read_is_replaced(recipe, tmp_path, capsys):
    """The recipe and its files, in an output that ``--force`` would replace; a file of weights
    among the only one of an input."""
    assert run(["merge", str(recipe), "--quiet"]) == 0
    inside = written(tmp_path / "out" / "recipe.yaml", "../out")
    inside.write_text(inside.read_text().replace("base: base", "base: ../base").replace(
        "{one: one, two: two}", "{one: ../one, two: ../two}"))  # fmt: skip
    before = {each: each.read_bytes() for each in (tmp_path / "out").iterdir()}
    for command in (["merge", str(inside), "--force"], ["merge", str(recipe), "--force"]):
        capsys.readouterr()
        if command[1] == str(recipe):
            save_file({"x": torch.ones(2, 4)}, tmp_path / "out" / "d.safetensors")
            before[tmp_path / "out" / "d.safetensors"] = b""
            written(recipe, more="correct: {method: refit, data: {one: out/d.safetensors, two: "
                    "out/d.safetensors}}\n")  # fmt: skip
        assert run(command) == 1
        assert "does not hold an input" in capsys.readouterr().err
        assert {each for each in (tmp_path / "out").iterdir()} == before.keys()

    assert run(["merge", str(written(recipe, "one/merged.safetensors"))]) == 1
    assert "lies in no input's folder" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "one").iterdir()] == ["weights.safetensors"]
    index = {"weight_map": dict.fromkeys(SHAPES, "weights.safetensors")}
    (tmp_path / "one" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(["check", str(written(recipe, "one/merged.safetensors"))]) == 0


def test_inputs_stay_as_they_are(recipe, tmp_path):
    """Their folders are not written to, and a hard link in the output's place is not followed."""

    def seen() -> dict[Path, tuple[int, bytes]]:
        files = (file for name in ("base", "one", "two") for file in (tmp_path / name).iterdir())
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = seen()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in ("base", "one", "two")}
    os.link(tmp_path / "one" / "weights.safetensors", tmp_path / "out.safetensors")
    assert run(["merge", str(written(recipe, "out.safetensors")), "--quiet", "--force"]) == 0
    assert run(["merge", str(written(recipe, "out")), "--quiet"]) == 0
    assert seen() == before
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in times}
    assert load_file(tmp_path / "out.safetensors").keys() == SHAPES.keys()


def test_an_output_through_links_that_go_round(recipe, tmp_path, capsys):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert run(["merge", str(written(recipe, "a/out"))]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "folder" in said


def test_notes_nested_by_the_thousand(recipe, tmp_path):
    """In the half of a checkpoint: notes that say nothing."""
    assert run(["merge", str(recipe), "--quiet"]) == 0
    notes = tmp_path / ".out.partial" / ".nlm"
    notes.mkdir(parents=True)
    (notes / "journal.json").write_text("[" * 100_000)
    assert run(["merge", str(recipe), "--quiet", "--force"]) == 0
