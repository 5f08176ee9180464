"""What files from strangers may not do: run, reach outside their folder, exhaust, speak HTML, or
call home. Readers alone are in test_readers.py; here whole commands meet them.
"""

import ast
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import sample
from safetensors.torch import save_file

import nlm
from nlm.cli.app import run
from nlm.cli.report import render

ROOT = Path(__file__).parents[1]
SHAPES = {"a.weight": (8, 4), "b.weight": (3, 8)}


class Evil:
    """A pickle that writes a file as it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.victim}",)


def state(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        save_file(state(seed), tmp_path / name / "model.safetensors")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "base: base\nexperts: {one: one, two: two}\nmethod: task_arithmetic\noutput: {path: out}\n"
    )
    return file


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that fails in one sentence."""
    assert run(list(arguments)) == 1
    said = capsys.readouterr().err
    assert said.startswith(("nlm", f"{arguments[-1]}:"))
    assert said.count("\n") == 1, said
    return said


# --- nothing is run -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("command", ["merge", "check"])
def test_a_malicious_pickle_in_a_recipe(recipe, tmp_path, capsys, command, is_old):
    victim = tmp_path / "victim"
    (tmp_path / "two" / "model.safetensors").unlink()
    weights = tmp_path / "two" / "pytorch_model.bin"
    torch.save({**state(2), "x": Evil(victim)}, weights, _use_new_zipfile_serialization=not is_old)
    assert str(weights) in refused(capsys, command, str(recipe))
    assert not victim.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["permutation", "spec", "data", "fisher"])
def test_a_malicious_pickle_in_the_place_of_another_file(recipe, tmp_path, capsys, key):
    victim = tmp_path / "victim"
    torch.save({"x": Evil(victim)}, tmp_path / "evil.npz")
    expert = {"permutation": "{path: two, permutation: evil.npz}",
              "fisher": "{path: two, fisher: evil.npz}"}.get(key, "two")  # fmt: skip
    method = "fisher" if key == "fisher" else "task_arithmetic"
    align = {"spec": "align: {method: weights, spec: evil.npz}\nfoundations: {f: base, g: one}\n",
             "data": "align: {method: activations, data: evil.npz}\nfoundations: {f: base, g: one}"
                     "\n"}.get(key, "base: base\n")  # fmt: skip
    text = f"{align}experts: {{one: one, two: {expert}}}\nmethod: {method}\n"
    recipe.write_text(text + "output: {path: out}\n")
    assert run(["merge", str(recipe)]) == 1
    assert not victim.exists() and not (tmp_path / "out").exists()


def test_code_in_a_models_folder(tmp_path, capsys):
    """``auto_map`` names Python in the folder, which only ``trust_remote_code`` would run."""
    folder, victim = tmp_path / "model", tmp_path / "victim"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(victim)!r}, 'w')\nclass C: pass\n")
    mapped = {"AutoConfig": "evil.C", "AutoModel": "evil.C", "AutoModelForCausalLM": "evil.C"}
    settings = {"model_type": "evil", "architectures": ["Evil"], "auto_map": mapped}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(state(0), folder / "model.safetensors")
    assert run(["spec", "discover", str(folder), "-o", str(tmp_path / "s.json")]) == 1
    assert not victim.exists()
    capsys.readouterr()


