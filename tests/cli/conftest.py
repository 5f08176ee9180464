"""Results of the shape that the demo's experiment returns, and a place to run commands in."""

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nlm.cli.report import render

TASKS = ["digits", "upper", "cyrillic", "arrows", "greek", "math", "lower", "style"]
LAYERS = ["trunk.conv1", "trunk.conv2", "trunk.fc1", "trunk.fc2"]
PLAIN = {"local": 0.96, "nonlocal": 0.1, "permuted": 0.78}
GAIN = {
    "plain": 0.0,
    "repair": 0.06,
    "tact": 0.13,
    "tact_once": 0.05,
    "tact_lambda0": 0.02,
    "probe": -0.05,
    "probe_full": 0.17,
}


def _scores(setting: str, tasks: int) -> dict[str, dict[str, float]]:
    base = PLAIN[setting] - 0.005 * tasks
    return {
        correction: {
            "average": min(base + gain, 0.99),
            "worst": min(base + gain, 0.99) * 0.8,
            "scale": 0.4,
            "tasks": {task: min(base + gain, 0.99) for task in TASKS[:tasks]},
        }
        for correction, gain in GAIN.items()
    }


def sample(tasks: int = 8) -> dict[str, Any]:
    """Plausible results with up to ``tasks`` tasks."""
    steps = {"nonlocal": 0.3, "permuted": 0.8, "permuted + TACT": 1.0}
    return {
        "seconds": 123.4,
        "seed": 0,
        "tasks": TASKS[:tasks],
        "foundations": {"A": 0.83, "B": 0.82, "ensemble": 0.87},
        "experts": {task: 0.9 for task in TASKS[:tasks]},
        "settings": {
            setting: {str(n): _scores(setting, n) for n in (2, 4, 6, 8) if n <= tasks}
            for setting in PLAIN
        },
        "layers": {
            "points": [*LAYERS],
            "variance_ratio": {k: [v ** (i + 1) for i in range(4)] for k, v in steps.items()},
            "relative_distance": {k: [1.2 - v] * 4 for k, v in steps.items()},
        },
        "barrier": {
            "lambda": [0.0, 0.5, 1.0],
            "loss": {
                "unaligned": [0.5, 3.0, 0.5],
                "weights": [0.5, 0.9, 0.5],
                "activations": [0.5, 1.0, 0.5],
            },
            "barrier": {"unaligned": 2.5, "weights": 0.4, "activations": 0.5},
        },
        "alignment": {
            "weights": {
                "objective": [10.0, 20.0],
                "correlation": dict.fromkeys(LAYERS, 0.6),
                "histogram": {layer: [0] * 30 + [7] * 10 for layer in LAYERS},
                "seconds": 1.5,
            },
            "activations": {"correlation": dict.fromkeys(LAYERS, 0.65), "seconds": 0.5},
        },
        "landscapes": {
            "none": {
                "x": [0.0, 1.5],
                "y": [-0.5, 2.25],
                "values": {"average": [[0.111, 0.222], [0.333, 0.4444]]},
                "models": {"start": [0.0, 0.0, 0.0], "merged": [0.7, 0.6, 0.125]},
            },
        },
        "projections": {
            "digits": {
                "expert": [[0.0, 0.0], [1.0, 1.0]],
                "merged": [[0.5, 2.0], [1.5, 1.0]],
            },
        },
        "run": {"scale": 0.3, "correction": "tact"},
        "timings": {"training": 100.0, "evaluation": 20.0},
        "versions": {"nlm": "0.1.0", "torch": "2.13.0"},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return sample()


@pytest.fixture(scope="session")
def html() -> str:
    """The page of the results."""
    return render(sample())


class Experiment:
    """Stands in for the experiment, which takes minutes: the command line is what is tested."""

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []
        self.error: BaseException | None = None

    def run(self, seed: int, tasks: int, progress: Any = None) -> dict[str, Any]:
        self.calls.append({"seed": seed, "tasks": tasks})
        if progress is not None:
            progress("training foundation A", 0.1)
            progress("merging", 1.0)
        if self.error is not None:
            raise self.error
        return copy.deepcopy(sample(tasks)) | {"seed": seed}


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Experiment:
    stand_in = Experiment()
    module = ModuleType("nlm.demo.experiment")
    module.run = stand_in.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nlm.demo.experiment", module)
    monkeypatch.chdir(tmp_path)
    return stand_in
