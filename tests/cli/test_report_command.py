"""``nlm report``: a file of results in, a page out; other files are refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from nlm.cli.app import run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_page_of_the_demo_s_file(html: str, results: dict[str, Any], capsys) -> None:
    Path("run.json").write_text(json.dumps(results | {"calibration_sizes": {"8": 0.8}}))
    assert run(["report", "run.json", "-o", "page.html"]) == 0
    assert capsys.readouterr().out == "The page is page.html\n"
    assert Path("page.html").read_text() == html


def test_a_part_alone_is_a_page(results: dict[str, Any]) -> None:
    for part in ("settings", "layers", "barrier", "alignment", "landscapes"):
        Path("run.json").write_text(json.dumps({part: results[part]}))
        assert run(["report", "run.json", "-o", "page.html", "--force"]) == 0
        assert "<img" in Path("page.html").read_text() or part == "alignment"


def test_existing_files_are_kept(capsys) -> None:
    results = {"alignment": {"weights": {"correlation": {"g0": 0.5}, "seconds": 1.0}}}
    Path("run.json").write_text(json.dumps(results))
    Path("page.html").write_text("my thesis")
    assert run(["report", "run.json", "-o", "page.html"]) == 1
    assert "--force" in capsys.readouterr().err
    assert Path("page.html").read_text() == "my thesis"
    assert run(["report", "run.json", "-o", "page.html", "--force"]) == 0
    assert Path("page.html").read_text() != "my thesis"
    for force in ([], ["--force"]):
        assert run(["report", "run.json", "-o", "./run.json", *force]) == 1
        assert "two files, got 'run.json' twice" in capsys.readouterr().err
    assert json.loads(Path("run.json").read_text()) == results


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "got another form in 'run.json' (Expecting value"),
        ("[]", "got another form in 'run.json' (: Input should be a valid dictionary)"),
        ("{}", "results have something to show, got nothing in"),
        ('{"seconds": 3}', "results have something to show, got 'seconds' in"),
        ('{"barrier": {"lambda": [0]}}', "(barrier.loss: Field required)"),
        ('{"settings": {"a": {"few": {}}}}', "invalid literal for int() with base 10: 'few'"),
        ('{"layers": {"points": [3]}}', "(layers.points.0: Input should be a valid string)"),
    ],
)
def test_another_form_is_refused(content: str, told: str, capsys) -> None:
    Path("run.json").write_text(content)
    assert run(["report", "run.json", "-o", "page.html"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nlm report: results ") and told in error and error.count("\n") == 1
    assert not Path("page.html").exists()


def test_wrong_use(capsys) -> None:
    assert run(["report", "nowhere.json", "-o", "page.html"]) == 1
    assert "results are a file, got 'nowhere.json'" in capsys.readouterr().err
    Path("bytes").write_bytes(b"\xff\xfe\x00")
    assert run(["report", "bytes", "-o", "page.html"]) == 1
    assert "got another form in 'bytes'" in capsys.readouterr().err
    assert run(["report", "nowhere.json"]) == 2
    assert "--output" in capsys.readouterr().err
