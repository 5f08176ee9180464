"""nlm's own recipes: what they become, and every error with its line, word for word."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nlm._methods import OPTIONS
from nlm.align import _METHODS as ALIGNMENTS_OF_ALIGN
from nlm.correct.by_name import CORRECTIONS as CORRECTIONS_BY_NAME
from nlm.recipe import (
    Alignment,
    Correction,
    Expert,
    Output,
    Recipe,
    RecipeError,
    Rule,
    Values,
    read_recipe,
)
from nlm.recipe.methods import ALIGNMENTS, CHOICES, CORRECTIONS, METHODS, NUMBERS
from nlm.recipe.nodes import size_of

COMPLETE = """
foundations: {one: models/one, two: models/two}
base: one
align: {method: weights, spec: spec.json}
experts:
  digits: {path: experts/digits, foundation: one}
  greek:
    path: experts/greek
    foundation: two
    weight: [0.2, 1e-1]
    density: [{filter: mlp, value: 0.3}, {value: [0.1, 0.2]}]
method: ties
parameters: {scale: 0.4, dialect: mergekit}
correct: {method: refit, samples: 128, data: {digits: d.safetensors, greek: data:greek}}
heads: [classifier]
output: {path: merged, dtype: bfloat16, shard: 2GiB, per_task: folded}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("recipe.yaml")


def problems(file: Path, text: str) -> list[str]:
    file.write_text(textwrap.dedent(text))
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_a_complete_recipe(file):
    file.write_text(COMPLETE)
    greek = {
        "weight": Values.of(0.2, 0.1),
        "density": Values((Rule("mlp", (0.3,)), Rule(None, (0.1, 0.2)))),
    }
    assert read_recipe(file) == Recipe(
        experts=(
            Expert("digits", Path("experts/digits"), "one"),
            Expert("greek", Path("experts/greek"), "two", values=greek),
        ),
        method="ties",
        foundations={"one": Path("models/one"), "two": Path("models/two")},
        base=Path("models/one"),
        values={
            "weight": Values.of(1.0),
            "scale": Values.of(0.4) + Values.of(1.0),
            "density": Values.of(0.2),
        },
        options={"dialect": "mergekit"},
        align=Alignment("weights", "spec.json"),
        correct=Correction("refit", {"digits": "d.safetensors", "greek": "data:greek"}, 128),
        heads=("classifier",),
        output=Output(Path("merged"), "bfloat16", 2**31, "folded"),
        file=file,
    )


def test_a_short_recipe(file):
    file.write_text("experts: {a: x/a, b: x/b}\nmethod: linear\noutput: merged.safetensors\n")
    recipe = read_recipe(file)
    assert recipe.experts == (Expert("a", Path("x/a")), Expert("b", Path("x/b")))
    assert recipe.options == {"normalize": True} and recipe.base is None
    assert recipe.output == Output(Path("merged.safetensors"))
    assert recipe.value("weight", "a", "any.weight") == 1.0
    assert recipe.where("experts", "b") == "recipe.yaml:1: "
    assert recipe.where("method") == "recipe.yaml:2: "
    assert recipe.where("seed") == "recipe.yaml: "


def test_paths_are_relative_to_the_recipe(file, tmp_path):
    Path("models/spec").mkdir(parents=True)
    Path("models/spec/s.json").write_text("{}")
    text = "experts: {a: a, b: /b}\nmethod: linear\nalign: {spec: spec/s.json}\noutput: out\n"
    Path("models/r.yaml").write_text(text)
    recipe = read_recipe("models/r.yaml")
    assert [each.path for each in recipe.experts] == [Path("models/a"), Path("/b")]
    assert recipe.align == Alignment(None, "models/spec/s.json")
    assert recipe.output.path == Path("models/out")


def test_one_foundation_is_the_base(file):
    file.write_text("foundations: {f: m}\nexperts: {a: a}\nmethod: task_arithmetic\n")
    assert read_recipe(file).base == Path("m")


