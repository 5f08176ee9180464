"""mergekit's YAML: what it becomes, by the rules of mergekit 0.1.5, and what nlm lacks."""

import textwrap
from pathlib import Path

import pytest

from nlm.recipe import Output, RecipeError, Rule, Values, read_recipe


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that reads a text as a recipe in the working folder."""
    monkeypatch.chdir(tmp_path)

    def read(text: str):
        Path("mk.yml").write_text(textwrap.dedent(text))
        return read_recipe("mk.yml")

    return read


def problems(read, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return list(caught.value.problems)


NAMES = ["embed", *(f"layers.{n}.{what}" for n in range(5) for what in ("self_attn", "mlp"))]


def test_ties(read):
    """The base among the models is no expert; weight, density and lambda; normalize is true."""
    recipe = read("""
        merge_method: ties
        base_model: x/base
        models:
          - model: x/base
            parameters:
          - model: x/a
            parameters: {weight: 0.5, density: [1, 0.5]}
          - {model: x/b, parameters: {density: [{filter: mlp, value: 0.1}], int8_mask: true}}
        parameters: {weight: 0.3, lambda: [{filter: mlp, value: 2}], int8_mask: true}
        dtype: float32
        out_dtype: torch.bfloat16
        tokenizer_source: base
    """)
    assert recipe.method == "ties" and recipe.options == {"dialect": "mergekit"}
    assert recipe.base == Path("x/base") and recipe.form == "mergekit" and recipe.seed is None
    assert {each.name: each.path for each in recipe.experts} == {"a": Path("x/a"), "b": Path("x/b")}
    assert recipe.output == Output(None, "bfloat16")
    value = recipe.numbers(NAMES)
    assert [value("weight", each, "embed") for each in "ab"] == [0.5, 0.3]
    assert [value("density", "a", f"layers.{n}.mlp") for n in range(5)] == [
        1,
        0.875,
        0.75,
        0.625,
        0.5,
    ]
    # No rule of the model's fits: the top's, then mergekit's own default.
    assert [value("density", "b", f"layers.0.{what}") for what in ("mlp", "self_attn")] == [0.1, 1]
    assert [value("scale", None, f"layers.0.{what}") for what in ("mlp", "self_attn")] == [2, 1]
    assert recipe.where("experts", "a") == "mk.yml:7: " and recipe.where("method") == "mk.yml:2: "


def test_ties_that_are_not_normalized(read):
    text = "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1, %s}"
    assert read(text % "normalize: false").options == {"dialect": "mergekit_sum"}
    assert problems(read, text % "rescale: true") == [
        "mk.yml:1: ties of nlm rescales nothing, got true: write 'rescale: false'"
    ]


@pytest.mark.parametrize(
    ("method", "given", "options"),
    [
        ("dare_linear", "x: 1", {"rescale": "l1", "normalize": False}),
        ("dare_linear", "rescale: false, normalize: true", {"rescale": "none", "normalize": True}),
        ("dare_ties", "x: 1", {"rescale": "l1", "dialect": "mergekit_sum"}),
        ("dare_ties", "normalize: true", {"rescale": "l1", "dialect": "mergekit"}),
    ],
)
def test_dare(read, method, given, options):
    """Keeps the density, drops the rest; rescales by the norm unless it is told not to."""
    given = "weight: 1" if given == "x: 1" else f"weight: 1, {given}"
    recipe = read(f"""
        merge_method: {method}
        base_model: base
        models:
          - {{model: a, parameters: {{density: 0.25}}}}
          - {{model: b}}
        parameters: {{{given}}}
    """)
    assert recipe.options == options and recipe.seed == 0
    assert [recipe.value("drop", each, "t") for each in "ab"] == [0.75, 0.0]


def test_breadcrumbs_della_and_sce(read):
    """The host's names and defaults; gamma and epsilon of each model."""
    text = "merge_method: %s\nbase_model: b\nmodels: [{model: a%s}]\nparameters: {%s}"
    crumbs = read(text % ("breadcrumbs", ", parameters: {gamma: 0.1}", "weight: 1, density: 0.5"))
    assert crumbs.options == {"normalize": False} and crumbs.seed is None
    assert [crumbs.value(name, "a", "t") for name in ("density", "gamma")] == [0.5, 0.1]
    elected = read(text % ("breadcrumbs_ties", "", "weight: 1, lambda: 2, normalize: true"))
    assert elected.options == {"dialect": "mergekit"} and elected.value("scale", None, "t") == 2
    assert [elected.value(name, "a", "t") for name in ("density", "gamma")] == [1, 0.01]
    della = read(text % ("della", "", "weight: 1, density: 0.5"))
    assert della.options == {"dialect": "mergekit", "rescale": "l1"} and della.seed == 0
    assert della.value("epsilon", "a", "t") == 0.15
    linear = read(text % ("della_linear", "", "weight: 1, epsilon: 0.2, rescale: false"))
    assert linear.options == {"normalize": False, "rescale": "none"}
    assert linear.value("epsilon", "a", "t") == 0.2
    sce = read(text % ("sce", "", "select_topk: 0.3"))
    assert sce.options == {} and sce.value("select", None, "t") == 0.3
    assert problems(read, text % ("breadcrumbs", "", "weight: 1, rescale: true")) == [
        "mk.yml:1: breadcrumbs of nlm rescales nothing, got true: write 'rescale: false'"
    ]


