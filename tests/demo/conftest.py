"""A small world, trained in seconds in a cache folder of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nlm.demo import Demo, Recipe, Settings, Sizes, load
from nlm.demo.glyphs import Glyphs, render

SMALL = Settings(
    network="mlp512",
    foundation_images=512,
    sizes=Sizes(train=256, validation=40, calibration=48, test=64),
    foundation=Recipe(1, 2e-3, 1.0),
    expert=Recipe(1, 1e-3, 0.01),
)


@pytest.fixture(scope="session")
def small() -> Settings:
    return SMALL


@pytest.fixture(scope="session")
def glyphs() -> Glyphs:
    return render()


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def world(cache_folder: Path) -> Demo:
    return load(seed=0, tasks=2, settings=SMALL)
