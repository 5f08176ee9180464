"""How many samples are enough."""

import math

import pytest
from _networks import mlp, vectors

from nlm.correct import calibration_size


def test_the_distance_falls_with_the_samples_and_the_smallest_is_found():
    own, data = {"a": mlp(1), "b": mlp(2)}, {"a": [vectors(512)], "b": [vectors(512, 1) + 1]}
    found = calibration_size(mlp(0), own, data, max_samples=512, tolerance=0.15)
    sizes = [8, 16, 32, 64, 128, 256, 512]
    assert list(found.distance) == sizes and found.distance[512] == 0
    for size in (16, 64):
        ratio = found.distance[size] / found.distance[4 * size]
        assert ratio == pytest.approx(2 * math.sqrt((1 - size / 512) / (1 - size / 128)), rel=0.35)
    assert found.distance[found.smallest] <= 0.15 < found.distance[found.smallest // 2]
    strict = calibration_size(mlp(0), own, data, max_samples=64, tolerance=0)
    assert strict.smallest == 64


def test_identical_fits_are_no_distance_apart():
    x = vectors(8)
    data = {"a": [x.repeat(4, 1)]}
    found = calibration_size(mlp(0), {"a": mlp(1)}, data, max_samples=32)
    assert found.smallest == 8 and max(found.distance.values()) < 1e-4
