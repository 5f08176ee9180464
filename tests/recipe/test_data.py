"""Calibration data: every form of it is read, and every mistake is a sentence."""

import json
from pathlib import Path

import _pretrained as tiny
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nlm.cli.app import run
from nlm.recipe.data import check_data, open_data


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def reader():
    return tiny.gpt2()


def opened(text: str, model, samples=None, folder="."):
    check_data(text, model, folder, "nlm.test")
    return open_data(text, model, folder, "nlm.test", samples)


def test_tensors(reader):
    tokens = torch.arange(40 * 5).reshape(40, 5) % 60
    save_file({"input_ids": tokens}, "named.safetensors")
    save_file({"x": tokens}, "alone.safetensors")
    np.savez("arrays.npz", input_ids=tokens.numpy())
    for name in ("named.safetensors", "alone.safetensors", "arrays.npz"):
        for samples, wanted in ((None, 40), (33, 33)):
            batches = opened(name, reader, samples)
            assert torch.equal(torch.cat([b["input_ids"] for b in batches]), tokens[:wanted])
    images = torch.randn(3, 3, 16, 16)
    save_file({"images": images}, "images.safetensors")
    [batch] = opened("images.safetensors", tiny.vit())
    assert torch.equal(batch["pixel_values"], images)


def test_texts(reader, folder):
    tiny.write_tokenizer(folder)
    Path("long.txt").write_text(" ".join(f"w{2 + n % 58}" for n in range(16 * 20 + 3)))
    batches = opened("long.txt", reader)
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    assert tokens.shape == (20, 16) and tokens[0, :3].tolist() == [2, 3, 4]
    assert sum(len(batch["input_ids"]) for batch in opened("long.txt", reader, 3)) == 3
    lines = ['{"text": "w5 w6 w7"}', "", '"w8"', json.dumps({"text": " ".join(["w9"] * 30)})]
    Path("lines.jsonl").write_text("\n".join(lines))
    [batch] = opened("lines.jsonl", reader)
    assert batch["input_ids"].shape == (3, 16)  # cut to the positions that there are
    assert batch["input_ids"][1].tolist() == [8] + [0] * 15
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 16]
    [batch] = opened("lines.jsonl", reader, 2)
    assert len(batch["input_ids"]) == 2
    [batch] = opened("lines.jsonl", tiny.t5(), 1)
    assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])
    assert tiny.roberta()(**opened("long.txt", tiny.roberta())[0]).logits.isfinite().all()


FUNCTIONS = """
def batches():
    import torch
    return [{"input_ids": torch.zeros(4, 5, dtype=torch.int64)}] * 3

def once():
    return iter(batches())

def nothing():
    return []

number = 3
"""


