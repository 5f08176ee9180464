"""``nlm spec``: its tables, its page, tables of Git Re-Basin in and out, and what it refuses."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from _networks import mlp
from safetensors.torch import save_file

from nlm import AxisGroup, PermutationSpec
from nlm.cli.app import run
from nlm.cli.spec_figure import figure
from nlm.cli.spec_layers import shown
from nlm.symmetry import parse

SOURCES = """
import sys
sys.path.insert(0, {tests!r})
from _networks import convnet, images, mlp, vectors

def network():
    return mlp(), vectors()

def pictures():
    return convnet(), (images(),), {{}}

def nothing():
    return 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with functions that make models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sources.py").write_text(SOURCES.format(tests=str(Path(__file__).parents[1])))
    monkeypatch.delitem(sys.modules, "sources", raising=False)
    return tmp_path


def transformer(layers: int = 3, odd: int | None = None) -> PermutationSpec:
    """Layers of attention heads on a residual stream; ``odd`` has another inner size."""
    groups = {"g0": AxisGroup("g0", 8, origin="embed")}
    params = {"embed.weight": (parse("50"), parse("g0:8"))}
    for layer in range(layers):
        heads, inner = f"g{2 * layer + 1}", f"g{2 * layer + 2}"
        size = 6 if layer == odd else 4
        groups[heads] = AxisGroup(heads, 2, origin=f"layers.{layer}.v")
        groups[inner] = AxisGroup(inner, size, (heads,), f"layers.{layer}.v")
        units = parse(f"{heads}:2 x {inner}:{size}")
        params[f"layers.{layer}.v.weight"] = (units, parse("g0:8"))
        params[f"layers.{layer}.o.weight"] = (parse("g0:8"), units)
    return PermutationSpec(groups, params, outputs=("logits",), opaque_ops={"aten.sort": 2})