def test_numbers_are_looked_up_by_depth(file):
    file.write_text("""
base: b
experts:
  a: {path: a, weight: [{filter: up, value: [0, 1]}]}
method: task_arithmetic
parameters: {weight: [2, 4]}
""")
    names = ["embed", *(f"layers.{n}.{what}" for n in range(5) for what in ("up", "down"))]
    value = read_recipe(file).numbers(names)
    assert [value("weight", "a", f"layers.{n}.up") for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [value("weight", "a", f"layers.{n}.down") for n in range(5)] == [2, 2.5, 3, 3.5, 4]
    assert value("weight", "a", "embed") == 2 and value("scale", None, "embed") == 1


def test_anchors_and_merge_keys(file):
    file.write_text("""
base: b
experts:
  a: &one {path: a, weight: 0.5}
  b: {<<: *one, path: b}
  c: {<<: [{weight: 2, path: no}, *one], path: c}
method: task_arithmetic
""")
    experts = read_recipe(file).experts
    assert [str(each.path) for each in experts] == ["a", "b", "c"]
    assert [each.values["weight"] for each in experts] == [Values.of(w) for w in (0.5, 0.5, 2)]


WRONG = [
    ("experts: {a: a}\nmethod: linaer\n",
     ["2: a method is one of linear, uniform_soup, task_arithmetic, ties, dare, dare_ties, "
      "breadcrumbs, breadcrumbs_ties, della, della_linear, sce, tall_mask, consensus, fisher, "
      "slerp, model_stock, regmean, greedy_soup, got 'linaer'"]),
    ("experts: {a: a}\nmethod: greedy_soup\n",
     ["2: greedy_soup alone has a score, got none for greedy_soup: write 'score: "
      "package.module:function', or a file of labelled inputs"]),
    ("experts:\n  a: {path: a, fisher: f.safetensors}\n  b: b\nmethod: fisher\n",
     ["3: fisher has Fisher information of every expert, got none for 'b': write 'fisher: FILE'"]),
    ("base: b\nexperts: {a: {path: a, fisher: f, gamma: 1}}\nmethod: breadcrumbs\n",
     ["2: expert 'a' has no 'fisher': it has path, foundation, permutation, weight, density, gamma",
      "2: gamma of expert 'a' lies in [0, 1), got 1"]),
    ("base: b\nexperts: {a: a}\nmethod: della\n",
     ["3: della drops at random, by a seed, got none: write 'seed: 0' beside it"]),
    ("expert: {a: a}\nmethod: linear\n",
     ["1: a recipe has no 'expert': write 'experts'", "1: a recipe has experts, got none: write "
      "'experts: ...'"]),
    ("experts: {a: a}\nmethod: linear\nzebra: 1\n",
     ["3: a recipe has no 'zebra': it has foundations, base, experts, method, parameters, seed, "
      "align, correct, heads, output, score"]),
    ("experts:\n  a: {path: a, wieght: 1}\nmethod: linear\n",
     ["2: expert 'a' has no 'wieght': write 'weight'"]),
    ("experts:\n  a: {weight: 1}\nmethod: linear\n",
     ["2: expert 'a' has a path, got none: write 'path: FOLDER'"]),
    ("experts:\n  a: {path: a, density: 0.2}\nmethod: linear\n",
     ["2: expert 'a' has no 'density': it has path, foundation, permutation, weight"]),
    ("experts: [a, b]\nmethod: linear\n", ["1: experts is a mapping of keys, got a list of 2"]),
    ("experts: {a: {path: [x]}}\nmethod: linear\n",
     ["1: the path of expert 'a' is a text, got a list of 1"]),
    ("experts: {a: a, a: b}\nmethod: linear\n", ["1: a key of experts stands once, got 'a' twice"]),
    ("experts: {[a]: a}\nmethod: linear\n", ["1: the keys of experts are names, got a list of 1"]),
    ("experts:\n  a:\n    path: a\n    weight: much\nmethod: linear\n",
     ["4: weight of expert 'a' is a number, a list of numbers or of rules with 'filter' and "
      "'value', got 'much'"]),
    ("experts: {a: {path: a, weight: true}}\nmethod: linear\n",
     ["1: weight of expert 'a' is a number, a list of numbers or of rules with 'filter' and "
      "'value', got true"]),
    ("experts: {a: {path: a, weight: []}}\nmethod: linear\n",
     ["1: weight of expert 'a' has at least one number, got an empty list"]),
    ("experts: {a: {path: a, weight: [{filtr: x, value: 1}, {filter: y}, 3]}}\nmethod: linear\n",
     ["1: a rule of weight of expert 'a' has no 'filtr': write 'filter'",
      "1: a rule of weight of expert 'a' has a value, got none: write 'value: NUMBER'",
      "1: a rule of weight of expert 'a' is a mapping of keys, got 3"]),
    ("base: b\nexperts: {a: a}\nmethod: ties\nparameters:\n  density: 1.5\n  dialect: slang\n",
     ["5: density lies in (0, 1], got 1.5",
      "6: dialect is one of global, mergekit, peft{more}, got 'slang'"]),
    ("base: b\nexperts: {a: a}\nmethod: dare\nparameters: {drop: 1}\n",
     ["3: dare drops at random, by a seed, got none: write 'seed: 0' beside it",
      "4: drop lies in [0, 1), got 1"]),
    ("base: b\nexperts: {a: a}\nmethod: dare\nseed: -1\nparameters: {normalize: 3, scal: 1}\n",
     ["4: a seed is a whole number from 0, got -1", "5: dare (the method) has no 'scal': write "
      "'scale'", "5: normalize is true or false, got 3"]),
    ("experts: {a: a}\nmethod: ties\n",
     ["2: ties starts from a base, got none: write 'base: FOLDER' beside it"]),
    ("experts: {a: a}\nmethod: slerp\n",
     ["1: slerp merges 2 experts, got 1"]),
    ("base: b\nexperts: {a: a}\nmethod: model_stock\n",
     ["2: model_stock merges at least 2 experts, got 1"]),
    ("foundations: {f: f, g: g}\nexperts:\n  a: {path: a, foundation: g}\n  b: b\nmethod: linear\n",
     ["3: an expert of 'g' is aligned with 'f', got no alignment for 'a': write 'align: weights', "
      "or 'align: none' to merge it as it is",
      "4: expert 'b' is of one of f, g, got no foundation: write 'foundation: NAME'"]),
    ("experts: {a: {path: a, foundation: f}}\nmethod: linear\n",
     ["1: a foundation is one that 'foundations' names, got 'f' and none named"]),
    ("foundations: {f: f}\nexperts: {a: {path: a, foundation: g}}\nmethod: linear\n"
     "align: weights\n",
     ["2: the foundation of expert 'a' is one of f, got 'g'",
      "4: several foundations are aligned, got 1"]),
    ("experts: {a: a}\nmethod: linear\nalign: weigths\n",
     ["3: an alignment is one of weights, frank-wolfe, activations, dual, orthogonal, none, got "
      "'weigths'"]),
    ("foundations: {f: f, g: g}\nexperts: {a: {path: a, foundation: g}}\nmethod: linear\n"
     "align: activations\n",
     ["4: alignment by activations sees data, got none: write 'align: {method: activations, data: "
      "FILE}'"]),
    ("foundations: {f: f, g: g}\nexperts: {a: {path: a, foundation: g}}\nmethod: linear\n"
     "align: {method: weights, data: d.txt, samples: 0}\n",
     ["4: align has data for activations, dual, orthogonal, got it for weights",
      "4: align has samples for activations, dual, orthogonal, got it for weights",
      "4: the samples of align is a whole number from 1, got 0"]),
    ("experts: {a: a}\nmethod: linear\n"
     "correct: {method: refit, samples: 0, data: {a: x, b: y}}\n",
     ["3: the data of correct is of an expert (a), got 'b'",
      "3: the samples of correct is a whole number from 1, got 0"]),
    ("experts: {a: a}\nmethod: linear\noutput: {path: o, per_task: beside}\n",
     ["3: per_task of output is one of side-car, folded, got 'beside'"]),
    ("experts: {a: a}\nmethod: linear\ncorrect: tact\n",
     ["3: tact has data for every expert, got none for a: write 'data: {a: FILE}'"]),
    ("experts: {a: a}\nmethod: linear\ncorrect: {data: {a: x}}\n",
     ["3: correct has a method, got none: write 'method: tact'"]),
    ("experts: {a: a}\nmethod: linear\noutput: {path: o, dtype: int8, shard: many}\n",
     ["3: the dtype of output is one of float32, bfloat16, float16, got 'int8'",
      "3: the shard of output is bytes such as 5GB or 512MiB, got 'many'"]),
    ("- a\n- b\n", ["1: a recipe is a mapping of keys, got a list of 2"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_every_error_has_its_line(file, text, expected):
    from nlm._core import DIALECTS

    more = "".join(f", {each}" for each in DIALECTS[3:])
    assert problems(file, text) == [f"recipe.yaml:{e.replace('{more}', more)}" for e in expected]


def test_all_errors_of_a_file_are_shown_in_the_order_of_their_lines(file):
    found = problems(file, "method: tie\nexperts:\n  a: {pat: x}\nseed: x\noutput: []\n")
    assert [int(each.split(":")[1]) for each in found] == [1, 3, 3, 4, 5]


def test_what_is_no_recipe(file):
    assert problems(file, "") == ["recipe.yaml: a recipe is a mapping of keys, got an empty file"]
    assert problems(file, "a: [1\nb: 2\n") == [
        "recipe.yaml:2: a recipe is YAML, got while parsing a flow sequence expected ',' or ']', "
        "but got ':'"
    ]
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: a recipe is text in UTF-8, got"):
        read_recipe(file)
    with pytest.raises(RecipeError, match=r"none\.yaml: a recipe is a file, got No such file"):
        read_recipe("none.yaml")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: a recipe is YAML, got more than 100"):
        file.write_text("[" * 900)
        read_recipe(file)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12", 12), ("5GB", 5 * 10**9), ("512 MiB", 2**29), ("1.5k", 1500), ("1e6", 10**6)],
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1", "1e99", "5 apples", "nan", "inf"])
def test_what_is_no_size(text):
    assert size_of(text) is None


def test_names_are_those_of_the_library():
    for option, (default, readers) in OPTIONS.items():
        if option in NUMBERS or option in CHOICES:
            of_recipes = {name for name, each in METHODS.items() if option in each.parameters}
            assert of_recipes == set(readers) & set(METHODS)
            assert default == (NUMBERS | CHOICES)[option].default
    assert ALIGNMENTS == ALIGNMENTS_OF_ALIGN
    assert CORRECTIONS == CORRECTIONS_BY_NAME


def test_no_torch():
    code = "import sys, nlm.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WORDS = st.sampled_from(
    "foundations base experts method parameters seed align correct heads output path foundation "
    "permutation weight density drop scale t normalize dialect filter value spec data samples "
    "dtype shard linear ties slerp dare global weights none a b merge_method models model "
    "slices sources layer_range base_model out_dtype tokenizer_source union base+lora".split()
)
SCALARS = WORDS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | SCALARS, inner, max_size=5),
    max_leaves=12,
)
RECIPES = st.fixed_dictionaries(
    {"experts": st.dictionaries(WORDS, TREES, max_size=3) | TREES, "method": WORDS},
    optional={
        key: TREES
        for key in ("foundations", "base", "parameters", "seed", "align", "correct", "output")
    },
)
OF_MERGEKIT = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["linear", "slerp", "ties", "dare_ties", "model_stock"])},
    optional={
        "models": st.lists(st.fixed_dictionaries({"model": WORDS}, optional={"parameters": TREES}))
        | TREES,
        "slices": TREES, "base_model": WORDS, "parameters": st.dictionaries(WORDS, TREES) | TREES,
        "dtype": WORDS, "tokenizer": TREES,
    },
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(content=RECIPES | OF_MERGEKIT | TREES)
def test_any_yaml_is_a_recipe_or_a_list_of_located_errors(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    check_located(file, yaml.safe_dump(content, allow_unicode=True))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text("a:-[]{}&*<!|>%'\"\n #\\U0", max_size=40))
@example(text='a: "\\UFFFFFFFF"')
@example(text="a: &x [*x]\nexperts: *x\nmethod: {<<: *x}")
@example(text="&x {<<: *x, experts: *x}")
def test_any_text_is_a_list_of_located_errors(text, tmp_path_factory):
    check_located(tmp_path_factory.getbasetemp() / "any.yaml", text)


def check_located(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(read_recipe(file), Recipe)
    except RecipeError as error:
        assert error.problems
        assert all(each.startswith(f"{file}:") for each in error.problems)
