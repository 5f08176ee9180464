"""What is measured for a page: every part against the function that it comes from."""

import copy
import json

import pytest
import torch
from _networks import mlp, vectors

import nlm
from nlm.cli.report import read, render
from nlm.evaluate import accuracy, layer_statistics, loss_barrier
from nlm.pipeline import Aligned, Choice
from nlm.report import merge_report

TASKS = ("a", "b")


@pytest.fixture(scope="module")
def world():
    """Foundations, test data, and what merging an expert of each gave."""
    foundations = [mlp(0), mlp(1)]
    spec = nlm.trace(foundations[0], vectors(16))
    experts, data = {}, {}
    for number, task in enumerate(TASKS):
        expert = copy.deepcopy(foundations[number])
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
            inputs = vectors(90, number + 1)
            data[task] = [(inputs[:60], expert(inputs[:60]).argmax(1)),
                          (inputs[60:], expert(inputs[60:]).argmax(1))]  # fmt: skip
        experts[task] = (number, expert)
    choice, aligned = nlm.merge_nonlocal(
        foundations, experts, spec, data, data, heads=("4",), scales=(0.3, 0.6)
    )
    return foundations, choice, aligned, data, spec


@pytest.fixture(scope="module")
def report(world):
    foundations, choice, aligned, data, spec = world
    return merge_report(
        choice, aligned, data, calibration=data, foundations=foundations,
        foundation_data=data["a"], spec=spec, grid=3, projected=1, max_samples=40,
    )  # fmt: skip


def test_every_part_is_what_its_function_finds(world, report) -> None:
    foundations, choice, aligned, data, spec = world
    assert report["experts"] == {"a": 1.0, "b": 1.0}  # the labels are their own outputs
    cells = report["settings"]["merged"]["2"]
    merged = choice.merged.model(mlp())
    for name, model in (("none", merged), ("tact", choice.model)):
        own = {task: accuracy(model, data[task], task=task) for task in TASKS}
        assert cells[name]["tasks"] == own and cells[name]["scale"] == choice.scale
        assert cells[name]["average"] == pytest.approx(sum(own.values()) / 2)
    assert report["layers"]["points"] == ["0", "2"]
    few = {task: [data[task][0][0][:40]] for task in TASKS}
    ratios = [
        layer_statistics(merged, aligned.experts[task], {"0": 1, "2": 1}, few[task], task=task)
        .variance_ratio["2"]
        for task in TASKS
    ]  # fmt: skip
    found = report["layers"]["variance_ratio"]
    assert found["none"][1] == pytest.approx(sum(ratios) / 2)
    assert abs(found["tact"][1] - 1) < abs(found["none"][1] - 1)
    first, second = (model.state_dict() for model in foundations)
    raw = loss_barrier(foundations[0], first, second, data["a"])
    assert report["barrier"]["loss"]["not aligned"] == raw.losses
    assert report["barrier"]["barrier"]["aligned"] < raw.barrier
    assert report["alignment"]["weights"]["correlation"] == aligned.results[0].report.correlation
    groups = report["alignment"]["weights"]["groups"]
    assert {name: group["origin"] for name, group in groups.items()} == {
        name: spec.groups[name].origin for name in aligned.results[0].report.histogram
    }
    assert report["run"]["scale"] == choice.scale
    assert report["run"]["merger"] == "task_arithmetic"
    assert report["run"]["seconds of merging and choosing"] > 0
    assert report["run"]["test samples a task"] == "90"
    assert report["run"]["validation at scale 0.3"] == choice.scores[0.3]
    assert set(report["timings"]) >= {"accuracies", "layers", "barrier", "landscapes"}
    assert [len(each) for each in report["projections"]["a"].values()] == [40, 40, 40]


def test_the_landscape_is_of_the_task_vectors(report) -> None:
    assert list(report["landscapes"]) == ["none", "tact"]
    for surface in report["landscapes"].values():
        models = surface["models"]
        assert list(models) == ["start", "expert a", "expert b", "merged"]
        start, a, b, merged = models.values()
        assert merged[2] < 1e-3 * a[0] and start[:2] == (0, 0)  # scale (a + b) lies on the plane
        scale = report["run"]["scale"]
        assert merged[0] == pytest.approx(scale * (a[0] + b[0]), rel=1e-4)
        assert merged[1] == pytest.approx(scale * b[1], rel=1e-4)
        for worst, average in zip(
            *(surface["values"][n] for n in ("worst", "average")), strict=True
        ):
            assert all(w <= v + 1e-9 for w, v in zip(worst, average, strict=True))


def test_a_page_is_made_of_it(report, tmp_path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(report))
    html = render(read(file))
    assert html.count("<img") == 2 + 1 + 1 + 4 + 1  # layers, barrier, objective, landscapes, t-SNE
    assert report["lead"].replace("'", "&#39;") in html and "Task by task" in html


def test_of_another_merge(world) -> None:
    foundations, _, _, data, _ = world
    experts = {"a": mlp(0), "b": mlp(3)}
    merged = nlm.merge(experts, foundations[0], heads="4", scale=0.5)
    choice = Choice(merged.model(mlp()), merged, 0.5, {})
    aligned = Aligned({n: foundations[0].state_dict()[n] for n in merged}, experts, [])
    seen = []
    found = merge_report(
        choice, aligned, data, correction="none", grid=0, projected=0,
        progress=lambda what, share: seen.append(share),
    )  # fmt: skip
    assert list(found["settings"]["merged"]["2"]) == ["none"]
    assert not found["run"].keys() & {"merger", "seconds of merging and choosing"}
    assert not found.keys() & {"landscapes", "barrier"} and found["projections"] == {}
    assert seen == sorted(seen) and 0 <= seen[0] <= seen[-1] <= 1
    with pytest.raises(ValueError, match=r"nlm.report: there is test data .* got none for b"):
        merge_report(choice, aligned, {"a": data["a"]})
