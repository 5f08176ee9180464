"""Everything that is wrong with the files of a recipe is found, before any work."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import nlm
from nlm.recipe import (
    Forecast,
    Rates,
    RecipeError,
    available_memory,
    check,
    forecast,
    measure_rates,
    read_recipe,
)

SHAPES = {
    "embed.weight": (10, 4), "layers.0.mlp.weight": (4, 4), "layers.1.mlp.weight": (4, 4),
    "head.weight": (3, 4),
}  # fmt: skip
CONFIG = {"model_type": "toy", "vocab_size": 10}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base and two experts."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        write(name)
    return tmp_path


def write(name: str, config: dict | None = None, **other) -> None:
    """A model; ``other`` replaces shapes, or takes entries out."""
    shapes = {name: shape for name, shape in (SHAPES | other).items() if shape is not None}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    Path(name).mkdir(exist_ok=True)
    save_file(tensors, Path(name) / "model.safetensors")
    (Path(name) / "config.json").write_text(json.dumps(config or CONFIG))


RECIPE = """\
base: base
experts:
  a: a
  b: {path: b, weight: 0.5}
method: task_arithmetic
"""


def found(text: str, **options) -> list[str]:
    Path("r.yaml").write_text(text)
    return check(read_recipe("r.yaml"), **options)


def test_nothing_is_wrong():
    assert found(RECIPE + "output: out\n") == []
    assert found(RECIPE.replace("task_arithmetic", "ties") + "heads: [head]\n") == []


def test_missing_and_damaged_files_are_all_named():
    shutil.rmtree("a")
    Path("b/model.safetensors").write_bytes(b"12345678")
    assert found(RECIPE.replace("base: base", "base: gone")) == [
        "r.yaml:1: a checkpoint must exist, got 'gone'",
        "r.yaml:3: a checkpoint must exist, got 'a'",
        f"r.yaml:4: a checkpoint's file must be whole, got '{Path('b/model.safetensors')}' (a "
        f"header of {int.from_bytes(b'12345678', 'little')} bytes in a file of 8)",
    ]


def test_entries_and_shapes_that_differ():
    write("a", **{"head.weight": None, "extra.weight": (2,), "second.weight": (1,)})
    write("b", **{"head.weight": (5, 4), "layers.0.mlp.weight": (4, 5)})
    assert found(RECIPE) == [
        "r.yaml:3: the models have the same entries, got 'head.weight' missing in expert 'a'",
        "r.yaml:3: the models have the same entries, got 'extra.weight', 'second.weight' extra in "
        "expert 'a'",
        "r.yaml:4: the models have the same shapes, got [5, 4] for 'head.weight' (and 1 more) of "
        "expert 'b' and [3, 4] in the start: name what each task keeps for itself as heads",
    ]
    write("b", **{"head.weight": (5, 4)})
    write("a", **{"head.weight": None})
    assert found(RECIPE + "heads: head\n") == []


def test_vocabularies_that_differ_are_called_so():
    write("a", {"model_type": "toy", "vocab_size": 12}, **{"embed.weight": (12, 4)})
    write("b", {"text_config": {"vocab_size": 11}})
    assert found(RECIPE) == [
        "r.yaml:3: the models have the same vocabulary, got 12 words in expert 'a' and 10 in the "
        "start ('embed.weight'): give them one tokenizer first",
        "r.yaml:4: the models have the same vocabulary, got 11 words in expert 'b' and 10 in the "
        "start: give them one tokenizer first",
    ]


def test_types():
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    save_file(tensors | {"embed.weight": np.zeros((10, 4), np.int64)}, "a/model.safetensors")
    save_file(tensors | {"head.weight": np.zeros((3, 4), np.complex64)}, "b/model.safetensors")
    assert found(RECIPE) == [
        "r.yaml:3: an entry is a weight in all models or in none, got I64 for 'embed.weight' of "
        "expert 'a' and F32 in the start",
        "r.yaml:4: an entry is a weight in all models or in none, got C64 for 'head.weight' of "
        "expert 'b' and F32 in the start",
        "r.yaml:4: weights are float16, bfloat16, float32 or float64, got C64 for 'head.weight' in "
        "'b'",
    ]


def test_heads_and_filters_that_match_nothing():
    text = RECIPE.replace("0.5", "[{filter: mpl, value: 1}, {value: 2}]")
    assert found(text + "heads: [hed, head]\n") == [
        "r.yaml:6: a pattern of heads matches an entry of a model, got 'hed'",
        "r.yaml:4: a filter is part of a tensor's name, got 'mpl', which is in none, such as "
        "'embed.weight'",
    ]
    assert found(RECIPE + "heads: ['*']\n") == [
        "r.yaml:6: there is at least one weight to merge, got none in 'base'"
    ]


def test_numbers_that_do_not_go_together():
    linear = RECIPE.replace("task_arithmetic", "linear")
    assert found(linear.replace("0.5", "-1")) == [
        "r.yaml:5: the weights of a mean do not sum to zero, got [1.0, -1.0] for 'embed.weight'"
    ]
    assert found(linear.replace("0.5", "-1") + "parameters: {normalize: false}\n") == []
    ties = RECIPE.replace("task_arithmetic", "ties").replace("weight: 0.5", "density: [0.1, 0.3]")
    assert found(ties) == [
        "r.yaml:4: the global dialect of ties trims all tensors together, with one density, got "
        "0.1 to 0.3: write 'dialect: mergekit' or one number"
    ]
    assert found(ties + "parameters: {dialect: mergekit}\n") == []
    of_all = RECIPE.replace("task_arithmetic", "ties").replace("weight: 0.5", "weight: 1")
    (told,) = found(of_all + "parameters:\n  density: [0.1, 0.3]\n")
    line = 1 + of_all.count("\n") + 1
    assert told.startswith(f"r.yaml:{line}: the global dialect of ties trims all tensors together")


def test_mergekit_without_a_weight_for_some_tensor():
    text = """
