"""Without the host, or with another version of it, there is one clear sentence."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

import nlm.align
import nlm.merge  # noqa: F401

SENTENCE = (
    "nlm.integrations.sd_mecha: the host must be sd-mecha>=1.1.8,<1.2, got {}: "
    "pip install 'sd-mecha>=1.1.8,<1.2'"
)


@pytest.mark.parametrize("version", ["1.1.7", "1.2.0"])
def test_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    folder = tmp_path / f"sd_mecha-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sd-mecha\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nlm.integrations.sd_mecha", raising=False)
    with pytest.raises(ImportError) as error:
        import_module("nlm.integrations.sd_mecha")
    assert str(error.value) == SENTENCE.format(version)


def test_a_missing_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a path without the folder that it is installed in."""
    without = [each for each in sys.path if not [*Path(each).glob("sd_mecha-*.dist-info")]]
    monkeypatch.setattr(sys, "path", without)
    monkeypatch.delitem(sys.modules, "nlm.integrations.sd_mecha", raising=False)
    with pytest.raises(ImportError) as error:
        import_module("nlm.integrations.sd_mecha")
    assert str(error.value) == SENTENCE.format("no such package")
