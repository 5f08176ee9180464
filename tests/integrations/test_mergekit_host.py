"""Without the host, or with another version of it, there is one clear sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from nlm.integrations import mergekit as on_nlm

ROOT = Path(__file__).parents[2]
SENTENCE = (
    "nlm.integrations.mergekit: the host must be mergekit>=0.1.5,<0.2, got {}: "
    "pip install 'mergekit>=0.1.5,<0.2'"
)


@pytest.mark.parametrize("version", ["0.1.4", "0.2.0"])
def test_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    folder = tmp_path / f"mergekit-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mergekit\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for call in (on_nlm.register, on_nlm.use_as_default().__enter__):
        with pytest.raises(ImportError) as error:
            call()
        assert str(error.value) == SENTENCE.format(version)


def test_the_command_says_that_the_host_is_missing() -> None:
    """In an interpreter without site packages; the integration alone imports neither."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "from nlm.integrations.mergekit.command import main; main()"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.strip() == SENTENCE.format("no such package")
