"""The harness: checked before timed, in turns, one report; and the pages made of reports."""

import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench
import _gpu
import _performance
import _whole_jobs
import bench_jobs
import pytest
import roofline
import torch
from _bench import Workload

import nlm
from nlm._registry import operations

ROOT = Path(__file__).parents[2]
X = torch.arange(6.0)


def workload(providers: dict[str, Callable], limit: str | None = "read") -> Workload:
    return Workload("six", torch.float32, providers, (X.double() + 1,), 1e-7, 24.0, limit)


def test_a_wrong_result_is_not_timed(capsys: pytest.CaptureFixture) -> None:
    calls = []

    def wrong() -> torch.Tensor:
        calls.append(1)
        return X + 1.001

    with pytest.raises(SystemExit, match=r"op, six: nlm errs by 1.7e-04, allowed is 1.0e-07"):
        _bench.run({"op": lambda: [workload({"nlm": wrong})]}, seconds=1.0)
    assert len(calls) == 1
    assert "ms" not in capsys.readouterr().out


def test_a_peer_that_gives_nan_is_refused() -> None:
    with pytest.raises(SystemExit, match="peer errs by inf"):
        _bench.check("op", workload({"nlm": lambda: X + 1, "peer": lambda: X * torch.nan}))


def test_providers_take_turns_and_a_report_has_the_format() -> None:
    order = []

    def provider(name: str) -> Callable:
        return lambda: order.append(name) or X + 1

    works = [workload({name: provider(name) for name in ("nlm", "a", "b")})]
    before = torch.get_num_threads()
    report = _bench.run({"op": lambda: works}, threads=(1, 2), seconds=0.01)
    assert torch.get_num_threads() == before
    assert order == ["nlm", "a", "b"] * (len(order) // 3)
    assert {"machine", "instruction set", "versions", "commit", "limits"} <= report.keys()
    keys = "op workload dtype threads provider median_s gbps limit fraction_of_limit error"
    assert [set(row) for row in report["rows"]] == [set(keys.split())] * 6
    assert [row["threads"] for row in report["rows"]] == [1, 1, 1, 2, 2, 2]
    for row in report["rows"]:
        assert row["gbps"] == pytest.approx(24 / row["median_s"] / 1e9)
        assert row["fraction_of_limit"] == pytest.approx(row["gbps"] / row["limit"])
        read = report["limits"][str(row["threads"])]["read"]
        assert read / 20 < row["limit"] < 20 * read
    json.dumps(report)


def test_without_peers_or_limit() -> None:
    works = [workload({"nlm": lambda: X + 1, "peer": pytest.fail}, limit=None)] * 2
    report = _bench.run({"op": lambda: works}, peers=False, quick=True)
    [row] = report["rows"]
    assert row["provider"] == "nlm" and "fraction_of_limit" not in row and report["quick"]


def _report(op: str, times: dict[str, float]) -> dict:
    rows = [
        {"op": op, "workload": "w", "dtype": "float32", "threads": 2, "provider": name,
         "median_s": seconds, "gbps": 1.0, "fraction_of_limit": 0.5, "error": 1e-7}
        for name, seconds in times.items()
    ]  # fmt: skip
    versions = {"torch": "2"}
    return {"machine": "m", "instruction set": "v3", "versions": versions, "commit": "c",
            "rows": rows}  # fmt: skip


def test_tables_name_the_fastest_peer(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "other.json").write_text(json.dumps({"rows": [{"model": "not of an operation"}]}))
    others = {"torch.compile": 4e-3, "eager": 8e-3, "clever": 3e-3}
    first = _report("first", {"nlm": 2e-3, "nlm in bfloat16": 1e-3, **others})
    (folder / "first.json").write_text(json.dumps(first))
    (folder / "second.json").write_text(json.dumps(_report("second", {"nlm": 1e-3})))
    (other := tmp_path / "n").mkdir()
    third = _report("third", {"nlm": 4e-3, **others})
    rows = [*third["rows"], *(row | {"workload": "v"} for row in third["rows"]), *first["rows"][:1]]
    slow = {**third, "machine": "n", "commit": "d", "rows": rows[:4] + rows[-1:]}
    (other / "third.json").write_text(json.dumps(slow))
    timings = _performance.load(tmp_path)
    table = _performance.readme_table(timings).splitlines()
    assert table[4].startswith("| `third` | 1 | 50 / 50 / 50 % | 2.00 / 2.00 / 2.00 x | 0.75 / ")
    assert "`third`: measured on n (v3), PyTorch 2, nlm at d." in "\n".join(table)
    assert "## third\n\nMeasured on n" in _performance.page(timings)
    assert table[2].startswith("| `first` | 1 | 50 / 50 / 50 % | 4.00 / 4.00 / 4.00 x | 1.50 / ")
    assert table[3] == "| `second` | 1 | 50 / 50 / 50 % | - | - |"
    assert "| w | float32 | 2 ms | 50 % | 4.00 x | 1.50 x, clever | 1e-07 | 1e-07 |" in (
        _performance.page(timings)
    )
    (folder / "again.json").write_text(json.dumps(first))
    with pytest.raises(ValueError, match="a timing is in one file"):
        _performance.load(tmp_path)


def test_a_job_runs_on_references_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    operation = operations()["tall_mask_apply"]

    def reference(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return operation.reference(*args)

    spied = dataclasses.replace(operation, reference=reference)
    monkeypatch.setattr(bench_jobs, "operations", lambda: {operation.name: spied})
    mask = torch.tensor([5], dtype=torch.uint8)
    job = bench_jobs.Job("apply", lambda: [nlm.ops.tall_mask_apply(mask, X, -X)], 0.0)
    row = bench_jobs.measure(job, 0.0)
    assert len(calls) == 2 and row["difference"] == 0.0
    assert row["ratio"] == row["references_s"] / row["kernels_s"]
    job.run()
    assert len(calls) == 2


def test_a_job_with_other_results_is_not_timed() -> None:
    numbers = iter((1.0, 1.1))
    job = bench_jobs.Job("odd", lambda: [torch.tensor(next(numbers))], 1e-3)
    with pytest.raises(SystemExit, match=r"odd: .* differ by 9\.1e-02"):
        bench_jobs.measure(job, 1.0)


def test_the_page_has_whole_jobs_where_they_were_measured(tmp_path: Path) -> None:
    assert _whole_jobs.sections(tmp_path) == []
    machine = {"machine": "m", "instruction set": "v4", "versions": {"torch": "2"}, "commit": "c"}
    (tmp_path / "m").mkdir()
    row = {"job": "align", "kernels_s": 0.5, "references_s": 1.0, "ratio": 2.0}
    (tmp_path / "m" / "jobs.json").write_text(json.dumps(machine | {"threads": 2, "rows": [row]}))
    common = {"workload": "pair", "groups": 3, "threads": 2, "state_bytes": 100, "added_bytes": 50}
    rows = [
        common | {"provider": "nlm", "seconds": 2.0, "sweeps": 4, "seconds_to_equal": 1.0},
        common | {"provider": "rebasin", "seconds": 5.0, "sweeps": 9, "complete": False},
        {"workload": "heads", "provider": "nlm", "threads": 2, "seconds": 0.25},
    ]
    (tmp_path / "m" / "weight_matching.json").write_text(json.dumps(machine | {"rows": rows}))
    lines = _whole_jobs.sections(tmp_path)
    assert "| align | 0.500 s | 1.000 s | 2.00 x |" in lines
    assert (
        "| pair | 3 | 2.0 s | 4 | 1.0 s | rebasin 5.0 s | 9, ended | > 5.00 x | 0.50 | 0.50 |"
        in lines
    )
    assert lines[-1] == "heads: nlm 250 ms."


def test_the_page_says_which_goals_of_alignment_are_missed() -> None:
    common = {"groups": 3, "state_bytes": 100, "added_bytes": 50, "sweeps": 4}
    rows: list[dict[str, Any]] = []
    runs = (("VGG16, a", 4.0, True), ("VGG16, b", 4.0, False), ("VGG16, c", 5.0, True))
    for name, seconds, complete in (*runs, ("ResNet-50, a", 1.0, True)):
        pair = common | {"workload": name, "complete": complete}
        rows.append(pair | {"provider": "nlm", "seconds": 2.0, "seconds_to_equal": 1.0})
        rows.append(pair | {"provider": "rebasin", "seconds": seconds})
    for provider, seconds in (("nlm", 1.0), ("scipy", 2.0)):
        rows.append({"workload": "heads", "provider": provider, "seconds": seconds})
    *_, told, _, heads = _whole_jobs.weight_matching({"rows": rows})
    assert told == (
        "To an equal objective, of the goals: VGG16, a, 5 times: missed (4.00 x); VGG16, b, 5 "
        "times: not shown, the peer was ended (> 4.00 x); VGG16, c, 5 times: met."
    )
    assert heads.endswith("At most a third of SciPy's time: missed (0.50).")
    row = {"workload": "w", "correlation": 1.0, "same_as_float32": 1.0, "over_forwards": 0.25}
    rows = [row | {"variant": "float32", "of_bound": 1.25, "residual": "all"},
            row | {"variant": "float32, 1 of 8 positions", "of_bound": 1.25}]  # fmt: skip
    assert _whole_jobs.activation_matching({"rows": rows})[-1].endswith(
        "missed: w, float32, by 0.10; w, float32, 1 of 8 positions, by 5 points. "
        'Residual streams: `residual="all"`.'
    )
    rows = [row | {"variant": "float32", "of_bound": 1.1}]
    assert ": met. Residual" in _whole_jobs.activation_matching({"rows": rows})[-1]


def test_times_are_called_linear_where_they_lie_on_a_line() -> None:
    row = {"method": "ties", "parameters": 1e9, "seconds": 5.0, "copy_s": 4.0, "gb_per_s": 2.0}
    row |= {"fraction": 0.8, "own": 2**26}
    for worst, told in ((0.06, "Time is linear in bytes: "), (0.32, "these runs do not show")):
        line = {"start_s": 0.1, "gb_per_s": 2.0, "worst": worst}
        text = _whole_jobs.scale({"rows": [row], "lines": {"ties": line}})[-1]
        assert told in text and f"further than {100 * worst:.0f} % from that" in text


@pytest.mark.parametrize(
    ("script", "make"),
    [
        ("readme", "performance_page"),
        ("roofline", "page"),
        ("barriers", "page"),
        ("corrections_page", "page"),
        ("transformer_tasks_page", "page"),
        ("many_models_page", "page"),
        ("recovery_page", "page"),
        ("questions_page", "page"),
        ("refit_page", "page"),
        ("proteins_page", "page"),
    ],
)
def test_a_page_is_what_its_script_writes(script: str, make: str) -> None:
    names = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))
    assert names["PAGE"].read_text() == names[make]()


