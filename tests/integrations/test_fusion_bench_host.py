"""Without FusionBench, or with another version of it, there is one clear sentence."""

from pathlib import Path

import pytest

from nlm.integrations import fusion_bench as on_nlm

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
