"""The algorithms for FusionBench beside the host's own, in its pools and on its command line."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fusion_bench", reason="a host, of the extra [hosts]")

import yaml
from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict
from fusion_bench.method import (
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
)
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.modelpool import CLIPVisionModelPool
from integrations._llamas import llama
from integrations._pools import Images, Samples, foundation, moved, tuned, write
from omegaconf import OmegaConf
from safetensors.torch import save_file
from symmetry.mixtures import Mixture, softmax
from symmetry.test_stacks import written
from transformers import CLIPVisionConfig, CLIPVisionModel

import nlm
from nlm.integrations import fusion_bench as on_nlm
from nlm.integrations.fusion_bench.pools import aligned_state
from nlm.symmetry import pretrained

pytestmark = pytest.mark.host
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def spec() -> nlm.PermutationSpec:
    return nlm.trace(foundation(0), torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))


def plain(*seeds: int, exact: bool = False) -> dict[str, nn.Module]:
    """A pool without running statistics; on a grid there are votes of 0 and many thresholds."""
    torch.manual_seed(seeds[0])
    base = nn.Sequential(nn.Linear(7, 30), nn.ReLU(), nn.Linear(30, 5))
    models = {"_pretrained_": base} | {f"m{k}": tuned(base, k) for k in seeds[1:]}
    if exact:
        for model in models.values():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_((parameter * 32).round() / 32)
    return models


def copies(models: dict[str, nn.Module]) -> BaseModelPool:
    return BaseModelPool(copy.deepcopy(models))


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- merges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
def test_ties_has_the_hosts_bits(merge_func: str) -> None:
    """With many votes of 0, for which the majority of all signs is +, and -."""
    majorities = set()
    for seeds in ((0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 1, 2), (4, 5, 6, 7), (5, 6, 7, 8)):
        for exact in (False, True):
            models = plain(*seeds, exact=exact)
            for threshold, scale in ((20, 0.3), (0.55, 1.0), (90, 1.7)):
                settings = {"scaling_factor": scale, "threshold": threshold, "remove_keys": []}
                settings |= {"merge_func": merge_func}
                pool = copies(models)
                found = on_nlm.NlmTies(**settings).run(pool)
                for name, model in models.items():
                    assert equal(pool.load_model(name).state_dict(), model.state_dict())
                stock = TiesMergingAlgorithm(**settings).run(copies(models))
                for name, expected in stock.state_dict().items():
                    torch.testing.assert_close(
                        found.state_dict()[name], expected, rtol=3e-7, atol=3e-8
                    )
                if len(seeds) < 4:
                    assert equal(found.state_dict(), stock.state_dict())
                base, *others = (
                    torch.cat([p.flatten() for p in m.parameters()]) for m in models.values()
                )
                majorities.add(bool(sum(x - base for x in others).sign().sum() < 0))
    assert majorities == {True, False}


def test_ties_of_a_network_with_statistics_and_tied_entries() -> None:
    base = foundation(0)
    models = {"_pretrained_": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    models["b"][1].running_mean += 1
    found = on_nlm.NlmTies(remove_keys=["5.bias"]).run(models).state_dict()
    torch.testing.assert_close(found["1.running_mean"], base[1].running_mean + 0.5)
    assert torch.equal(found["5.bias"], base[5].bias)
    assert torch.equal(found["1.num_batches_tracked"], base[1].num_batches_tracked)
    assert not torch.equal(found["5.weight"], base[5].weight)


def test_tall_masks_are_those_of_the_definition() -> None:
    models = plain(0, 1, 2, 3)
    found = on_nlm.NlmTallMask(tall_mask_lambda=0.5).run(copies(models))
    assert found["metadata"] is None and list(found["models"]) == ["m1", "m2", "m3"]
    base, *others = (torch.cat([p.flatten() for p in m.parameters()]) for m in models.values())
    tuned_models = torch.stack(others)
    masks = generate_task_masks(tuned_models - base, tuned_models, base, tall_mask_lambda=0.5)
    merged = base + (tuned_models - base).sum(0)
    for mask, model in zip(masks, found["models"].values(), strict=True):
        vector = torch.cat([p.flatten() for p in model.parameters()])
        torch.testing.assert_close(vector, torch.where(mask, merged, base), rtol=1e-6, atol=1e-6)


def test_weights_that_are_read_lazily(tmp_path: Path) -> None:
    """The same as loaded ones; a tied head is in no file, and rotary frequencies neither."""
    base = llama(0, scale=0.2)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    module = type(base)
    models = {"_pretrained_": base, "a": llama(1, base, 0.05), "b": llama(2, base, 0.05)}
    spec = pretrained.trace_config(base.config, type(base), cache=False)
    permutation = spec.random(1)
    there = copy.deepcopy(models["b"])
    there.load_state_dict(spec.apply(permutation, there.state_dict()))
    for name, model in (models | {"moved": there}).items():
        model.save_pretrained(tmp_path / name)
    spec.save(tmp_path / "spec.json")

    def lazy(*names: str) -> BaseModelPool:
        target = {
            "_target_": "fusion_bench.LazyStateDict",
            "meta_module_class": "transformers.LlamaForCausalLM",
        }
        return BaseModelPool({n: target | {"checkpoint": str(tmp_path / n)} for n in names})

    settings = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    stock = TiesMergingAlgorithm(**settings).run(lazy(*models))
    found = on_nlm.NlmTies().run(lazy(*models))
    in_files = lazy("a").load_model("a").keys()  # the host leaves the tied head as memory was
    for name in in_files:
        assert torch.equal(found.state_dict()[name], stock.state_dict()[name]), name
    base.load_state_dict(found.state_dict())
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(found(ids).logits, base(ids).logits)
    pool = lazy("_pretrained_", "a", "moved")
    aligned = on_nlm.NlmRebasin(on_nlm.NlmTies(), spec=str(tmp_path / "spec.json")).run(pool)
    assert equal(aligned.state_dict(), found.state_dict())
    masked = on_nlm.NlmTallMask().run(lazy(*models))["models"]["b"]
    loaded = {n: module.from_pretrained(tmp_path / n) for n in models}
    unmasked = on_nlm.NlmTallMask().run(loaded)["models"]["b"]
    assert equal(masked.state_dict(), unmasked.state_dict())
    bare = {"_target_": "fusion_bench.LazyStateDict", "checkpoint": str(tmp_path / "a")}
    with pytest.raises(ValueError, match=r"name the class of their model .* got none for .*a'"):
        on_nlm.NlmTies().run(BaseModelPool({"_pretrained_": bare, "a": bare}))


def test_pickled_and_stacked_weights_are_permuted_too(tmp_path: Path) -> None:
    """Entries that a file lacks are left out; experts in a list are exchanged."""
    spec, state = written(), Mixture(softmax).state_dict()
    permutation = spec.random(1)
    expected = spec.apply(permutation, state)
    del state["leave.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    save_file(state, tmp_path / "model.safetensors")
    for file in ("pytorch_model.bin", "model.safetensors"):
        lazy = LazyStateDict(str(tmp_path / file))
        found = aligned_state(lazy, spec, permutation)
        assert equal(dict(found.items()), {n: x for n, x in expected.items() if n in state})
        assert all(torch.equal(lazy[name], tensor) for name, tensor in state.items())


# --- alignment and correction -------------------------------------------------------------------


def pool_with_data(models: dict[str, nn.Module], *names: str) -> BaseModelPool:
    data = {
        name: {"_target_": "integrations._pools.Samples", "seed": seed}
        for seed, name in enumerate(names)
    }
    return BaseModelPool(models, train_datasets=OmegaConf.create(data))


@pytest.mark.parametrize("name", ["NlmRebasin", "NlmActivationMatching"])
def test_models_in_another_order_are_merged_as_if_they_were_not(
    spec: nlm.PermutationSpec, name: str
) -> None:
    base = foundation(0)
    models = {"a": base, "b": tuned(base, 1), "c": tuned(base, 2)}
    there = models | {"b": moved(models["b"], spec, spec.random(3))}
    expected = SimpleAverageAlgorithm().run(copies(models)).state_dict()
    pool = pool_with_data(there, "a", "b")
    inner = {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}
    found = getattr(on_nlm, name)(OmegaConf.create(inner)).run(pool).state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    assert there["a"] is pool.load_model("a") and equal(base.state_dict(), there["a"].state_dict())


def test_any_model_may_be_the_reference(spec: nlm.PermutationSpec) -> None:
    """All others follow it, the one that task vectors start from too."""
    base = foundation(0)
    models = {"_pretrained_": base, "a": tuned(base, 1), "b": tuned(base, 2)}
    permutation = spec.random(3)
    there = models | {"b": moved(models["b"], spec, permutation)}
    found = on_nlm.NlmRebasin(on_nlm.NlmTies(), reference="b").run(pool_with_data(there, "a"))
    expected = spec.apply(permutation, on_nlm.NlmTies().run(models).state_dict())
    assert equal(found.state_dict(), expected)


def test_experts_of_another_foundation_follow_it(spec: nlm.PermutationSpec) -> None:
    one = foundation(0)
    two = tuned(one, 9, 0.02)
    experts = {"a": tuned(one, 1), "b": tuned(two, 2)}
    permutation = spec.random(3)
    there = {
        "_pretrained_": one, "_two_": moved(two, spec, permutation), "a": experts["a"],
        "b": moved(experts["b"], spec, permutation),
    }  # fmt: skip
    foundations = {"a": "_pretrained_", "b": "_two_"}
    mean = copy.deepcopy(one)
    mean.load_state_dict(
        {
            k: (x + y) / 2 if x.is_floating_point() else x
            for (k, x), y in zip(one.state_dict().items(), two.state_dict().values(), strict=True)
        }
    )
    for base, start in (("mean", mean), ("reference", one)):
        method = on_nlm.NlmRebasin(on_nlm.NlmTies(), foundations=foundations, base=base)
        found = method.run(pool_with_data(there, "a")).state_dict()
        expected = on_nlm.NlmTies().run({"_pretrained_": start, **experts}).state_dict()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor)
    aligned = method.aligned(pool_with_data(there, "a"))
    assert aligned.model_names == ["a", "b"] and aligned.has_pretrained


def test_tact_gives_each_task_the_activations_of_its_expert(spec: nlm.PermutationSpec) -> None:
    base = foundation(0)
    models = {"_pretrained_": base, "a": tuned(base, 1, 0.4), "b": tuned(base, 2, 0.4)}
    there = models | {"b": moved(models["b"], spec, spec.random(3))}
    inner = on_nlm.NlmTact(SimpleAverageAlgorithm(), max_samples=256)
    pool = pool_with_data(there, "a", "b")
    path = {"reference": "a", "spec": None, "matching": "weights"}
    aligned = on_nlm.NlmRebasin(inner, **path)
    found = aligned.run(pool)["models"]
    merged = SimpleAverageAlgorithm().run(aligned.aligned(pool)).eval()
    for seed, (name, model) in enumerate(found.items()):
        x, expert = Samples(seed).inputs, aligned.aligned(pool).load_model(name).eval()
        wanted, ours, stock = (each[:4](x).std(0) for each in (expert, model, merged))
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
        assert (stock - wanted).norm() > 0.1 * wanted.norm()


def test_a_pool_of_the_hosts_vision_transformers(tmp_path: Path) -> None:
    """By weights and by activations; TACT's models are of the pool's class."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, architectures=["CLIPVisionModel"],
    )  # fmt: skip
    base = CLIPVisionModel(config).eval()
    base = tuned(base, 0, 0.1)
    models = {"_pretrained_": base, "a": tuned(base, 1, 0.02), "b": tuned(base, 2, 0.02)}
    spec = pretrained.trace_config(config, cache=False)
    there = models | {"moved": moved(models["b"], spec, spec.random(3))}
    for name, model in there.items():
        model.save_pretrained(tmp_path / name)
    data = {n: {"_target_": "integrations._pools.Images", "seed": k} for k, n in enumerate("ab")}

    def pool(second: str) -> CLIPVisionModelPool:
        names = {"_pretrained_": "_pretrained_", "a": "a", "b": second}
        paths = {name: str(tmp_path / folder) for name, folder in names.items()}
        return CLIPVisionModelPool(paths, train_datasets=OmegaConf.create(data))

    expected = on_nlm.NlmTies().run(pool("b")).state_dict()
    for kind in (on_nlm.NlmRebasin, on_nlm.NlmActivationMatching):
        found = kind(on_nlm.NlmTies()).run(pool("moved")).state_dict()
        assert equal(found, expected)
    inner = on_nlm.NlmTact(TaskArithmeticAlgorithm(scaling_factor=0.5), max_samples=64)
    corrected = on_nlm.NlmRebasin(inner).run(pool("moved"))["models"]
    assert {name: type(model) for name, model in corrected.items()} == dict.fromkeys(
        "ab", CLIPVisionModel
    )
    merged = TaskArithmeticAlgorithm(scaling_factor=0.5).run(pool("b"))
    for seed, (name, model) in enumerate(corrected.items()):
        x = Images(seed).inputs
        expert, ours, plain_ = (
            each(x).pooler_output for each in (models[name], model, merged.eval())
        )
        assert (ours - expert).norm() < 0.9 * (plain_ - expert).norm()