def test_one_command_makes_every_page() -> None:
    makers = runpy.run_path(str(ROOT / "benchmarks" / "pages.py"))["MAKERS"]
    there = {path.stem for path in (ROOT / "benchmarks").glob("*_page.py")}
    assert there | {"readme", "roofline", "barriers", "figures"} == set(makers)


def test_the_roofline_is_of_every_gpu_workload() -> None:
    needs = {(need.op, need.workload, need.dtype): need for need in roofline.needs()}
    rows = needs["channel_moments", "[65536, 768]", "float32"]
    h100, a100 = roofline.GPUS
    assert rows.seconds(h100)[0] == pytest.approx(65536 * 768 * 4 / 3350e9)
    products = needs["cross_moments_", "[16384, 4096] twice", "float32"]
    assert max(products.seconds(a100)) == pytest.approx(2 * 16384 * 4096**2 / (312e12 / 3))
    assert {"permute", "scale_shift"} < {need.op for need in needs.values()}


def test_the_roofline_sets_what_was_measured_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = {"op": "channel_moments", "workload": "[65536, 768]", "dtype": "float32"}
    rows = [
        work | {"provider": "nlm", "median_s": 2 * 65536 * 768 * 4 / 3350e9},
        work | {"provider": "torch.var_mean", "median_s": 1.0},
        work | {"dtype": "bfloat16", "provider": "nlm", "failed": "out of memory"},
    ]
    results = tmp_path / "gpu_suite.json"
    results.write_text(json.dumps({"gpu": "Some GPU", "measure": {"result": {"rows": rows}}}))
    monkeypatch.setattr(roofline, "MEASURED", results)
    lines = [line for line in roofline.page().splitlines() if "channel_moments` | [65536" in line]
    assert lines[0].endswith("| 120.2 us | 50% |")
    assert lines[1].endswith("| - | - |")


def test_descriptors_become_the_default_where_none_is_slower() -> None:
    def report(pointers: list[float], descriptors: list[float]) -> dict:
        parts = {"measure": pointers, "measure_tma": descriptors}
        return {
            name: {
                "result": {
                    "rows": [
                        {"op": "op", "workload": f"{i}", "dtype": "float32", "provider": "nlm"}
                        | {"median_s": seconds}
                        for i, seconds in enumerate(times)
                    ]
                }
            }
            for name, times in parts.items()
        }

    def default(*times: list[float]) -> str:
        return _gpu.tma_defaults(report(*times))["op"]["default"]

    assert default([2.0, 2.0, 2.0], [1.9, 1.9, 2.01]) == "descriptors"
    assert default([2.0, 2.0, 2.0], [1.9, 1.9, 2.1]) == "pointers"
    assert default([2.0, 2.0, 2.0], [1.9, 1.99, 2.0]) == "pointers"
    assert default([2.0, 2.0, 2.0], [1.5, 1.5]) == "pointers"  # the third failed
