"""What activations are said to take is what lives in a pass of the same model with weights."""

from pathlib import Path

import _pretrained as tiny
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nlm.recipe import read_recipe
from nlm.recipe.activations import Living, pass_bytes
from nlm.recipe.forecast import forecast

FAMILIES = ("bert", "roberta", "gpt2", "llama", "mistral", "qwen2", "vit", "clip", "t5")


def of_real(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    with torch.no_grad(), Living(known) as living:
        model(**inputs)
    return living.most


class Two(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10, device=device), nn.Linear(10, 3, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def test_a_network_counted_by_hand() -> None:
    """What the first layer gives and what is left of it live together, 4 x 10 float32 each."""
    assert pass_bytes(Two("meta"), {"x": ((4, 6), torch.float32)}) == 320
    assert of_real(Two("cpu"), {"x": torch.randn(4, 6)}) == 320


@pytest.mark.parametrize("name", FAMILIES)
def test_families_without_weights_take_what_they_take_with_them(name: str) -> None:
    model = tiny.foundation(getattr(tiny, name))
    model.config.use_cache = False
    inputs = tiny.inputs(model, 8)
    shapes = {key: (tuple(each.shape), each.dtype) for key, each in inputs.items()}
    expected = of_real(model, inputs)
    assert pass_bytes(model.to("meta"), shapes) == expected > 10_000


def test_the_forecast_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all samples in a correction, of a batch of 16 otherwise; unknown of a function's."""
    monkeypatch.chdir(tmp_path)
    model = tiny.foundation(tiny.vit)
    inputs = tiny.inputs(model, 40)
    for task in ("a", "b"):
        tiny.disturbed(model, ord(task), 0.05).save_pretrained(task)
        save_file(inputs, f"{task}.safetensors")
    Path("batches.py").write_text("def a():\n    return []\n")
    correct = "correct: {method: tact, data: {a: a.safetensors, b: b.safetensors}}\n"
    grams = "method: regmean\nexperts:\n" + "".join(
        f"  {task}: {{path: {task}, data: {task}.safetensors}}\n" for task in ("a", "b")
    )
    plain = "experts: {a: a, b: b}\nmethod: linear\n"
    for text, samples in (
        (plain + correct, 40), (plain + correct.replace("tact,", "tact, samples: 24,"), 24),
        (grams, 16), (plain, None), (plain + correct.replace("a.safet", "batches:a #"), None),
    ):  # fmt: skip
        Path("r.yaml").write_text(text.replace("a #ensors", "a"))
        told = forecast(read_recipe("r.yaml"))
        some = None if samples is None else {n: each[:samples] for n, each in inputs.items()}
        assert told.activations == (None if some is None else of_real(model, some)), text
        known = dict(told.rows()).get("activations of a pass, beside that")
        assert (known is None) == (text == plain) and (known == "not known") == ("batches" in text)
