"""``nlm bench`` runs every operation's workloads, and its gate names what became slower."""

import copy
import json
from pathlib import Path

import pytest

import nlm
from nlm._registry import operations
from nlm.cli.app import run

STEMS = {operation.stem for operation in operations().values()}


def row(workload: str, seconds: float, part: float | None = None, provider: str = "nlm") -> dict:
    values = {"op": "permute", "workload": workload, "dtype": "float32", "threads": 2,
              "provider": provider, "median_s": seconds}  # fmt: skip
    return values if part is None else values | {"fraction_of_limit": part}


OLD = {
    "machine": "m",
    "rows": [row("rows", 1e-3, 0.8), row("both", 2e-3, 0.4), row("rows", 9e-3, 0.1, "peer")],
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(OLD))
    return old, new


def gate(files: tuple[Path, Path], new: dict, *options: str) -> int:
    files[1].write_text(json.dumps(new))
    return run(["bench", "compare", *map(str, files), *options])


def test_a_quick_run_of_every_operation_and_its_peers(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    command = ["bench", "--peers", "--quick", "--threads", "1", "--json", str(target)]
    assert run(command) == 0
    providers: dict[str, list[str]] = {stem: [] for stem in STEMS}
    for each in json.loads(target.read_text())["rows"]:
        providers[each["op"]].append(each["provider"])
    assert all(names[0] == "nlm" and len(names) > 1 for names in providers.values()), providers


def test_the_default_file_is_replaced_only_where_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bench", "scale_shift", "--quick"]
    Path("bench.json").write_text(json.dumps(OLD))
    assert run(command) == 0
    assert json.loads(Path("bench.json").read_text())["rows"][0]["op"] == "scale_shift"
    Path("bench.json").write_text("mine")
    assert run(command) == 1
    assert Path("bench.json").read_text() == "mine"
    assert "only with force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "nlm bench: an operation is one of assignment, "),
        (
            ["scale_shift", "--workload", "nothing"],
            "--workload is part of a workload's name, got 'n",
        ),
    ],
)
def test_a_wrong_name_gets_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "results.json"
    assert run(["bench", *arguments, "--quick", "--json", str(target)]) == 1
    assert sentence in capsys.readouterr().err
    assert not target.exists()


def test_without_the_workloads_a_sentence_says_where_they_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(nlm, "__file__", str(tmp_path / "nlm" / "__init__.py"))
    assert run(["bench", "--json", str(tmp_path / "results.json")]) == 1
    assert f"got none in {tmp_path / 'nlm'} or {tmp_path}" in capsys.readouterr().err


def test_the_help_names_the_commands(capsys: pytest.CaptureFixture) -> None:
    assert run(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "compare" in out and "run" in out and "--peers" in out


def test_the_gate_lets_the_same_and_the_faster_pass(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    assert gate(files, OLD) == 0
    assert capsys.readouterr().out == "2 workloads compared, 0 more than 1.2 times slower\n"
    assert gate(files, {"machine": "m", "rows": [row("both", 1e-3, 0.9)]}) == 0
    assert "; 1 of old.json are not in new.json" in capsys.readouterr().out


def test_the_gate_names_what_is_slower(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    new = copy.deepcopy(OLD)
    new["rows"][1] = row("both", 3e-3, 0.25)
    new["rows"][2]["median_s"] = 1.0  # a peer: not ours to answer for
    assert gate(files, new) == 1
    assert capsys.readouterr().out.splitlines() == [
        "permute, both, float32, threads 2: 1.60 times slower "
        "(2 ms, 40 % of the limit -> 3 ms, 25 % of the limit)",
        "2 workloads compared, 1 more than 1.2 times slower",
    ]
    assert gate(files, new, "--worse", "1.7") == 0


def test_a_slow_machine_is_no_regression_and_no_limit_means_seconds(
    files: tuple[Path, Path],
) -> None:
    new = copy.deepcopy(OLD)
    new["rows"][0]["median_s"] = 2e-3  # its limit was half as well
    assert gate(files, new) == 0
    files[0].write_text(json.dumps({"machine": "m", "rows": [row("rows", 1e-3)]}))
    assert gate(files, new) == 1


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (OLD | {"machine": "n"}, "both runs are of one machine, got 'm' and 'n'"),
        (OLD | {"quick": True}, "a quick run is one unwarmed round"),
        (OLD | {"rows": [row("other", 1.0)]}, "the runs share a workload, got 2 in"),
        (OLD | {"rows": [{}]}, "a file of results is what nlm bench writes"),
        ([], "a file of results is what nlm bench writes"),
    ],
)
def test_the_gate_compares_what_can_be(
    files: tuple[Path, Path], new: dict, sentence: str, capsys: pytest.CaptureFixture
) -> None:
    assert gate(files, new) == 1
    assert sentence in capsys.readouterr().err
