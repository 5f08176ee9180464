"""How many samples are enough."""

import math

import pytest
from _networks import convnet, images, mlp, vectors

from nlm.correct import calibration_size


def test_the_distance_falls_with_the_samples_and_the_smallest_is_found():
    own, data = {"a": convnet(1), "b": convnet(2)}, {"a": [images(512)], "b": [images(512, 1) + 1]}
    found = calibration_size(convnet(0), own, data, max_samples=512, tolerance=0.12)
    sizes = [8, 16, 32, 64, 128, 256, 512]
    assert list(found.distance) == sizes and found.distance[512] == 0
    for size in (16, 64):
        ratio = found.distance[size] / found.distance[4 * size]
        assert ratio == pytest.approx(2 * math.sqrt((1 - size / 512) / (1 - size / 128)), rel=0.2)
    assert found.distance[found.smallest] <= 0.12 < found.distance[found.smallest // 2]
    strict = calibration_size(convnet(0), own, data, max_samples=64, tolerance=0)
    assert strict.smallest == 64


def test_identical_fits_are_no_distance_apart():
    x = vectors(8)
    data = {"a": [x.repeat(4, 1)]}
    found = calibration_size(mlp(0), {"a": mlp(1)}, data, max_samples=32)
    assert found.smallest == 8 and max(found.distance.values()) < 1e-4


def test_more_samples_than_there_are_count_as_all():
    """Fits on as many as there are would look as if fewer sufficed."""
    own, data = {"a": mlp(1), "b": mlp(2)}, {"a": [vectors(20)], "b": [vectors(30, 1), vectors(20)]}
    found = calibration_size(mlp(0), own, data, max_samples=1000, tolerance=0)
    assert list(found.distance) == [8, 16, 32, 50] and found.smallest == 50
