"""The tasks are balanced, in order, and their splits share nothing."""

import pytest
import torch

from nlm.demo import TASKS, Sizes, assert_disjoint
from nlm.demo.glyphs import Glyphs
from nlm.demo.tasks import handwritten, make_pretraining, make_task

SMALL = Sizes(train=300, validation=60, calibration=70, test=80)
CLASSES = {
    "digits": 10,
    "upper": 26,
    "cyrillic": 32,
    "arrows": 24,
    "greek": 24,
    "math": 24,
    "lower": 26,
    "style": 4,
}


@pytest.mark.parametrize("name", TASKS)
def test_the_splits_of_a_task_are_disjoint(glyphs: Glyphs, name: str) -> None:
    task = make_task(name, glyphs, 0, SMALL)
    images = task.images()
    assert set(images) == {"train", "validation", "calibration", "test"}
    assert [len(split) for split in images.values()] == [300, 60, 70, 80]
    assert_disjoint(images)


def test_handwritten_digits_are_split_by_image() -> None:
    splits = {name: pictures for name, (pictures, _) in handwritten().items()}
    assert {name: len(pictures) for name, pictures in splits.items()} == {
        "train": 1000,
        "validation": 200,
        "test": 597,
    }
    assert_disjoint(splits)


def test_a_shared_image_is_found() -> None:
    train, test = torch.rand(5, 1, 4, 4), torch.rand(3, 1, 4, 4)
    assert_disjoint({"train": train, "test": test})
    test[1] = train[4]
    with pytest.raises(ValueError, match=r"must be disjoint, got the same image in 'train' and"):
        assert_disjoint({"train": train, "test": test})


@pytest.mark.parametrize("name", TASKS)
def test_labels_cover_the_classes(glyphs: Glyphs, name: str) -> None:
    task = make_task(name, glyphs, 0, Sizes(train=1500, validation=10, calibration=10, test=10))
    assert len(task.classes) == CLASSES[name]
    assert task.train.labels.unique().tolist() == list(range(CLASSES[name]))
    assert task.train.inputs.isfinite().all()


def test_another_seed_draws_other_images(glyphs: Glyphs) -> None:
    splits = {str(seed): make_task("greek", glyphs, seed, SMALL).test.inputs for seed in range(3)}
    assert_disjoint(splits)
    assert torch.equal(splits["1"], make_task("greek", glyphs, 1, SMALL).test.inputs)


def test_pretraining_is_held_out_and_has_all_classes(glyphs: Glyphs) -> None:
    pretraining = make_pretraining(glyphs, 0, SMALL)
    assert len(set(pretraining.classes)) == 240
    assert_disjoint(
        {
            "validation": pretraining.validation.inputs,
            "calibration": pretraining.calibration,
            "test": pretraining.test.inputs,
        }
    )


def test_an_unknown_task_is_named(glyphs: Glyphs) -> None:
    with pytest.raises(ValueError, match=r"nlm\.demo: a task must be one of .*, got 'faces'"):
        make_task("faces", glyphs, 0, SMALL)
