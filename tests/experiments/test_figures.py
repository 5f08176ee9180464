"""The paper's figures, in small; the committed page is of the committed results."""

import _pages
import figures
import paper_figures
import pytest

from nlm.demo import Recipe, Settings, Sizes
from nlm.demo.experiment import prepare

SMALL = Settings(
    network="mlp512",
    foundation_images=512,
    sizes=Sizes(train=512, validation=40, calibration=24, test=40),
    foundation=Recipe(1, 2e-3, 1.0),
    expert=Recipe(4, 1e-3, 0.01),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield paper_figures.run(prepare(0, 2, settings=SMALL), grid=2)


def test_every_figure_is_drawn_from_what_is_found(small):
    _, results = figures.load()
    assert list(small["landscapes"]) == list(paper_figures.LANDSCAPES)
    for surface in small["landscapes"].values():
        for average, worst in zip(
            surface["values"]["average"], surface["values"]["worst"], strict=True
        ):
            assert len(average) == 2 and all(w <= a for w, a in zip(worst, average, strict=True))
    for places in small["projections"].values():
        assert [len(each) for each in places.values()] == [40, 40, 40]
    pictures = figures.draw(small, results)
    assert len(set(pictures.values())) == 5
    text = figures.page(small, results)
    assert all(f"(pictures/{name})" in text for name in pictures) and "{" not in text


def test_the_page_is_that_of_the_committed_results():
    found, results = figures.load()
    assert figures.page(found, results) == figures.PAGE.read_text()
    sizes = [(_pages.PICTURES / f"figure_{number}.png").stat().st_size for number in range(1, 6)]
    [path] = figures.RESULTS.glob("paper_figures_*.json")
    assert sum(sizes) + path.stat().st_size < 150_000


def test_what_the_figures_show_holds():
    found, _ = figures.load()
    surfaces = found["landscapes"]
    worst = {name: figures.best(surface, "worst") for name, surface in surfaces.items()}
    assert worst["nonlocal"] < 0.4 < worst["permuted"] < worst["permuted + TACT"] < 1.05
    assert worst["local"] > 0.9
    for places in found["projections"].values():
        assert figures.away(places, "permuted + TACT") < figures.away(places, "permuted")


def test_means_and_distances():
    seeds = [
        {
            "settings": {"a": {"4": {"plain": {"average": x}}}},
            "layers": {"points": ["p"], "v": [x]},
        }
        for x in (0.25, 0.75)
    ]
    found = figures.averaged(seeds)
    assert found["settings"]["a"]["4"]["plain"]["average"] == 0.5
    assert found["layers"] == {"points": ["p"], "v": [0.5]}
    places = {"expert": [[0, 0], [3, 4]], "other": [[0, 1], [3, 2]]}
    assert figures.away(places, "other") == 1.5 / 5 and figures.away(places, "expert") == 0