merge_method: slerp
base_model: base
slices: [{sources: [{model: base, layer_range: [0, 3]}, {model: a, layer_range: [0, 3]}]}]
parameters: {t: [{filter: mlp, value: 1}, {filter: nowhere, value: 1}]}
"""
    assert found(text) == [
        "r.yaml:4: a slice is the whole model, got layers 0 to 3 of 2: write 'layer_range: [0, 2]'",
        "r.yaml:5: every tensor has a t, got none for 'embed.weight': write a last rule without a "
        "filter",
    ]


def test_files_that_alignment_and_correction_need():
    text = """
foundations: {f: base, g: b}
experts: {a: {path: a, foundation: g, permutation: p.safetensors}}
align: {method: dual, data: d.safetensors}
method: linear
correct: {method: tact, data: {a: gone:batches}}
output: out.safetensors
"""
    for name in ("base", "a", "b"):
        Path(name, "config.json").unlink()
    problems = found(text)
    assert problems[0].startswith("r.yaml:4: a source is a folder with config.json")
    assert problems[1:] == [
        "r.yaml:7: a corrected model is a folder, got the file 'out.safetensors'",
        "r.yaml:3: a source is a folder with config.json, or an id in the local cache of Hugging "
        "Face (nothing is downloaded), got 'a'",
        "r.yaml:3: a permutation is a file of nlm align, got 'p.safetensors'",
    ]


def test_one_architecture():
    write("a", CONFIG | {"num_attention_heads": 2})
    write("b", {"model_type": "other", "vocab_size": 10})
    write("base", CONFIG | {"num_attention_heads": 4})
    assert found(RECIPE) == [
        "r.yaml:3: the models are of one architecture, got num_attention_heads 2 in expert 'a' and "
        "4 in the start",
        "r.yaml:4: the models are of one architecture, got model_type 'other' in expert 'b' and "
        "'toy' in the start",
    ]


ALIGNED = """
foundations: {f: f.safetensors, g: g.safetensors}
experts: {a: {path: a.safetensors, foundation: g}}
method: linear
align: {method: weights, spec: spec.json}
"""


def test_a_specification_is_one_of_the_models():
    network = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    nlm.trace(network, torch.randn(2, 5)).save("spec.json")
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    for name in "fga":
        save_file(state, f"{name}.safetensors")
    assert found(ALIGNED) == []
    assert found(ALIGNED.replace(", spec: spec.json", "")) == [
        "r.yaml:5: a file of weights is permuted by a specification, got none: write "
        "'align: {spec: FILE}'"
    ]
    for name in "fga":
        save_file({f"0.{key}": value for key, value in state.items()}, f"{name}.safetensors")
    [problem] = found(ALIGNED)
    assert problem.startswith("r.yaml:3: a state dict has the entries of its specification, got")
    [problem] = found(ALIGNED.replace("spec.json", "specs.json"))
    assert problem.startswith(
        "r.yaml:5: a specification is a file, or one of those that are shipped"
    )


def test_an_architecture_that_is_unknown():
    text = ALIGNED.replace(".safetensors", "").replace(", spec: spec.json", "")
    text = text.replace("f: f, g: g", "f: base, g: b")
    [problem] = found(text)
    assert problem.startswith("r.yaml:5: a config.json names a model_type that transformers")
    assert "knows, got 'toy' in 'base'" in problem


def test_outputs(monkeypatch):
    Path("out").mkdir()
    assert found(RECIPE + "output: out\n") == [
        "r.yaml:6: an output that exists is replaced only with force (--force), got 'out'"
    ]
    assert found(RECIPE + "output: out\n", force=True) == []
    assert found(RECIPE + "output: none/out\n") == [
        f"r.yaml:6: the folder of an output exists, got '{Path('none').absolute()}'"
    ]
    assert found(RECIPE) == []
    written = 4 * (40 + 16 + 16 + 12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=written - 1))
    assert found(RECIPE + "output: new\n") == [
        f"r.yaml:6: the disk has room for {written} bytes, got {written - 1} free in '{Path.cwd()}'"
    ]
    assert found(RECIPE + "output: {path: new, dtype: float16}\n") == []


def test_a_forecast():
    once = 4 * (40 + 16 + 16)
    text = RECIPE + "heads: [head]\noutput: {dtype: bfloat16}\n"
    Path("r.yaml").write_text(text)
    inputs = {"base": once, "expert 'a'": once, "expert 'b'": once}
    expected = forecast(read_recipe("r.yaml"))
    assert expected == Forecast(
        "task_arithmetic", inputs, 1, 3 * once, 3 * once, once // 2, 0, tensors=3
    )
    assert expected.seconds(Rates(read=once, write=once / 100, memory=3 * once)) == 50
    assert expected.seconds(Rates(read=once, write=once, memory=3 * once)) == 4
    assert expected.rows(Rates(once, once, once))[-3:] == [
        ("reads", "864 B"), ("writes", "144 B"), ("takes about", "6.0 s"),
    ]  # fmt: skip
    # Thresholds: each expert beside the base; from the disk again where they are of all tensors.
    Path("r.yaml").write_text(text.replace("task_arithmetic", "ties"))
    expected = forecast(read_recipe("r.yaml"))
    assert (expected.passes, expected.taken, expected.read) == (2, 7 * once, 7 * once)
    Path("r.yaml").write_text(
        text.replace("task_arithmetic", "ties") + "parameters: {dialect: mergekit}\n"
    )
    expected = forecast(read_recipe("r.yaml"))
    assert (expected.passes, expected.taken, expected.read) == (2, 7 * once, 3 * once)
    shutil.rmtree("a")
    with pytest.raises(RecipeError, match=r"r\.yaml:3: a checkpoint must exist, got 'a'"):
        forecast(read_recipe("r.yaml"))


def test_permuted_copies_are_forecast():
    """The moved expert and foundation, and the mean of the foundations; what is read for them."""
    Path("r.yaml").write_text("""