def test_what_does_not_fit_is_said() -> None:
    base = foundation(0)
    pool, rule = {"a": base, "b": tuned(base, 1)}, r"nlm\.integrations\.fusion_bench: "
    inner = on_nlm.NlmTies()
    for run, sentence in {
        lambda: inner.run(pool): "task vectors start from a model '_pretrained_' .* got a, b",
        lambda: on_nlm.NlmTies(merge_func="all").run(pool): "merge_func is one of .* got 'all'",
        lambda: on_nlm.NlmTies(threshold=120).run(pool): "the threshold is 0 to 100 .* got 120",
        lambda: on_nlm.NlmTies(1e39).run(
            {"_pretrained_": base, **pool}
        ): "are finite, got .* at sc",
        lambda: on_nlm.NlmRebasin().run(pool): "there is an inner algorithm, got inner=None",
        lambda: on_nlm.NlmRebasin(inner).run(pool): "the pool needs train_datasets, or spec",
        lambda: on_nlm.NlmActivationMatching(inner).run(pool): "train_datasets: none.* for 'any'",
        lambda: on_nlm.NlmRebasin(inner, reference="c").run(pool): r"\(a, b\), got 'c'",
        lambda: on_nlm.NlmRebasin(inner, base="b").run(pool): "base is one of mean, reference",
        lambda: on_nlm.NlmRebasin(inner, foundations={"a": "b", "c": "b"}).run(pool): "got 'c'",
        lambda: on_nlm.NlmTact(inner).run(pool): "train_datasets: none.* got none for 'a'",
    }.items():
        with pytest.raises(ValueError, match=rule + ".*" + sentence):
            run()


