"""What the reference says of each public name: its parameters, its errors, and its paper."""

import inspect
import re
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

REFERENCE = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "reference.py"))
ROOMS = [room for room in REFERENCE["ROOMS"] if ".integrations." not in room]
METHODS = ["nlm.merge", "nlm.align", "nlm.correct", "nlm.evaluate", "nlm.gauge"]
#: Nothing that they are given is wrong; or, without "Raises", what another function raises.
WITHOUT_ERRORS = {
    "task_arithmetic", "default_points", "expert_moments", "attention_mask", "first", "run",
    "tokens_except", "fit_logistic", "atomic_path", "cache_folder", "available_memory", "check",
    "measure_rates", "open_all", "problems",
}  # fmt: skip
#: Functions of rooms that compute what a paper defines, which are nobody's.
NO_PAPER = {
    "accuracy", "ensemble_accuracy", "calibration_size", "correct", "default_points",
    "expert_moments", "fit_logistic", "linear_probe",
}  # fmt: skip
_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|\b(?:19|20)\d\d\b")


def functions(rooms: list[str]) -> list[Any]:
    return [
        pytest.param(function, id=f"{room}.{name}")
        for room in rooms
        for name in REFERENCE["names"](room)
        if inspect.isfunction(function := getattr(import_module(room), name))
    ]


@pytest.mark.parametrize("function", functions(ROOMS))
def test_every_parameter_is_told(function: Callable[..., Any]) -> None:
    told = inspect.getdoc(function) or ""
    assert told
    missing = [
        name
        for name in inspect.signature(function).parameters
        if not re.search(rf"\b{re.escape(name)}\b", told)
    ]
    assert not missing or re.search(r"\b[Aa]rguments (?:and errors )?as\b", told), missing


@pytest.mark.parametrize("function", functions(ROOMS))
def test_every_error_is_told(function: Callable[..., Any]) -> None:
    told = inspect.getdoc(function) or ""
    assert "\nRaises\n------\n" in told or function.__name__ in WITHOUT_ERRORS


@pytest.mark.parametrize("function", functions(METHODS))
def test_every_method_names_its_paper(function: Callable[..., Any]) -> None:
    """In its docstring or its module's, which stands on the same page or is linked from it."""
    module = sys.modules[function.__module__].__doc__ or ""
    told = f"{inspect.getdoc(function)}\n{module}"
    assert _PAPER.search(told) or function.__name__ in NO_PAPER


def classes() -> list[Any]:
    return [
        pytest.param(kind, id=f"{room}.{name}")
        for room in ROOMS
        for name in REFERENCE["names"](room)
        if inspect.isclass(kind := getattr(import_module(room), name))
    ]


def _of_class(kind: type) -> str:
    """What a class and those of nlm that it is of say of themselves."""
    ours = [each for each in kind.__mro__ if each.__module__.startswith("nlm")]
    made = [vars(each).get("__init__") for each in ours]
    return "\n".join(str(each.__doc__) for each in (*ours, *made) if each is not None)


def _untold(function: Callable[..., Any] | type, told: str) -> list[str]:
    known = inspect.signature(function).parameters
    left = {"self", "cls"}
    return [x for x in known if x not in left and not re.search(rf"\b{re.escape(x)}\b", told)]


@pytest.mark.parametrize("kind", classes())
def test_every_class_tells_what_it_is_made_of(kind: type) -> None:
    """Its fields or arguments, and of its public methods what they do and take."""
    told = _of_class(kind)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")  # dataclass's own
    if not issubclass(kind, (Exception, dict)):
        assert not _untold(kind, told)
    for name, value in vars(kind).items():
        value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        own = inspect.getdoc(getattr(kind, name)) if not value.__doc__ else value.__doc__
        assert own, name
        if re.search(r"^ +raise \w", inspect.getsource(value).replace(own, ""), re.MULTILINE):
            assert re.search(r"[Rr]aises|Error|[Ee]rrors as", own), name
        is_as_another = re.search(r"\b[Aa]rguments (?:and errors )?as\b", own)
        assert is_as_another or not _untold(value, told + own), name


@pytest.mark.parametrize("stem", REFERENCE["operations"]())
def test_every_operation_tells_shapes_bytes_and_numerics(stem: str) -> None:
    module = import_module(f"nlm.ops.{stem}")
    told = module.__doc__ or ""
    for part in ("Bytes:", "Numerics:"):
        assert part in told
    assert _PAPER.search(told)
    assert re.search(r"\[[\w ,*.+-]+\]", told + "".join(
        inspect.getdoc(getattr(module, name)) or "" for name in dir(module)
        if inspect.isfunction(getattr(module, name)) and not name.startswith("_")
    )), "shapes"  # fmt: skip