def sentence(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_help_needs_no_torch(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would fail
    assert run(["spec", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("discover", "show", "verify", "import", "export"))
    assert run(["spec", "discover", "--help"]) == 0


def test_discover_proves_and_writes(capsys) -> None:
    assert run(["spec", "discover", "sources:network", "-o", "spec.json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 groups, 2 permutations\nVerified in float64")
    assert out.endswith("The specification is spec.json\n")
    assert PermutationSpec.load("spec.json").proven
    assert run(["spec", "discover", "sources:pictures"]) == 0
    assert "[20, g1:12 x 4]" in capsys.readouterr().out.replace("g2:20", "20")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sources:missing", "a source package.module:function exists"),
        ("nosuchmodule:network", "a source package.module:function exists"),
        ("sources:nothing", "returns (model, example_inputs[, kwargs]), got int"),
    ],
)
def test_a_wrong_source_is_one_sentence(source: str, words: str, capsys) -> None:
    assert run(["spec", "discover", source, "-o", "spec.json"]) == 1
    assert words in sentence(capsys)
    assert not Path("spec.json").exists()


def test_show_tells_layers_that_are_alike_once(capsys) -> None:
    transformer().save("t.yaml")
    assert run(["spec", "show", "t.yaml"]) == 0
    out = capsys.readouterr().out
    assert "layers.0-2.v.weight" in out and "layers.1" not in out
    assert "g1 (3x)" in out and "g3" not in out
    assert re.search(r"g2 \(3x\) +4 +g1 +6", out), out  # 2 heads in each of 3 layers
    assert "aten.sort" in out and "7 groups, 10 permutations\nNot verified.\n" in out
    assert run(["spec", "show", "t.yaml", "--all"]) == 0
    out = capsys.readouterr().out
    assert "layers.2.v.weight" in out and "g5" in out and "(3x)" not in out


def test_only_layers_that_are_alike_are_folded() -> None:
    titles = [entry.title for entry in shown(transformer(5, odd=2)).entries]
    assert titles[1::2] == ["layers.0-1.v.weight", "layers.2.v.weight", "layers.3-4.v.weight"]
    view = shown(transformer(5, odd=2))
    assert [group.id for group in view.groups] == ["g0", "g1", "g2", "g5", "g6", "g7", "g8"]
    assert view.times["g1"] == 2 and view.times["g5"] == 1 and view.times["g0"] == 1


def test_nested_layers_are_folded_in_both() -> None:
    spec = PermutationSpec(
        {f"u{a}{b}": AxisGroup(f"u{a}{b}", 4) for a in range(2) for b in range(3)},
        {
            f"stages.{a}.blocks.{b}.{name}": (parse(f"u{a}{b}:4"),)
            for a in range(2)
            for b in range(3)
            for name in ("weight", "bias")
        },
    )
    view = shown(spec)
    assert [entry.title for entry in view.entries] == [
        "stages.0-1.blocks.0-2.weight",
        "stages.0-1.blocks.0-2.bias",
    ]
    assert view.times == {"u00": 6}


def test_the_page_draws_the_groups(capsys) -> None:
    spec = transformer()
    spec.groups["g1"] = AxisGroup("g1", 2, origin="<script>alert(1)</script>")
    spec.save("t.json")
    assert run(["spec", "show", "t.json", "--html", "t.html"]) == 0
    page = Path("t.html").read_text()
    assert page.startswith("<!doctype html>") and "<script>" not in page
    assert page.count("<svg") == 1 and "layers.0-2, 3x" in page
    assert "src=" not in page and "href=" not in page
    assert run(["spec", "show", "t.json", "--html", "t.html"]) == 1
    assert "--force" in sentence(capsys)
    assert run(["spec", "show", "t.json", "--html", "t.html", "--force"]) == 0
    assert run(["spec", "show", "t.json", "--html", "./t.json", "--force"]) == 1
    assert PermutationSpec.load("t.json").groups.keys() == spec.groups.keys()


def test_the_figure_fills_what_a_group_stands_on() -> None:
    drawing = figure(shown(transformer(1)))
    cells = re.findall(r'<path d="([^"]*)" fill="#[^>]*><title>([^<]*)</title>', drawing)
    told = [title for _, title in cells]
    assert told == [
        "embed.weight [50, g0:8]", "layers.0.v.weight [g1:2 x g2:4, g0:8]",
        "layers.0.o.weight [g0:8, g1:2 x g2:4]", *2 * (
            "layers.0.v.weight [g1:2 x g2:4, g0:8]", "layers.0.o.weight [g0:8, g1:2 x g2:4]",
        ),
    ]  # fmt: skip
    assert all(path.count("M") == 1 for path, _ in cells)
    square = PermutationSpec({"g": AxisGroup("g", 3)}, {"w": (parse("g:3"), parse("g:3"))})
    assert re.search(r'd="M[^"]*zM[^"]*z"', figure(shown(square)))


def test_verify_accepts_writes_and_refuses(capsys) -> None:
    table = {"0.weight": ("P", None), "0.bias": ("P",), "2.weight": (None, "P")}
    with pytest.warns(UserWarning, match="leaves out"):
        spec = PermutationSpec.from_axes_to_perm(table, mlp().state_dict())
    spec.save("good.json")
    assert run(["spec", "verify", "good.json", "sources:network", "-o", "proven.json"]) == 0
    assert "Verified in float64" in capsys.readouterr().out
    assert PermutationSpec.load("proven.json").proven
    before = Path("good.json").read_bytes()
    assert run(["spec", "verify", "good.json", "sources:network"]) == 0
    told = "good.json is as it was: -o FILE writes the specification with its proof\n"
    assert capsys.readouterr().out.endswith(told) and Path("good.json").read_bytes() == before
    assert not PermutationSpec.load("good.json").proven
    spec.params["0.bias"] = (parse("24"),)
    spec.save("bad.json")
    assert run(["spec", "verify", "bad.json", "sources:network", "-o", "no.json"]) == 1
    assert "'P'" in sentence(capsys) and not Path("no.json").exists()
    assert run(["spec", "verify", "good.json", "sources:pictures"]) == 1
    assert "entries" in sentence(capsys)


def test_a_table_comes_in_and_goes_out(capsys) -> None:
    table = {
        "0.weight": ["P0", None], "0.bias": ["P0"], "2.weight": ["P1", "P0"], "2.bias": ["P1"],
        "4.weight": [None, "P1"], "4.bias": [None],
    }  # fmt: skip
    Path("table.yaml").write_text(yaml.safe_dump(table))
    save_file(mlp().state_dict(), "model.safetensors")
    arguments = ["table.yaml", "--weights", "model.safetensors", "-o"]
    assert run(["spec", "import", *arguments, "spec.json"]) == 0
    assert "Not verified." in capsys.readouterr().out
    assert run(["spec", "import", *arguments, "proven.json", "--source", "sources:network"]) == 0
    assert PermutationSpec.load("proven.json").proven
    for name in ("out.yaml", "out.json"):
        assert run(["spec", "export", "spec.json", "-o", name]) == 0
        assert yaml.safe_load(Path(name).read_text()) == table
    Path("shards").mkdir()
    state = mlp().state_dict()
    for number, names in enumerate((list(state)[:3], list(state)[3:])):
        save_file({name: state[name] for name in names}, f"shards/{number}.safetensors")
    assert run(["spec", "import", "table.yaml", "--weights", "shards", "-o", "2.json"]) == 0
    assert PermutationSpec.load("2.json").params == PermutationSpec.load("spec.json").params


def test_a_wrong_table_is_refused_with_the_group(capsys) -> None:
    table = {
        "0.weight": ["P0", None], "0.bias": ["P0"], "2.weight": ["P1", "P0"], "2.bias": ["P1"],
        "4.weight": ["P2", "P1"], "4.bias": ["P2"],
    }  # fmt: skip
    Path("table.yaml").write_text(yaml.safe_dump(table))
    save_file(mlp().state_dict(), "model.safetensors")
    arguments = ["table.yaml", "--weights", "model.safetensors", "-o", "spec.json"]
    assert run(["spec", "import", *arguments, "--source", "sources:network"]) == 1
    assert "'P2'" in sentence(capsys) and not Path("spec.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "a mapping of entries"),
        ("0.weight: P0", "a mapping of entries"),
        ("0.weight: [1, 2]", "a mapping of entries"),
        ("{", "a table is YAML or JSON"),
        ("9.weight: [P0, null]", "a table names entries of the state dict"),
    ],
)
def test_what_is_no_table_is_one_sentence(content: str, words: str, capsys) -> None:
    Path("table.yaml").write_text(content)
    save_file(mlp().state_dict(), "model.safetensors")
    arguments = ["table.yaml", "--weights", "model.safetensors", "-o", "spec.json"]
    assert run(["spec", "import", *arguments]) == 1
    assert words in sentence(capsys)


def test_what_a_table_cannot_say_is_refused(capsys) -> None:
    transformer().save("t.json")
    assert run(["spec", "export", "t.json", "-o", "table.yaml"]) == 1
    assert "one group per dimension" in sentence(capsys)
    assert not Path("table.yaml").exists()


def test_missing_and_damaged_files_are_one_sentence(capsys) -> None:
    assert run(["spec", "show", "nowhere.json"]) == 1
    assert "nowhere.json" in sentence(capsys)
    Path("spec.json").write_text('{"version": 1')
    assert run(["spec", "show", "spec.json"]) == 1
    assert "JSON or YAML" in sentence(capsys)
    Path("table.yaml").write_text("{}")
    Path("model.safetensors").write_bytes(b"short")
    arguments = ["table.yaml", "--weights", "model.safetensors", "-o", "out.json"]
    assert run(["spec", "import", *arguments]) == 1
    assert "a whole safetensors file" in sentence(capsys)


def test_a_stale_proof_is_none(capsys) -> None:
    assert run(["spec", "discover", "sources:network", "-o", "spec.json"]) == 0
    text = Path("spec.json").read_text()
    Path("spec.json").write_text(text.replace('"outputs": ["output"]', '"outputs": []'))
    capsys.readouterr()
    assert run(["spec", "show", "spec.json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\nNot verified.\n")
    assert "changed since in 'spec.json'; it is not verified" in shown.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"version": 2, "groups": {}, "params": {}}', "of version 1 is read, got version 2"),
        ('{"version": 1, "groups": {"a b": {"size": 2}}, "params": {}}', "a group's name is made"),
        ('{"version": 1, "groups": {}, "params": {"w": ["g0:"]}}', "a layout is written like"),
        ('{"version": 1, "groups": {}, "params": {"w": "g0:2"}}', "one layout per dimension"),
        ('{"version": 1, "groups": {"g0": {}}, "params": {}}', "AxisGroup has size, got none"),
        ("[1]", "a specification is a mapping with version, groups and params"),
        ("{", "a specification is JSON or YAML"),
    ],
)
def test_a_damaged_specification_is_one_sentence(content: str, words: str, capsys) -> None:
    for name in ("spec.json", "spec.yaml"):
        Path(name).write_text(content)
        assert run(["spec", "show", name]) == 1
        error = sentence(capsys)
        assert words in error and f"'{name}'" in error and error.count("nlm") == 1


