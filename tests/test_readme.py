"""README tells the truth: its table is that of the results, its code runs, CI runs its command."""

import re
import runpy
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def network(classes: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    trunk = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 16), nn.ReLU()
    )
    model = nn.Sequential()
    model.add_module("trunk", trunk)
    model.add_module("head", nn.Linear(16, classes))
    return model.eval()


def test_the_table_is_that_of_the_committed_results():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["filled"](README, script["load"]()) == README
    assert script["FIGURE"].is_file()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    images = torch.randn(64, 1, 16, 16)
    names = {
        "images": images, "digit_images": images[:40], "greek_images": images[20:],
        "model_a": network(30, 0), "model_b": network(30, 1),
        "digits_from_a": network(10, 2), "greek_from_b": network(24, 3),
    }  # fmt: skip
    exec(code, names)
    with torch.no_grad():
        again = names["nlm"].Tact.load("tact.safetensors", names["model"])
        assert torch.equal(again(images, task="digits"), names["tact"](images, task="digits"))
        torch.testing.assert_close(
            names["plain"](names["digit_images"]), names["logits"], rtol=1e-4, atol=1e-4
        )


def test_any_network_is_found_and_keeps_its_function(capsys):
    _, code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    names: dict = {}
    exec(code, names)
    told = capsys.readouterr().out.splitlines()[0]
    assert told == "9 groups, 13 permutations" and f"# {told}" in code
    assert names["spec"].proven
    model, tokens = names["model"].eval(), torch.arange(20).view(2, 10)
    with torch.no_grad():
        before = model(tokens).logits
        weight = model.lm_head.weight.clone()
        model.load_state_dict(names["moved"])
        after = model(tokens).logits
    assert not torch.equal(weight, model.lm_head.weight)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_ci_runs_the_commands_to_the_letter():
    commands = re.findall(r"```sh\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands == [
        'pip install -c constraints.txt -e ".[demo]" && nlm demo',
        'pip install -c constraints.txt -e ".[test,hosts]" && pytest -n auto --dist loadfile',
    ]
    script = (ROOT / ".ci" / "run").read_text()
    assert commands[1] in script