def test_linear_takes_a_base_for_one_more_model(read):
    """mergekit adds the base to the models, and linear gives it the weight of all."""
    recipe = read("""
        merge_method: linear
        base_model: org/b
        models: [{model: org/a, parameters: {weight: 2}}, {model: other/a}]
        parameters: {weight: 1, normalize: false, density: 0.3}
    """)
    assert recipe.base is None and recipe.options == {"normalize": False}
    assert [each.name for each in recipe.experts] == ["org/a", "other/a", "b"]
    assert [recipe.value("weight", each.name, "t") for each in recipe.experts] == [2, 1, 1]


def test_slerp_of_a_slice(read):
    """The base is the first of the two, whatever their order; t by filters and gradients."""
    recipe = read("""
        merge_method: slerp
        base_model: base
        slices:
          - sources:
              - {model: other, layer_range: [0, 5]}
              - {model: base, layer_range: [0, 5]}
            parameters: {t: [{filter: norm, value: 1}]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: bfloat16
    """)
    assert [each.name for each in recipe.experts] == ["base", "other"]
    assert recipe.base is None and recipe.layers == 5 and recipe.output.dtype == "bfloat16"
    value = recipe.numbers(NAMES)
    attention = [value("t", None, f"layers.{n}.self_attn") for n in range(5)]
    assert attention == [0, 0.5, 0.3, 0.7, 1]
    assert [value("t", None, f"layers.{n}.mlp") for n in range(5)] == [1, 0.5, 0.7, 0.3, 0]
    assert value("t", None, "embed") == 0.5 and value("t", None, "norm") == 1


def test_model_stock(read):
    recipe = read("""
        merge_method: model_stock
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {filter_wise: false}
    """)
    assert recipe.options == {} and recipe.values == {}
    assert recipe.base == Path("base") and len(recipe.experts) == 2


def test_an_absent_weight_shows_where_no_rule_fits(read):
    recipe = read("""
        merge_method: task_arithmetic
        base_model: base
        models: [{model: a, parameters: {weight: [{filter: mlp, value: 1}]}}]
    """)
    assert recipe.value("weight", "a", "layers.0.mlp") == 1
    with pytest.raises(ValueError, match=r"every tensor has a weight, got none for 'norm' of 'a'"):
        recipe.value("weight", "a", "norm")
    assert recipe.expert("a").values == {"weight": Values((Rule("mlp", (1.0,)),))}