def test_a_folder_is_no_file(capsys) -> None:
    Path("folder").mkdir()
    assert run(["spec", "show", "folder"]) == 1
    assert "a specification is a file" in sentence(capsys)
    save_file(mlp().state_dict(), "model.safetensors")
    arguments = ["--weights", "model.safetensors", "-o", "spec.json"]
    for table in ("folder", "nowhere.yaml"):
        assert run(["spec", "import", table, *arguments]) == 1
        assert f"a table is a file, got '{table}'" in sentence(capsys)


def test_one_is_not_many(capsys) -> None:
    PermutationSpec({"g": AxisGroup("g", 3)}, {"w": (parse("g:3"),)}).save("spec.json")
    assert run(["spec", "show", "spec.json"]) == 0
    assert "\n1 group, 1 permutation\n" in capsys.readouterr().out
    assert run(["spec", "export", "spec.json", "-o", "table.yaml"]) == 0
    assert capsys.readouterr().out == "1 entry; the table is table.yaml\n"


def tiny_bert(folder: Path, weights: bool) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=32, architectures=["BertForMaskedLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    if weights:
        transformers.BertForMaskedLM(config).save_pretrained(folder)


def test_a_folder_is_traced_shown_and_proven(capsys) -> None:
    tiny_bert(Path("bert"), weights=False)
    assert run(["spec", "discover", "bert", "-o", "bert.json"]) == 0
    assert capsys.readouterr().out.startswith("9 groups, 21 permutations\nNot verified.")
    assert run(["spec", "discover", "bert/config.json"]) == 0
    assert "bert.encoder.layer.0-1.attention.self.query.weight" in capsys.readouterr().out
    assert run(["spec", "verify", "bert.json", "bert"]) == 1
    assert "--random" in sentence(capsys)
    assert run(["spec", "verify", "bert.json", "bert", "--random", "--seeds", "1"]) == 0
    assert "Verified in float64" in capsys.readouterr().out
    tiny_bert(Path("bert"), weights=True)
    capsys.readouterr()
    assert run(["spec", "verify", "bert.json", "bert", "-o", "bert.json", "--force"]) == 0
    assert PermutationSpec.load("bert.json").proven


def test_a_wrong_specification_of_a_folder_is_refused(capsys) -> None:
    tiny_bert(Path("bert"), weights=True)
    assert run(["spec", "discover", "bert", "-o", "bert.json"]) == 0
    spec = PermutationSpec.load("bert.json")
    name = "bert.encoder.layer.1.output.dense.bias"
    spec.params[name] = (parse("24"),)
    spec.save("wrong.json")
    capsys.readouterr()
    assert run(["spec", "verify", "wrong.json", "bert"]) == 1
    assert f"'{name}'" in sentence(capsys)


def test_a_source_that_is_nowhere_is_one_sentence(capsys) -> None:
    assert run(["spec", "discover", "no/such-model"]) == 1
    assert "nothing is downloaded" in sentence(capsys)
    tiny_bert(Path("bert"), weights=False)
    assert run(["spec", "discover", "bert", "--class", "NoSuchModel"]) == 1
    assert "'NoSuchModel'" in sentence(capsys)
    assert run(["spec", "discover", "bert", "--outputs", "nothing"]) == 1
    assert "'nothing'" in sentence(capsys)


def test_a_shipped_specification_is_shown_by_its_name(capsys) -> None:
    assert run(["spec", "show", "gpt2", "--html", "gpt2.html"]) == 0
    assert "transformer.h.0-11.attn.c_attn.weight" in capsys.readouterr().out
    assert "transformer.h.0-11, 12x" in Path("gpt2.html").read_text()