foundations: {f: base, g: b}
experts: {a: {path: a, foundation: g}, c: {path: base, foundation: f}}
method: task_arithmetic
align: weights
""")
    expected = forecast(read_recipe("r.yaml"))
    once = expected.written
    assert expected.work == 3 * once and expected.before == (3 + 2) * once
    assert expected.read == 3 * once  # base, a, c
    assert expected.memory == 2 * once  # what may be permuted in a toy is not known
    assert list(expected.inputs) == [
        "foundation 'f'", "foundation 'g'", "base", "expert 'a'", "expert 'c'",
    ]  # fmt: skip
    assert ("permuted copies, until it is done", "1.01 kB") in expected.rows()
    rates = Rates(read=once, write=once, memory=3 * once)
    assert expected.seconds(rates) == 5 + 3 + max(3 + 1, 1)
    assert expected.rows(rates)[-1] == ("takes about", "12.0 s, alignment not counted")


def test_memory():
    """Of files that claim terabytes, and take none of the disk."""
    size = 1 << 41
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    for name in ("base", "a", "b"):
        with Path(name, "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    [*_, problem] = found("""
foundations: {f: base, g: b}
experts: {a: {path: a, foundation: g}}
method: linear
align: weights
""")
    assert re.fullmatch(
        rf"r\.yaml:5: what is held at once fits into memory, got {2 * size} bytes for "
        r"\d+ free",
        problem,
    )
    # One row, of which DELLA ranks 2^20 entries at a time.
    assert found(RECIPE.replace("task_arithmetic", "della\nseed: 1")) == []


def test_processes_that_share_the_data_hold_all_models_each(monkeypatch):
    """By the correction all models: 4 of them, in float32, in each of the processes."""
    size = 4 * (10 * 4 + 4 * 4 + 4 * 4 + 3 * 4)
    told = "what is held at once fits into memory"
    monkeypatch.setattr(sys.modules["nlm.recipe.check"], "available_memory", lambda: 9 * size)
    for method, processes, fits in (
        ("tact", 1, True), ("tact", 2, True), ("tact", 3, False), ("refit", 8, True),
    ):  # fmt: skip
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        problems = found(f"{RECIPE}correct: {{method: {method}, data: {{a: d.txt, b: d.txt}}}}\n")
        said = [each for each in problems if told in each]
        assert (said == []) == fits, said
        if not fits:
            assert f"got {12 * size} bytes for {9 * size} free and 3 processes, without" in said[0]


def test_a_permutation_is_one():
    """Found out by its header, before any work."""
    text = RECIPE.replace("a: a", "a: {path: a, permutation: p.safetensors}")
    save_file({"x": np.zeros(3)}, "p.safetensors")
    assert "got 'p.safetensors': another safetensors file" in found(text)[-1]
    Path("p.safetensors").write_bytes(b"12345678901234567890")
    assert found(text)[-1].startswith("r.yaml:3: a permutation is a file of nlm align, got 'p.safe")


def test_rates_are_measured_and_nothing_is_left(folder):
    files = [folder / name / "model.safetensors" for name in ("base", "a")]
    before = sorted(folder.rglob("*"))
    rates = measure_rates(files, folder)
    assert rates.read > 0 and rates.write > 0 and rates.memory > 1e8
    assert sorted(folder.rglob("*")) == before
    assert available_memory() is None or available_memory() > 1 << 20
