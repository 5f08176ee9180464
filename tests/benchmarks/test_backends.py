"""docs/backends.md tells the truth: its tables are those of the committed results."""

import json
from pathlib import Path

import _whole_processes
import backends_page
import pytest
import torch
from safetensors.torch import save_file


def test_the_page_is_made_of_the_committed_results() -> None:
    page = backends_page.PAGE.read_text()
    assert backends_page.filled(page) == page


def test_a_table_is_made_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"mergekit_s": 104.1, "nlm_s": 12.5, "mergekit_bytes": 4.5e9, "nlm_bytes": 4.25e9}
    row |= {"ratio": 8.328, "differing": 4 / 251.7e6, "difference": 1e-3}
    report = {
        "host": "mergekit 0.1.5", "parameters": 251_700_000, "start_s": 7.0, "threads": 2,
        "repeat": 3, "machine": "one", "versions": {"torch": "2.13.0"}, "commit": "abc",
        "rows": [row | {"method": "ties"}, row | {"method": "linear", "differing": 0.0}],
    }  # fmt: skip
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "host_mergekit.json").write_text(json.dumps(report))
    monkeypatch.setattr(backends_page, "RESULTS", tmp_path)
    text = backends_page.filled("<!-- results of mergekit -->\nold\n<!-- end -->\nrest")
    assert "`ties` was to be 5 times as fast: 8.33, met." in text
    assert "| `ties` | 104.1 s | 12.5 s | 8.3 | 4.50 GB | 4.25 GB | 16 of 10^9 |" in text
    assert text.splitlines()[4].endswith("| none |")
    assert "252 M float32 parameters, 2 threads; medians of 3 runs" in text
    assert "no peak is told that is less than that of the program that wrote the inputs" in text
    assert text.endswith("nlm at abc.\n<!-- end -->\nrest")


def test_a_host_may_be_timed_without_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"method": "ties, sum", "fusion_bench_s": 30.0, "nlm_s": 15.0, "ratio": 2.0}
    row |= {"fusion_bench_bytes": 1e10, "nlm_bytes": 2e9, "differing": 0.0, "difference": 0.0}
    row |= {"fusion_bench_run_s": 14.0, "nlm_run_s": 1.75, "run_ratio": 8.0}
    report = {
        "host": "fusion-bench 0.2.33", "parameters": 130_200_000, "start_s": 7.0, "threads": 2,
        "repeat": 3, "machine": "one", "versions": {}, "commit": "abc", "rows": [row],
    }  # fmt: skip
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "host_fusion_bench.json").write_text(json.dumps(report))
    monkeypatch.setattr(backends_page, "RESULTS", tmp_path)
    text = backends_page.filled("<!-- results of fusion_bench -->\nold\n<!-- end -->\n")
    assert "| `ties, sum` | 30.0 s | 15.0 s | 2.0 | 10.00 GB | 2.00 GB | none |" in text
    assert "| `ties, sum` | 14.00 s | 1.75 s | 8.0 |" in text
    assert (
        "was to be 4 times as fast: 2.00, missed. That would be 7.5 s as a whole, of which the "
        "host's start alone takes 7.0 s. Its peak memory was to be a third of the stock run's: "
        "0.20, met."
    ) in text
    for more, told in (({}, " s as a whole. Its"), ({"start_s": 2.0}, "start alone takes 2.0 s.")):
        report["rows"][0] |= {"commit": "of another run"} | more
        assert told in backends_page.goals(report)[0]


def test_an_alignment_has_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"method": "mlp", "parameters": 10_000_000, "rebasin_s": 30.04, "nlm_s": 15.0}
    row |= {"ratio": 2.003, "rebasin_bytes": 1e9, "nlm_bytes": 5e8}
    row |= {"rebasin_objective": 99.123456, "nlm_objective": 101.0}
    report = {
        "host": "rebasin 0.0.47", "start_s": 3.0, "threads": 2, "repeat": 3, "machine": "one",
        "versions": {"torch": "2.13.0"}, "commit": "abc", "rows": [row],
    }  # fmt: skip
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "host_rebasin.json").write_text(json.dumps(report))
    monkeypatch.setattr(backends_page, "RESULTS", tmp_path)
    text = backends_page.filled("<!-- results of rebasin -->\n<!-- end -->")
    line = "| mlp | 10.0 M | 30.0 s | 15.0 s | 2.0 | 1.00 GB | 0.50 GB | 99.123 | 101 |"
    assert line in text.splitlines()
    assert "the host needs 3.0 s to start" in text


def test_functions_of_a_checkout_have_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"method": "zip", "units": 768, "zipit_s": 20.0, "nlm_s": 4.0, "ratio": 5.0}
    row |= {"zipit_bytes": 1e9, "nlm_bytes": 5e8, "stock_objective": 0.51, "nlm_objective": 0.52}
    row |= {"differing": 0.1, "difference": 1.0, "repeat": 2, "commit": "abc"}
    row |= {"worked_ratio": 3.96, "peak": "VmHWM"}
    report = {
        "host": "ZipIt 1b6ca40", "start_s": 3.0, "threads": 2, "repeat": 1, "machine": "one",
        "versions": {}, "commit": "def", "rows": [row, row | {"method": "permute", "repeat": 3}],
    }  # fmt: skip
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "host_zipit.json").write_text(json.dumps(report))
    monkeypatch.setattr(backends_page, "RESULTS", tmp_path)
    text = backends_page.filled("<!-- results of zipit -->\n<!-- end -->")
    assert "| zip | 768 | 20.0 s | 4.0 s | 5.0, 4.0 | 1.00 GB | 0.50 GB | 0.51 | 0.52 |" in text
    assert "mean correlation, stock" in text and "medians of 2 and 3 runs" in text
    assert "3.0 s to start; the second ratio is that of processor time." in text
    assert text.endswith("nlm at abc.\n<!-- end -->")
    report["rows"][0] |= {"commit": "def"}  # a row was added to those of another run
    (tmp_path / "one" / "host_zipit.json").write_text(json.dumps(report))
    text = backends_page.filled("<!-- results of zipit -->\n<!-- end -->")
    assert "the host needs 3.0 s to start in the run at def; the second ratio" in text


def test_results_are_compared_entry_by_entry(tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file({"w": torch.tensor([1.0, -4.0]), "v": torch.ones(2)}, files[0])
    save_file({"w": torch.tensor([1.0, -2.0]), "v": torch.ones(2)}, files[1])
    assert _whole_processes.compared(*files) == {"differing": 0.25, "difference": 0.5}
    save_file({"w": torch.ones(2)}, files[1])
    with pytest.raises(SystemExit, match="other entries; nothing is reported"):
        _whole_processes.compared(*files)
