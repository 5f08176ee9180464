"""docs/recipes.md tells the truth: its table has every key, its examples run."""

import re
from pathlib import Path

import _pretrained as tiny
import torch
from safetensors.torch import save_file

import nlm
from nlm.cli.app import run
from nlm.recipe import read

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def test_the_table_has_every_key():
    found = re.findall(r"^\| `([\w.*]+)` \|", PAGE, flags=re.MULTILINE)
    wanted = {
        *read._KEYS,
        *(f"experts.*.{key}" for key in (*read._EXPERT, *read._KNOWN)),
        *(f"align.{key}" for key in read._ALIGN),
        *(f"correct.{key}" for key in read._CORRECT),
        *(f"output.{key}" for key in read._OUTPUT),
    }
    assert len(found) == len(set(found)) and set(found) == wanted


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    from transformers import GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NLM_CACHE", str(tmp_path / "cache"))
    first = tiny.foundation(tiny.gpt2)
    first.save_pretrained("models/one")
    second = tiny.permuted(tiny.disturbed(first, 1, 0.02), Path("models/one"))
    second.save_pretrained("models/two")
    for task, model in (("digits", first), ("greek", second)):
        tiny.disturbed(model, 2, 0.02).save_pretrained(f"experts/{task}")
    for name in ("models/one", "models/two", "experts/digits", "experts/greek"):
        tiny.write_tokenizer(Path(name))
    Path("text.txt").write_text(" ".join(f"w{2 + n * n % 57}" for n in range(16 * 40)))
    lines = [f'{{"text": "{" ".join(f"w{2 + n * k % 57}" for k in range(9))}"}}' for n in range(40)]
    Path("digits.jsonl").write_text("\n".join(lines))
    save_file({"input_ids": tiny.inputs(first, 40)["input_ids"]}, "greek.safetensors")
    batch = tiny.inputs(first, 8, 5)
    wanted = tiny.outputs(GPT2LMHeadModel.from_pretrained("experts/digits").eval(), batch)
    examples = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    outputs = [re.search(r"path: (\w+)[,}]", text.splitlines()[-1])[1] for text in examples]
    assert outputs == ["merged", "corrected", "rotated"]
    for text in examples:
        Path("recipe.yaml").write_text(text)
        assert run(["check", "recipe.yaml"]) == 0
        assert run(["merge", "recipe.yaml", "--dry-run"]) == 0
        assert "takes about" in capsys.readouterr().out
        assert run(["merge", "recipe.yaml", "--quiet", "--no-sync"]) == 0
    for model in (
        GPT2LMHeadModel.from_pretrained("merged", dtype=torch.float32).eval(),
        nlm.load("corrected", task="digits"),
        nlm.load("rotated", task="digits"),
    ):
        error = float((tiny.outputs(model, batch) - wanted).square().mean().sqrt())
        assert error < 0.4 * float(wanted.std())
    assert Path("corrected/tasks/greek/tokenizer.json").is_file()
    assert not nlm.load("rotated").inner().config.tie_word_embeddings
