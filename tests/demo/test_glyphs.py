"""The glyphs are real, labelled rightly, and drawn the same for the same seed."""

import pytest
import torch

from nlm.demo.augmentation import SIDE, augment, stream
from nlm.demo.glyphs import FACES, STYLES, Glyphs


def test_pretraining_shares_no_code_point_with_a_task(glyphs: Glyphs) -> None:
    pretraining = set(glyphs.alphabets["pretraining"].tolist())
    tasks = [codes for name, codes in glyphs.alphabets.items() if name != "pretraining"]
    assert len(pretraining) == 240
    assert not pretraining & set(torch.cat(tasks).tolist())


def test_every_picture_has_ink_exactly_where_the_face_has_the_code_point(glyphs: Glyphs) -> None:
    ink = glyphs.pictures.flatten(2).sum(2) > 0
    assert torch.equal(ink, glyphs.present)


def test_no_two_classes_of_a_face_look_the_same(glyphs: Glyphs) -> None:
    regular = FACES.index("DejaVuSans")
    for name in ("upper", "lower", "greek", "cyrillic", "math", "arrows"):
        columns = torch.searchsorted(glyphs.code_points, glyphs.alphabets[name])
        pictures = glyphs.pictures[regular, columns].flatten(1)
        assert len(pictures.unique(dim=0)) == len(columns), name


def test_a_label_is_the_class_of_the_picture(glyphs: Glyphs) -> None:
    inputs, labels = glyphs.draw("upper", 600, stream(0, "labels"))
    columns = torch.searchsorted(glyphs.code_points, glyphs.alphabets["upper"])
    templates = torch.nn.functional.avg_pool2d(glyphs.pictures[:, columns].float(), 2).mean(0)
    nearest = torch.corrcoef(torch.cat([inputs.flatten(1), templates.flatten(1)]))
    found = nearest[:600, 600:].argmax(1)
    assert (found == labels).float().mean() > 0.3  # chance is 0.04


def test_a_style_label_follows_the_face(glyphs: Glyphs) -> None:
    bold_only = torch.zeros_like(glyphs.present)
    bold_only[FACES.index("DejaVuSerif-Bold")] = True
    one_face = Glyphs(glyphs.code_points, bold_only, glyphs.pictures, glyphs.alphabets)
    _, labels = one_face.draw("letters", 50, stream(0, "style"), label="style")
    assert labels.unique().tolist() == [STYLES.index("bold")]


def test_a_draw_uses_only_faces_that_have_the_code_point(glyphs: Glyphs) -> None:
    faces = glyphs._faces_of
    for column, count in enumerate(glyphs._faces_having.tolist()):
        assert glyphs.present[faces[column, :count], column].all()


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_augmentation_is_determined_by_its_generator(glyphs: Glyphs, n: int) -> None:
    pictures = glyphs.pictures[0, torch.arange(n) % glyphs.pictures.shape[1]]
    first = augment(pictures, stream(3, "view"))
    again = augment(pictures, stream(3, "view"))
    other = augment(pictures, stream(4, "view"))
    assert first.shape == (n, 1, SIDE, SIDE)
    assert torch.equal(first, again)
    assert n == 0 or not torch.equal(first, other)
