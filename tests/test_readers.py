"""Every reader on malformed files: what it was asked for, or an error of its own.

A hundred files for each; two thousand with ``HYPOTHESIS_PROFILE=nightly``. The same readers are
fuzzed with guidance by coverage in ``benchmarks/experiments/fuzzing.py``.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _mutations import mutated, rewritten
from _readers import KINDS, Examiner, Foreign, bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nlm
from nlm.align import AlignmentResult
from nlm.checkpoint.plain_yaml import parse_yaml
from nlm.checkpoint.texts import DamagedFileError, build
from nlm.statistics import Moments
from nlm.symmetry import AxisGroup

EXAMPLES = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 100


@pytest.fixture
def examiner(request: pytest.FixtureRequest) -> Iterator[Examiner]:
    made = Examiner(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("examiner", KINDS, indirect=True)
def test_any_file_is_read_or_refused(examiner: Examiner) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 100, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        def draw(least: int, most: int) -> int:
            return data.draw(st.integers(least, most))

        examiner.examine(mutated(examiner.good, examiner.kind.form, draw))

    holds()
    assert examiner.counts["refused"] > 0


@pytest.mark.parametrize("examiner", KINDS, indirect=True)
def test_a_good_file_is_read_however_it_is_written(examiner: Examiner) -> None:
    """Else a reader that refuses everything would keep the rule above; and half of it is not."""
    other = rewritten(examiner.good, examiner.kind.form)
    assert other != examiner.good
    examiner.examine(examiner.good)
    examiner.examine(other)
    assert examiner.counts == {"read": 2, "refused": 0}
    examiner.examine(other[: len(other) // 2])
    assert examiner.counts == {"read": 2, "refused": 1}


@pytest.mark.parametrize("content", [b"", b"\x00", b"{", b"\xff\xfe", b"[]", b"null", b"3"])
@pytest.mark.parametrize("examiner", KINDS, indirect=True)
def test_files_of_next_to_nothing(examiner: Examiner, content: bytes) -> None:
    examiner.examine(content)


def test_a_broken_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examination itself: an error of another library, a hang, a large allocation."""
    examiner = Examiner("index")

    def hang(_: Path) -> None:
        while True:
            pass

    def foreign(_: Path) -> None:
        json.loads("{")

    monkeypatch.setattr("_readers.SECONDS", 0.2)
    for read in (hang, foreign, lambda _: bytearray(3 << 30)):
        examiner.kind = examiner.kind.__class__("x", "text", examiner.kind.make, read)
        with pytest.raises(Foreign):
            examiner.examine(b"")
    examiner.close()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n"
    for last, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "its aliases stand for more than"),
        ("&a [*a]", "its aliases stand for more than"),
        ("[" * 200_000, "more than 100 brackets within each other"),
        ("!!python/object/apply:os.system ['touch victim']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("!!bool x", "x"),
        ("!!int ''", "out of range"),
        ("9" * 5000, "a number of more than 100 characters"),
    ],
    ids=["bomb", "cycle", "nested", "python object", "python name", "bool", "int", "digits"],
)
def test_yaml_that_does_harm(text, message, tmp_path, monkeypatch):
    """As YAML, as a specification and as a recipe: at once and in one sentence."""
    monkeypatch.chdir(tmp_path)
    with bounded(), pytest.raises(ValueError, match=message) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)
    for name in ("specification in YAML", "recipe", "recipe of mergekit", "table"):
        examiner = Examiner(name)
        body = text if text.startswith("a:") else f"version: 1\nmethod: {text}\n"
        examiner.examine(body.encode())
        assert examiner.counts == {"read": 0, "refused": 1}
        examiner.close()
    assert not (tmp_path / "victim").exists()


def test_a_bomb_in_the_places_of_a_recipe(tmp_path):
    for body in ("experts: *l\nmethod: ties", "method: ties\nparameters: {density: *l}",
                 "models: *l\nmerge_method: ties"):  # fmt: skip
        examiner = Examiner("recipe")
        examiner.examine(f"{BOMB}{body}\n".encode())
        assert examiner.counts["refused"] == 1
        examiner.close()


