"""Without FusionBench, or with another version of it, there is one clear sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from nlm.integrations import fusion_bench as on_nlm

ROOT = Path(__file__).parents[2]
SENTENCE = (
    "nlm.integrations.fusion_bench: the host must be fusion-bench>=0.2.33,<0.3, got {}: "
    "pip install 'fusion-bench>=0.2.33,<0.3'"
)


@pytest.mark.parametrize("version", ["0.2.32", "0.3.0"])
def test_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    folder = tmp_path / f"fusion_bench-{version}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: fusion-bench\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError) as error:
        _ = on_nlm.NlmTies
    assert str(error.value) == SENTENCE.format(version)
    with pytest.raises(AttributeError, match="has no attribute 'NlmNothing'"):
        _ = on_nlm.NlmNothing


def test_a_missing_host_is_said() -> None:
    """In an interpreter without site packages; the folder of configurations is known there too."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "from nlm.integrations import fusion_bench; print(fusion_bench.CONFIG_DIR); "
        "fusion_bench.NlmTies"
    )
    done = subprocess.run([sys.executable, "-E", "-S", "-c", code], text=True, capture_output=True)
    assert done.returncode == 1 and Path(done.stdout.strip()) == on_nlm.CONFIG_DIR
    assert done.stderr.splitlines()[-1] == "ImportError: " + SENTENCE.format("no such package")


def test_the_command_says_that_the_host_is_missing() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "from nlm.integrations.fusion_bench.command import main; main()"
    )
    done = subprocess.run([sys.executable, "-E", "-S", "-c", code], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.strip() == SENTENCE.format("no such package")
