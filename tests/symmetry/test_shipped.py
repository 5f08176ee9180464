"""The specifications that come with the package are those that tracing finds."""

import json

import pytest

import nlm
from nlm.symmetry import pretrained, shipped


@pytest.mark.parametrize("name", shipped.MODELS)
def test_a_shipped_specification_is_what_a_trace_finds(name: str) -> None:
    config = shipped.config(name)
    fresh = pretrained.trace_config(config, cache=False)
    kept = nlm.PermutationSpec.load(name)
    assert kept.digest() == fresh.digest()
    assert (kept.outputs, kept.pinned.keys()) == (fresh.outputs, fresh.pinned.keys())
    assert not kept.opaque_ops and not kept.proven
    assert shipped.find(pretrained.fingerprint_of(config)) == shipped.path(name)


def test_the_package_holds_what_it_names() -> None:
    files = {path.stem for path in shipped.FOLDER.glob("*.json")} - {"index"}
    assert files == set(shipped.MODELS) == set(json.loads(shipped.INDEX.read_text()).values())
    assert sum(path.stat().st_size for path in shipped.FOLDER.iterdir()) < 500_000


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"bert-base, .*vit-b-16\), got 'bert-bas'"):
        nlm.PermutationSpec.load("bert-bas")