def test_functions(reader, folder, monkeypatch):
    (folder / "calibration.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("batches", "once"):
        found = opened(f"calibration:{name}", reader, 6)
        assert [len(batch["input_ids"]) for batch in found] == [4, 2]
    for name, why in (
        ("gone", "the data package.module:function exists, got 'calibration:gone'"),
        ("number", "package.module:function is called, got 'calibration:number', a int"),
    ):
        with pytest.raises(ValueError, match=why):
            check_data(f"calibration:{name}", reader, ".", "nlm.test")
    with pytest.raises(ValueError, match="data holds at least one sample"):
        opened("calibration:nothing", reader)


def test_mistakes(reader, folder):
    ids = torch.zeros(4, 5, dtype=torch.int64)
    save_file({"input_ids": ids, "attention_mask": ids[:3].clone()}, "uneven.safetensors")
    save_file({"attention_mask": ids}, "missing.safetensors")
    save_file({"pixels": torch.zeros(2, 3, 16, 16), "other": torch.zeros(2)}, "strange.safetensors")
    save_file({"input_ids": ids, "inputids": ids.clone()}, "misspelt.safetensors")
    save_file({"input_ids": ids[0].clone()}, "flat.safetensors")
    save_file({"input_ids": torch.zeros(2, 17, dtype=torch.int64)}, "long.safetensors")
    Path("torn.safetensors").write_bytes(b"12345678")
    Path("torn.npz").write_bytes(b"PK12345678")
    np.savez("objects.npz", input_ids=np.array([{}], dtype=object))
    Path("text.txt").write_text("w2 w3")
    image = tiny.vit()
    for model, name, why in (
        (reader, "gone.txt", "data is a file or package.module:function, got 'gone.txt'"),
        (reader, "uneven.safetensors", "one entry per sample in every tensor, got lengths"),
        (reader, "missing.safetensors", "got 'attention_mask' for GPT2LMHeadModel"),
        (
            image,
            "strange.safetensors",
            "those of the model, pixel_values, .* got 'other', 'pixels'",
        ),
        (reader, "misspelt.safetensors", "got 'input_ids', 'inputids' for GPT2LMHeadModel"),
        (reader, "flat.safetensors", r"of at most 16 positions, got \[5\] for 'input_ids'"),
        (reader, "long.safetensors", r"of at most 16 positions, got \[2, 17\] for 'input_ids'"),
        (reader, "torn.safetensors", "file must be (a )?whole"),
        (reader, "torn.npz", "whole .npz archive of arrays, got 'torn.npz'"),
        (reader, "objects.npz", "whole .npz archive of arrays, got 'objects.npz'"),
        (image, "text.txt", "a text is data of a model that reads tokens, got ViTForImageClass"),
        (reader, "text.txt", "a text needs the tokenizer in the model's folder, got none in '.'"),
    ):
        for action in (check_data, open_data):
            with pytest.raises((ValueError, OSError), match=why):
                action(name, model, ".", "nlm.test")
    tiny.write_tokenizer(folder)
    Path("empty.jsonl").write_text("\n")
    Path("wrong.jsonl").write_text('{"txt": "w2"}\n')
    save_file({"input_ids": ids + 60}, "words.safetensors")
    save_file({"input_ids": ids.float()}, "floats.safetensors")
    Path("latin.txt").write_bytes("é".encode("latin-1") * 40)
    for name, why in (
        ("text.txt", "a text has at least 16 tokens, got 2"),
        ("empty.jsonl", "a .jsonl file has at least one line"),
        ("wrong.jsonl", "has the key 'text', got .* in line 1 of 'wrong.jsonl'"),
        ("floats.safetensors", "tokens are integers, got torch.float32 for 'input_ids'"),
        ("latin.txt", "a text is UTF-8, got 'latin.txt'"),
        ("words.safetensors", "the model's vocabulary, 0 to 59, got 60 to 60 for 'input_ids'"),
    ):
        with pytest.raises(ValueError, match=why):
            open_data(name, reader, ".", "nlm.test")


def test_check_names_the_lines(reader, folder, capsys):
    for name in ("first", "second", "a", "b"):
        reader.save_pretrained(name)
    tiny.vit().save_pretrained("b")
    ids = torch.zeros(4, 5, dtype=torch.int64)
    save_file({"input_id": ids, "mask": ids.clone()}, "data.safetensors")
    Path("text.txt").write_text("w2 w3")
    Path("recipe.yaml").write_text("""foundations: {first: first, second: second}
experts:
  a: {path: a, foundation: first}
  b: {path: b, foundation: second}
align: {method: activations, data: data.safetensors}
method: linear
correct:
  method: tact
  data:
    a: text.txt
    b: gone.npz
output: {path: out, per_task: folded}
""")
    assert run(["check", "recipe.yaml"]) == 1
    found = capsys.readouterr().err
    for line, why in (
        (4, "the models have the same entries"),
        (4, "the models are of one architecture, got model_type 'vit' in expert 'b'"),
        (5, "a file of inputs has those of the model, input_ids"),
        (10, "a text needs the tokenizer in the model's folder, got none in 'a' for 'text.txt'"),
        (11, "data is a file or package.module:function, got 'gone.npz'"),
        (4, "the experts of a correction are of one class, got ViTForImageClassification for 'b'"),
    ):
        assert f"recipe.yaml:{line}: {why}" in found, found
    assert not Path("out").exists() and not list(Path().glob(".out*"))