def test_nothing_in_nlm_runs_what_it_reads() -> None:
    """No call that makes more of a file than values: read from the source of the package."""
    wrong = []
    for path in sorted((ROOT / "nlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if name in (
                "eval",
                "exec",
                "pickle.load",
                "pickle.loads",
                "yaml.load",
                "os.system",
                "yaml.unsafe_load",
                "yaml.full_load",
                "marshal.loads",
                "joblib.load",
            ):
                wrong.append(f"{path}:{node.lineno} {name}")  # fmt: skip
            if name == "torch.load" and given.get("weights_only") != "True":
                wrong.append(f"{path}:{node.lineno} torch.load")
            if name == "np.load" and given.get("allow_pickle") != "False":
                wrong.append(f"{path}:{node.lineno} np.load")
            if given.get("trust_remote_code", "False") != "False" or given.get("shell") == "True":
                wrong.append(f"{path}:{node.lineno} {name}")
    assert wrong == []


# --- nothing outside is read or written -----------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret", ".."])
def test_an_index_that_leads_outside(recipe, tmp_path, capsys, name):
    save_file(state(1), tmp_path / "secret.safetensors")
    weights = dict.fromkeys(SHAPES, name)
    index = tmp_path / "one" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    assert "a file outside its folder" in refused(capsys, "merge", str(recipe))
    assert not (tmp_path / "out").exists()


def test_links_where_a_merge_writes(recipe, tmp_path, capsys):
    """In an output that is replaced, in the half of one that is resumed, and as that folder."""
    secret = tmp_path / "secret"
    secret.write_text("as it was")
    assert run(["merge", str(recipe)]) == 0
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    for each in list((tmp_path / "out").iterdir()):
        each.unlink()
        each.symlink_to(secret)
    assert run(["merge", str(recipe), "--force"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected

    half = tmp_path / ".out.partial"
    for resume in (["--resume"], []):
        assert run(["merge", str(recipe), "--force"]) == 0
        (tmp_path / "out").rename(half)
        (half / ".nlm").mkdir()
        for each in list(half.iterdir()):
            if each.is_file():
                each.unlink()
                each.symlink_to(secret)
        (half / ".nlm" / "journal.json").symlink_to(secret)
        capsys.readouterr()
        run(["merge", str(recipe), *resume])  # it may refuse what is not its own
        assert secret.read_text() == "as it was"
        for each in (half, tmp_path / "out"):
            assert not each.is_symlink()
        subprocess.run(["rm", "-rf", str(half), str(tmp_path / "out")], check=True)

    (tmp_path / "elsewhere").mkdir()
    half.symlink_to(tmp_path / "elsewhere")
    capsys.readouterr()
    assert "is no link" in refused(capsys, "merge", str(recipe))
    assert list((tmp_path / "elsewhere").iterdir()) == [] and secret.read_text() == "as it was"


def test_a_link_in_the_place_of_a_file_that_is_written(tmp_path):
    secret, target = tmp_path / "secret", tmp_path / "s.json"
    secret.write_text("as it was")
    target.symlink_to(secret)
    spec = nlm.PermutationSpec({}, {})
    with pytest.raises(FileExistsError, match="only with force"):
        spec.save(target)
    spec.save(target, force=True)
    assert secret.read_text() == "as it was" and not target.is_symlink()


def test_names_of_tasks_are_no_paths(recipe, tmp_path):
    recipe.write_text(
        "base: base\nexperts: {../../../evil: one, 'a/b': two}\nmethod: task_arithmetic\n"
        "heads: [b]\noutput: {path: out}\n"
    )
    run(["merge", str(recipe), "--quiet"])
    inside = [each for each in tmp_path.rglob("*") if "evil" in each.name]
    assert all(each.is_relative_to(tmp_path / "out") for each in inside)
    assert not any("evil" in each.name for each in tmp_path.parent.glob("*"))


# --- nothing is exhausted -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 62, (1 << 64) - 1, 100_000_001, 1 << 40])
def test_an_absurd_header(recipe, tmp_path, capsys, length):
    file = tmp_path / "two" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(length.to_bytes(8, "little"))
        opened.truncate(1 << 30)  # sparse: it has the bytes that the header would have
    said = refused(capsys, "merge", str(recipe))
    assert f"a header of {length} bytes in a file of" in said


@pytest.mark.parametrize("shape", [[1 << 62, 4], [1 << 40] * 50, [0, 1 << 70], [10**4000]])
def test_an_absurd_shape(recipe, tmp_path, capsys, shape):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    whole = len(text).to_bytes(8, "little") + text + b"12345678"
    (tmp_path / "two" / "model.safetensors").write_bytes(whole)
    assert "must be whole, got" in refused(capsys, "merge", str(recipe))


# --- text stays text ------------------------------------------------------------------------------

NAMES = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\bad{", "a\nb", "%s{0}")


def renamed(tree: Any, names: dict[str, str]) -> Any:
    """A tree with other texts and other keys, where there is another name for one."""
    if isinstance(tree, dict):
        return {names.get(key, key): renamed(each, names) for key, each in tree.items()}
    if isinstance(tree, list):
        return [renamed(each, names) for each in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


@pytest.mark.parametrize("evil", NAMES)
def test_a_report_of_any_names(evil: str) -> None:
    """Tasks, foundations, layers, groups, titles: escaped in the page, and drawn as they are."""
    results = copy.deepcopy(sample(4))
    words = {*results["tasks"], *results["foundations"], *results["layers"]["points"]}
    words |= {*results["layers"]["variance_ratio"], *results["barrier"]["loss"]}
    for part in ("alignment", "landscapes", "projections", "timings", "versions", "run"):
        words |= set(results.get(part, {}))
    names = {word: f"{evil}{number}" for number, word in enumerate(sorted(words))}
    found = renamed(results, names) | {"title": evil, "lead": evil, "notes": [evil]}
    html = render(found)
    assert "<script" not in html and "<img src=x" not in html and "onerror=alert(1)>" not in html


# --- no network -----------------------------------------------------------------------------------

PROGRAM = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
                 "socket.bind", "urllib.Request"):
        sys.stderr.write(f"CALLED HOME: {event} {args}\\n")
        os._exit(77)
sys.addaudithook(watch)
if sys.argv[1:] == ["control"]:
    import socket
    socket.create_connection(("127.0.0.1", 9))
import torch, transformers
import nlm
from nlm.cli.app import run
def made(seed, name):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(name)
    return model
models = [made(seed, f"m{seed}") for seed in range(3)]
tokens = torch.randint(3, 40, (16, 8))
spec = nlm.trace(models[0], tokens)
found = nlm.align(models[0], models[1], spec)
merged = nlm.merge({"a": models[1], "b": models[2]}, base=models[0], method="ties", density=0.5)
data = {task: [tokens] for task in "ab"}
tact = nlm.Tact.fit(models[0], {"a": models[1], "b": models[2]}, data)
tact(tokens, task="a")
from safetensors.torch import save_file
save_file({"input_ids": tokens}, "d.safetensors")
open("r.yaml", "w").write('''
foundations: {one: m0, two: m1}
align: weights
experts: {a: {path: m0, foundation: one}, b: {path: m2, foundation: two}}
method: task_arithmetic
correct: {method: tact, data: {a: d.safetensors, b: d.safetensors}}
output: {path: out}
''')
codes = [run(["check", "r.yaml"]), run(["merge", "r.yaml", "--quiet"]), run(["info"]),
         run(["align", "m0", "m1", "-o", "p.safetensors"]),
         run(["spec", "discover", "m0", "-o", "s.json"]),
         run(["report", "results.json", "-o", "r.html"])]
nlm.load("out")
print(codes)
"""


@pytest.mark.parametrize("control", [False, True])
def test_no_network(tmp_path, control):
    """Tracing, aligning, merging, correcting, loading and the report, of models of transformers,
    under an audit that ends the process at the first name looked up or connection opened."""
    (tmp_path / "results.json").write_text(json.dumps(sample(2)))
    online = {key: v for key, v in os.environ.items() if key not in ("HF_HUB_OFFLINE",)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(["control"] if control else [])], cwd=tmp_path,
        capture_output=True, text=True, env={**online, "NLM_CACHE": str(tmp_path / "c")},
    )  # fmt: skip
    if control:
        assert done.returncode == 77 and "CALLED HOME: socket." in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().endswith("[0, 0, 0, 0, 0, 0]"), done.stdout + done.stderr
