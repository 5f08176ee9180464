"""The runner of whole processes, on a module that every Python has."""

import argparse
import json
from pathlib import Path
from typing import Any

import _whole_processes as processes
import pytest
from _whole_processes import Command, Host


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    (folder / "in.json").write_text('{"a": 1}')
    return {"host": "json 1", "parameters": 1}


def commands(row: str, folder: Path) -> dict[str, Command]:
    found = {}
    for program in ("tool", "nlm", "other"):
        out = folder / f"{program}.json"
        out.touch()  # of a run before
        found[program] = Command("json.tool", [str(folder / "in.json"), str(out)], out)
    return found


def same(one: Path, other: Path) -> dict[str, Any]:
    return {"same": one.read_text() == other.read_text() != ""}


HOST = Host(
    "tool", "pip", ("a", "b"), prepare, commands,
    lambda folder: Command("json.tool", ["--help"], folder), same,
    lambda row, folder, options: {"more": row},
)  # fmt: skip


def test_programs_run_in_turns_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = processes.run

    def noted(module: str, arguments: list[str], threads: int) -> dict[str, float]:
        seen.append(Path(arguments[-1]).stem)
        return run(module, arguments, threads)

    monkeypatch.setattr(processes, "run", noted)
    file = tmp_path / "report.json"
    given = ["--repeat", "2", "--threads", "1", "--json", str(file), "--folder", str(tmp_path)]
    parser = processes.arguments(HOST, "Text.")
    processes.main(HOST, parser.parse_args([*given, "--rows", "a"]))
    assert seen == ["--help"] * 2 + ["tool", "nlm", "other"] * 2
    report = json.loads(file.read_text())
    [row] = report["rows"]
    assert report["host"] == "json 1" and report["repeat"] == row["repeat"] == 2
    assert row["peak"] == "VmHWM" and row["start_s"] == report["start_s"]
    assert row["same"] and row["other_same"] and row["more"] == "a"
    assert row["ratio"] == row["tool_s"] / row["nlm_s"] and len(row["nlm_all_s"]) == 2
    assert row["tool_worked_s"] > 0.005 and row["worked_ratio"] > 0
    assert row["tool_s"] > 0.005 and row["nlm_bytes"] > 10**6 and report["start_s"] > 0.005

    processes.main(HOST, parser.parse_args([*given, "--rows", "b", "--add"]))
    assert [row["method"] for row in json.loads(file.read_text())["rows"]] == ["a", "b"]
    assert not [each for each in tmp_path.iterdir() if each != file]


def test_the_peak_is_the_process_s_own() -> None:
    """Not that of the program that measures, which may have held more."""
    held = bytearray(b"x") * (300 << 20)
    found = processes.run("json.tool", ["--help"], 1)
    assert len(held) > 10 * found["bytes"] and found["bytes"] >= found["own"] > 10**6


def test_a_program_that_fails_says_what_it_said() -> None:
    with pytest.raises(SystemExit, match=r"(?s)json\.tool nowhere: .*No such file"):
        processes.run("json.tool", ["nowhere"], 1)


def test_a_checkout_has_to_be_named(tmp_path: Path) -> None:
    host = processes.from_checkout("zipit", "ZipIt", ("zip",), lambda row, size: {})
    options = argparse.Namespace(checkout=None, size="3")
    with pytest.raises(SystemExit, match="ZipIt is in no package: --checkout names a clone"):
        host.prepare(tmp_path, options)