# --- as algorithms of the host ------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((on_nlm.CONFIG_DIR / "method" / "nlm").glob("*.yaml")))
def test_configurations_name_all_parameters_with_their_defaults(file: Path, tmp_path: Path) -> None:
    shipped = yaml.safe_load(file.read_text())
    shipped.pop("defaults", None)
    name = shipped.pop("_target_").removeprefix("nlm.integrations.fusion_bench.")
    algorithm: BaseAlgorithm = getattr(on_nlm, name)()
    own = OmegaConf.to_container(algorithm.config)
    assert own.pop("_target_").startswith("nlm.integrations.fusion_bench.")
    extra = {"inner", "_recursive_", "_usage_", "_version_"}
    given = {key: value or None for key, value in shipped.items()}
    assert {k: v or None for k, v in own.items() if k not in extra} == given
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = BaseAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert type(again) is type(algorithm) and again.config == algorithm.config


@pytest.mark.parametrize(
    "program", ["fusion_bench.scripts.cli", "nlm.integrations.fusion_bench.command"]
)
def test_the_hosts_command_line(spec: nlm.PermutationSpec, tmp_path: Path, program: str) -> None:
    """The host's, and nlm's, which knows the folder. Offline, with the configurations that come
    with nlm and one of the user's on top: TIES of experts of two foundations, of which one stands
    in another order.
    """
    base = foundation(0)
    models = {"_pretrained_": base, "a": tuned(base, 1), "b": tuned(base, 2), "_two_": base}
    for name, model in models.items():
        order = spec.random(3) if name in ("b", "_two_") else {}
        write(moved(model, spec, order), tmp_path / f"{name}.safetensors")
    pool = {
        "_target_": "fusion_bench.modelpool.BaseModelPool", "_recursive_": False,
        "models": {
            n: {"_target_": "integrations._pools.read", "file": f"{tmp_path}/{n}.safetensors"}
            for n in models
        },
        "train_datasets": {"a": {"_target_": "integrations._pools.Samples"}},
    }  # fmt: skip
    shown = subprocess.run(
        [sys.executable, "-m", "nlm.integrations.fusion_bench"], text=True, capture_output=True
    )
    folder = Path(shown.stdout.strip())
    assert folder == on_nlm.CONFIG_DIR
    mine = {"defaults": ["nlm/rebasin@_here_"], "foundations": {"a": "_pretrained_", "b": "_two_"}}
    for place, content in {"modelpool/toy.yaml": pool, "method/mine.yaml": mine}.items():
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text(yaml.safe_dump(content))
    tests = Path(__file__).parents[1]
    paths = [str(tests), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    arguments = [
        "method=mine", "method@method.inner=nlm/ties", "method.inner.threshold=35",
        "modelpool=toy", f"hydra.searchpath=[file://{tmp_path}]", "fabric.loggers=null",
        "print_config=false", f"merged_model_save_path={tmp_path / 'merged.pt'}",
    ]  # fmt: skip
    known = [] if program.startswith("nlm") else ["--config-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", program, *known, *arguments],
        cwd=tmp_path, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = torch.load(tmp_path / "merged.pt", weights_only=True)
    expected = on_nlm.NlmTies(threshold=35).run({n: m for n, m in models.items() if n != "_two_"})
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