HEAD = "merge_method: ties\nbase_model: b\n"
ONE = HEAD + "models: [{model: a, parameters: {weight: 1}}]\n"
WRONG = [
    ("merge_method: karcher\nmodels: [{model: a}]\n",
     ["1: a merge_method that nlm has is one of linear, slerp, task_arithmetic, ties, dare_linear, "
      "dare_ties, breadcrumbs, breadcrumbs_ties, della_linear, della, sce, model_stock, got "
      "'karcher'"]),
    (ONE + "chat_template: chatml\nnames: x\n",
     ["4: nlm has no 'chat_template' of mergekit: set it in the base's folder",
      "5: a recipe of mergekit has no 'names': it has merge_method, base_model, models, slices, "
      "parameters, dtype, out_dtype, tokenizer_source, tokenizer, modules, chat_template"]),
    (HEAD + "modules: {text: {models: []}}\n",
     ["3: nlm has no 'modules' of mergekit: write 'models', with filters for what differs between "
      "modules"]),
    ("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]\n",
     ["1: ties has a base_model among its models, got none"]),
    (HEAD, ["1: a recipe of mergekit has models, got none: write 'models'"]),
    (ONE + "slices: []\n", ["4: a recipe of mergekit has models or slices, got both"]),
    (HEAD + "models:\n  - model: a\n  - model: c\n    parameters: {lambda: 2, weight: 1}\n",
     ["4: a model has a weight, got none for 'a': write 'weight: 1.0' under its 'parameters'",
      "6: mergekit reads no 'lambda' of one model: write it under the 'parameters' of the whole "
      "merge"]),
    (HEAD + "models:\n  - {model: a+lora, parameters: {weight: 1}}\n"
     "  - {parameters: {weight: 1}}\n",
     ["4: nlm merges no LoRA, got 'a+lora': merge it into its model first and write that folder",
      "5: what is merged has a model, got none: write 'model: FOLDER'"]),
    (HEAD + "models:\n  - model: {model: {path: a}}\n",
     ["4: a model is a folder, got the mapping of 'model': write its path"]),
    (HEAD + "models:\n  - {model: a}\n  - {model: a}\nparameters: {weight: 1}\n",
     ["5: a model is merged once, got 'a' twice"]),
    (ONE + "parameters: {wieght: 2, phi: 0.1, density: 0}\n",
     ["4: parameters has no 'wieght': write 'weight'",
      "4: parameters has no 'phi': it has weight, density, gamma, epsilon, lambda, t, "
      "select_topk, normalize, rescale, filter_wise, int8_mask",
      "4: density lies in (0, 1], got 0"]),
    (ONE + "dtype: int8\n",
     ["4: a dtype that nlm has is one of float32, bfloat16, float16, got 'int8'"]),
    (ONE + "tokenizer_source: union\n",
     ["4: nlm keeps the tokenizer of 'b', got 'union': drop it"]),
    ("merge_method: linear\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
     "tokenizer_source: base\n",
     ["5: nlm keeps the tokenizer of 'a', got 'base': drop it"]),
    ("merge_method: linear\nmodels: []\n", ["1: linear merges at least 1 models, got 0"]),
    (ONE + "tokenizer: {source: base, tokens: {}}\n",
     ["4: tokenizer has no 'tokens': it has source"]),
    ("merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\n",
     ["1: slerp merges 2 models, got 3", "1: slerp has a t, got none: write 't: 0.5' under "
      "'parameters'"]),
    ("merge_method: model_stock\nbase_model: b\nmodels: [{model: a}]\n",
     ["1: model_stock merges at least 2 models beside the base, got 1"]),
    ("merge_method: model_stock\nbase_model: b\nmodels: [{model: a}, {model: c}]\n"
     "parameters: {filter_wise: true}\n",
     ["1: model_stock of nlm takes whole tensors, got filter_wise: write 'filter_wise: false'"]),
    (HEAD + "slices: [{sources: []}, {sources: []}]\n",
     ["3: nlm merges whole models, got 2 slices: write one of all layers, with lists of numbers "
      "for what changes with the layer"]),
    (HEAD + "slices:\n  - base_model: c\n    sources:\n      - {model: a, layer_range: [8, 16]}\n"
     "      - {model: b}\nparameters: {weight: 1}\n",
     ["4: nlm has one base for all layers, got 'c': write it beside 'merge_method'",
      "6: a layer_range of a whole model is [0, LAYERS], got a list of 2",
      "7: a source has a layer_range, got none: write 'layer_range'"]),
    (HEAD + "slices:\n  - sources:\n      - {model: a, layer_range: [0, 16]}\n"
     "      - {model: c, layer_range: [0, 8]}\nparameters: {weight: 1}\n",
     ["5: all sources have as many layers, got 8 and 16"]),
    (HEAD + "slices: [{sources: [{model: a, layer_range: [0, 8]}]}]\nparameters: {weight: 1}\n",
     ["1: ties has a base_model among its models, got b"]),
    (HEAD + "slices: [{}]\n", ["3: a slice has sources, got none: write 'sources'"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_what_nlm_lacks_or_mergekit_refuses_has_its_line(read, text, expected):
    assert problems(read, text) == [f"mk.yml:{each}" for each in expected]
