"""The program itself: help is instant and free of torch, a missing package gets a sentence."""

import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import nlm
from nlm.cli.app import run


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_imports_no_torch() -> None:
    done = python(
        "import sys\n"
        "from nlm.cli.app import run\n"
        "code = run(['--help'])\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    assert done.returncode == 0
    assert done.stderr == "HEAVY []\n"
    assert "demo" in done.stdout and "info" in done.stdout


def test_the_help_of_demo_names_its_options(capsys: pytest.CaptureFixture) -> None:
    assert run(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--json", "--seed", "--tasks", "--force", "--report", "--quiet"):
        assert option in out


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"nlm {nlm.__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture) -> None:
    assert run([]) in (0, 2)
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err


_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=absent)

absent = sys.argv.pop(1)
sys.meta_path.insert(0, Absent())
from nlm.cli import main
main()
"""


@pytest.mark.parametrize("package", ["typer", "rich", "jinja2", "matplotlib"])
def test_a_missing_package_gets_a_sentence(package: str) -> None:
    done = python(_WITHOUT, package, "demo")
    assert done.returncode == 1
    assert done.stderr == (
        f"nlm: the command line needs {package}, got no such package: pip install nlm[cli]\n"
    )


@pytest.mark.parametrize(("package", "pip"), [("transformers", "nlm[hf]"), ("einops", "einops")])
@pytest.mark.parametrize("place", ["", "def network():\n    "])
def test_a_package_that_a_source_imports_gets_a_sentence(package, pip, place, tmp_path):
    (tmp_path / "mine.py").write_text(f"{place}import {package}\n")
    here = f"import os\nos.chdir({str(tmp_path)!r})\n"
    done = python(here + _WITHOUT, package, "spec", "discover", "mine:network")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"needs {package}, got no such package: pip install {pip}\n")


def test_python_m_nlm_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nlm", "--help"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "Usage: nlm" in done.stdout
    assert "| nlm.cli" in done.stderr and not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_the_program_is_installed_under_its_name() -> None:
    [script] = entry_points(group="console_scripts", name="nlm")
    assert script.value == "nlm.cli:main"
