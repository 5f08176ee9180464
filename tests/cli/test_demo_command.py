"""``nlm demo``: its table, its files, and what it refuses before the work starts."""

import json
import os
from pathlib import Path

import pytest

from nlm.cli.app import run


def test_table_json_and_report(experiment, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--json", "out.json", "--seed", "3"]) == 0
    assert experiment.calls == [{"seed": 3, "tasks": 8}]
    out, err = capsys.readouterr()
    assert "4 tasks: normalised accuracy" in out and "8 tasks: normalised accuracy" in out
    assert "0.870 / 0.696" in out  # permuted + TACT at 8 tasks
    assert "TACT at λ = 0" in out and "TACT, all at once" in out
    table = [line for line in out.splitlines() if " / " in line]
    assert len(table) == 16 and max(map(len, table)) <= 80
    assert "training foundation A" in err and "training foundation A" not in out
    written = json.loads(Path("out.json").read_text())
    assert written["seed"] == 3
    assert written["settings"]["permuted"]["8"]["tact"]["average"] == pytest.approx(0.87)
    assert Path("report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "report.html"]


def test_fewer_tasks_give_one_table(experiment, capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--tasks", "4", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "4 tasks:" in out and "8 tasks" not in out
    assert err == ""


def test_an_earlier_report_is_replaced_and_another_file_is_kept(experiment) -> None:
    assert run(["demo", "--quiet"]) == 0
    assert run(["demo", "--quiet", "--seed", "1"]) == 0
    assert "seed 1" in Path("report.html").read_text()
    Path("report.html").write_text("my thesis")
    assert run(["demo", "--quiet"]) == 1
    assert Path("report.html").read_text() == "my thesis"
    assert len(experiment.calls) == 2


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_an_existing_file_is_refused_before_the_work(
    experiment, option: str, capsys: pytest.CaptureFixture
) -> None:
    Path("file").write_text("precious")
    assert run(["demo", option, "file", "--quiet"]) == 1
    assert experiment.calls == []
    assert Path("file").read_text() == "precious"
    error = capsys.readouterr().err
    assert "--force" in error and "'file'" in error and error.count("\n") == 1
    assert run(["demo", option, "file", "--quiet", "--force"]) == 0
    assert Path("file").read_text() != "precious"


def test_one_file_for_both_is_refused(experiment, capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--json", "x", "--report", "./x"]) == 1
    assert "--json and --report must be two files" in capsys.readouterr().err
    assert experiment.calls == []


def test_a_missing_folder_is_refused_before_the_work(
    experiment, capsys: pytest.CaptureFixture
) -> None:
    assert run(["demo", "--json", "nowhere/out.json"]) == 1
    assert "the folder of an output file must exist, got 'nowhere'" in capsys.readouterr().err
    assert experiment.calls == []


def test_a_read_only_folder_is_refused_before_the_work(
    experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert run(["demo"]) == 1
    assert "the folder of an output file must be writable" in capsys.readouterr().err
    assert experiment.calls == []


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("nlm.align: the rule, got 3"), 1, "nlm.align: the rule, got 3\n"),
        (RuntimeError("out of memory"), 1, "nlm: out of memory\n"),
        (KeyError(), 1, "nlm: KeyError\n"),
        (ModuleNotFoundError("x", name="rich"), 1, "nlm: the command line needs rich, got no such"),
        (KeyboardInterrupt(), 130, "nlm: stopped\n"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_no_file(
    experiment, error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture
) -> None:
    experiment.error = error
    assert run(["demo", "--json", "out.json", "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence) and captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(Path().iterdir()) == []


def test_a_traceback_is_there_for_who_asks(experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment.error = RuntimeError("bug")
    monkeypatch.setenv("NLM_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="bug"):
        run(["demo", "--quiet"])


def test_a_warning_is_one_line_on_stderr(
    experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import sys
    import warnings

    def warn(seed: int, tasks: int, progress: object) -> dict:
        warnings.warn("nlm.demo: a cached file must be whole", stacklevel=1)
        return experiment.run(seed, tasks)

    monkeypatch.setattr(sys.modules["nlm.demo.experiment"], "run", warn)
    assert run(["demo"]) == 0
    assert capsys.readouterr().err == "warning: nlm.demo: a cached file must be whole\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--tasks", "9"], "--tasks"),
        (["demo", "--tasks", "1"], "--tasks"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--colour"], "--colour"),
        (["dmeo"], "dmeo"),
    ],
)
def test_wrong_use_is_one_sentence_and_code_two(
    experiment, arguments: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("nlm: ") and named in error and error.count("\n") == 1
    assert experiment.calls == []
