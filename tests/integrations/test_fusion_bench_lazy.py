"""All algorithms for FusionBench on pools that are read lazily, beside the same pools in memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("fusion_bench", reason="a host, of the extra [hosts]")

from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from integrations._llamas import llama
from omegaconf import OmegaConf

from nlm.integrations import fusion_bench as on_nlm
from nlm.symmetry import pretrained

pytestmark = pytest.mark.host

TASKS = ("a", "b")
DATA = OmegaConf.create(
    {task: {"_target_": "integrations._pools.Texts", "seed": n} for n, task in enumerate(TASKS)}
)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A foundation with two experts, of which b stands in another order of units."""
    base = llama(0, scale=0.2)
    found = {"_pretrained_": base, "a": llama(1, base, 0.05), "b": llama(2, base, 0.05)}
    spec = pretrained.trace_config(base.config, type(base), cache=False)
    state = found["b"].state_dict()
    found["b"].load_state_dict(spec.apply(spec.random(1), state))
    return {name: model.eval() for name, model in found.items()}


@pytest.fixture(scope="module")
def folder(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(made / name)
    return made


def lazy(folder: Path) -> BaseModelPool:
    target = {
        "_target_": "fusion_bench.LazyStateDict",
        "meta_module_class": "transformers.LlamaForCausalLM",
    }
    names = ("_pretrained_", *TASKS)
    return BaseModelPool(
        {n: target | {"checkpoint": str(folder / n)} for n in names}, train_datasets=DATA
    )


def algorithms() -> dict[str, BaseAlgorithm]:
    inner, few = TaskArithmeticAlgorithm(scaling_factor=0.4), {"num_batches": 1, "batch_size": 16}
    return {
        "ties": on_nlm.NlmTies(),
        "tall_mask": on_nlm.NlmTallMask(),
        "rebasin": on_nlm.NlmRebasin(inner, **few),
        "rebasin of a mean": on_nlm.NlmRebasin(SimpleAverageAlgorithm(), **few),
        "activation_matching": on_nlm.NlmActivationMatching(inner, **few),
        "tact": on_nlm.NlmRebasin(on_nlm.NlmTact(inner, max_samples=16), **few),
    }


@pytest.mark.parametrize("name", algorithms())
def test_a_pool_that_is_read_lazily_gives_what_one_in_memory_does(
    models: dict[str, nn.Module], folder: Path, name: str
) -> None:
    algorithm = algorithms()[name]
    in_memory = algorithm.run(BaseModelPool(copy.deepcopy(models), train_datasets=DATA))
    found = algorithm.run(lazy(folder))
    if isinstance(found, dict):
        assert list(found["models"]) == list(TASKS)
        pairs = [(model, in_memory["models"][task]) for task, model in found["models"].items()]
    else:
        pairs = [(found, in_memory)]
    for one, other in pairs:
        assert isinstance(one, nn.Module)
        state, expected = one.state_dict(), other.state_dict()
        assert state.keys() == expected.keys()
        for entry, tensor in expected.items():
            torch.testing.assert_close(state[entry], tensor, rtol=1e-4, atol=1e-5)


def test_alignment_brings_the_lazy_expert_back(models: dict[str, nn.Module], folder: Path) -> None:
    """The mean of the aligned pool is that of models that were never in another order."""
    base = models["_pretrained_"]
    plain = {"_pretrained_": base, "a": models["a"], "b": llama(2, base, 0.05)}
    expected = TaskArithmeticAlgorithm(scaling_factor=0.4).run(BaseModelPool(copy.deepcopy(plain)))
    for kind in (on_nlm.NlmRebasin, on_nlm.NlmActivationMatching):
        found = kind(TaskArithmeticAlgorithm(scaling_factor=0.4)).run(lazy(folder)).state_dict()
        for entry, tensor in expected.state_dict().items():
            torch.testing.assert_close(found[entry], tensor, rtol=1e-5, atol=1e-6)