def test_fields_have_the_types_that_they_are_declared_with():
    whole = {"id": "g0", "size": 3, "parents": ["g1"]}
    assert build(AxisGroup, whole) == AxisGroup("g0", 3, ("g1",))
    for wrong, message in (
        ({"id": "g0"}, "AxisGroup has size, got none"),
        ({**whole, "colour": 1}, "AxisGroup has id, size, parents, origin, fixed, got 'colour'"),
        ({**whole, "size": 3.0}, "size is int, got 3.0"),
        ({**whole, "size": True}, "size is int, got True"),
        ({**whole, "parents": "g1"}, "parents is .*, got 'g1'"),
        ({**whole, "parents": [1]}, "parents is str, got 1"),
        ([], "AxisGroup is a mapping, got a list"),
    ):
        with pytest.raises(ValueError, match=message):
            build(AxisGroup, wrong)


def replaced(file: Path, **changes: torch.Tensor) -> None:
    """A file with other tensors and the same header beside them."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({**load_file(file), **changes}, file, metadata)


def test_values_that_cannot_be_are_refused(tmp_path):
    examiner = Examiner("alignment")
    index = load_file(examiner.file)["g0"]
    replaced(examiner.file, g0=torch.zeros_like(index))
    with pytest.raises(DamagedFileError, match=r"must hold each of 0 to 5 once, got \[0, 0"):
        AlignmentResult.load(examiner.file)
    examiner.close()

    examiner = Examiner("corrections")
    name = next(name for name in load_file(examiner.file) if name.endswith(".scale"))
    table = load_file(examiner.file)[name]
    for wrong, message in (
        (torch.full_like(table, torch.nan), "NaN or infinity at"),
        (table[:1], r"torch.float32 \[1, 6\] and torch.float32 \[2, 6\] at"),
        (table.half(), "torch.float16"),
    ):
        replaced(examiner.file, **{name: wrong})
        with pytest.raises(ValueError, match=message):
            examiner.kind.read(examiner.file)
    examiner.close()

    examiner = Examiner("moments")
    for name, wrong in (("m2", torch.ones(3).double()), ("count", torch.tensor(-1))):
        replaced(examiner.file, **{name: wrong})
        with pytest.raises(DamagedFileError, match="a file of Moments must be whole"):
            Moments.load(examiner.file)
        examiner.file.write_bytes(examiner.good)
    examiner.close()


def test_an_archive_of_many_disks():
    """Found by the fuzzing that coverage guides: zipfile's own look at a file may raise."""
    examiner = Examiner("pickle")
    disks = b"PK\x06\x07" + bytes(12) + b"\x02\x00\x00\x00"  # the locator before the end
    end = examiner.good.rindex(b"PK\x05\x06")
    examiner.examine(examiner.good[: end - 20] + disks + examiner.good[end:])
    assert examiner.counts == {"read": 0, "refused": 1}
    examiner.close()


def test_a_group_is_not_its_own_parent():
    for group in (AxisGroup("a", 2, ("a",)), AxisGroup("a", -1), AxisGroup("a", 2, ("b", "b"))):
        with pytest.raises(ValueError, match="a group has 0 or more units and other groups"):
            nlm.PermutationSpec({"a": group, "b": AxisGroup("b", 2)}, {})


def test_lines_nested_by_the_thousand_and_an_adapter_that_is_no_mapping(tmp_path):
    """Errors of other libraries once: RecursionError, JSONDecodeError, AttributeError."""
    for name, content, message in (
        ("lines", b"[" * 100_000, "a line of a .jsonl file is a text"),
        ("adapter", b"{", "an adapter's configuration is a mapping in JSON"),
        ("adapter", b"[]", r"an adapter's configuration is a mapping in JSON, got .*\(a list\)"),
    ):
        examiner = Examiner(name)
        examiner.file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            examiner.kind.read(examiner.file)
        examiner.close()
