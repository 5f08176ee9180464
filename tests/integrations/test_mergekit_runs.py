"""Whole merges of models on disk: run_merge, the command line, aligned models, other hosts."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from symmetry.mixtures import Mixture, softmax
from symmetry.test_stacks import written
from torch import Tensor

pytest.importorskip("mergekit", reason="a host, of the extra [hosts]")

import yaml
from click.testing import CliRunner
from integrations._llamas import LAYERS, llama, save
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods import get
from mergekit.options import MergeOptions

import nlm
from nlm.align import AlignmentReport, AlignmentResult
from nlm.align.orthogonal import OrthogonalAlignment
from nlm.gauge import Gauge
from nlm.integrations import mergekit as on_nlm
from nlm.integrations.mergekit.command import command
from nlm.integrations.mergekit.loaders import AlignedLoader
from nlm.symmetry import pretrained

pytestmark = pytest.mark.host

Files = dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """A foundation with experts a and b; "moved" is b with its units in another order, and there is
    an alignment that brings it back.
    """
    on_nlm.register()
    folder = tmp_path_factory.mktemp("models")
    base, other = llama(0), llama(2, llama(0), 0.01)
    found = {"base": save(base, folder / "base"), "a": save(llama(1, base, 0.01), folder / "a")}
    found |= {"b": save(other, folder / "b"), "spec": folder / "spec.json"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLM_CACHE", str(folder / "cache"))
        spec = pretrained.trace_config(str(found["base"]))
        spec.save(found["spec"])
        planted = spec.random(5)
        other.load_state_dict(spec.apply(planted, other.state_dict()))
        found |= {"moved": save(other, folder / "moved"), "alignment": folder / "back.safetensors"}
        report = AlignmentReport("weights", [1.0], {}, 0.0)
        AlignmentResult(spec.inverse(planted), report).save(found["alignment"])
        yield found


def merged(files: Files, out: Path, configuration: dict, **options) -> dict[str, Tensor]:
    config = MergeConfiguration.model_validate(_with_paths(configuration, files))
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False, **options))
    return load_file(out / "model.safetensors")


def _with_paths(value, files: Files):
    if isinstance(value, dict):
        return {key: _with_paths(each, files) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_paths(each, files) for each in value]
    return str(files[value]) if isinstance(value, str) and value in files else value


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def ties(second: str, method: str = "ties") -> dict:
    """Two slices, a gradient and a filter."""
    density = [{"filter": "mlp", "value": [0.2, 0.7]}, {"value": 0.5}]
    sources = [("a", {"weight": 0.6, "density": density}), (second, {"weight": [0.3, 0.9]})]
    slices = [
        {
            "sources": [
                {"model": model, "layer_range": [layer, layer + 1], "parameters": parameters}
                for model, parameters in [("base", {"weight": 0.0}), *sources]
            ]
        }
        for layer in range(LAYERS)
    ]
    return {"merge_method": method, "base_model": "base", "slices": slices, "dtype": "float32"}


def models(method: str, *names: str, **more) -> dict:
    return {"merge_method": method, "models": [{"model": name} for name in names], **more}


def test_slices_gradients_and_filters_are_the_hosts(files: Files, tmp_path: Path) -> None:
    host = merged(files, tmp_path / "host", ties("b"))
    found = merged(files, tmp_path / "nlm", ties("b", "nlm_ties"))
    assert equal(found, host)
    with on_nlm.use_as_default():
        assert equal(merged(files, tmp_path / "default", ties("b")), host)
    card = (tmp_path / "nlm" / "README.md").read_text()
    assert "[TIES](https://arxiv.org/abs/2306.01708)" in card


def test_a_seed_makes_a_random_merge_again(files: Files, tmp_path: Path) -> None:
    config = models(
        "dare_ties", "a", "b", base_model="base", parameters={"weight": 0.5, "density": 0.5}
    )
    with on_nlm.use_as_default():
        one, two, other = (
            merged(files, tmp_path / f"{n}", config, random_seed=seed)
            for n, seed in enumerate((7, 7, 8))
        )
    assert equal(one, two) and not equal(one, other)


ALIGNED: dict[str, Callable[[str], dict]] = {
    "ties of slices": ties,
    "slerp": lambda b: models("slerp", "a", b, base_model="a", parameters={"t": [0.2, 0.8]}),
    "a tokenizer": lambda b: models(
        "linear", "a", b, parameters={"weight": 0.5}, tokenizer={"source": "union"}
    ),
    "stock": lambda b: models("model_stock", "a", b, base_model="base"),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_any_method_takes_an_aligned_model(files: Files, tmp_path: Path, name: str) -> None:
    """The same bits as with the model whose units were never in another order."""
    plain = merged(files, tmp_path / "plain", ALIGNED[name]("b"))
    moved = merged(files, tmp_path / "moved", ALIGNED[name]("moved"))
    with on_nlm.aligned_loaders({str(files["moved"]): files["alignment"]}, files["spec"]):
        aligned = merged(files, tmp_path / "aligned", ALIGNED[name]("moved"))
    assert equal(aligned, plain) and not equal(moved, plain)
    reference = ModelReference.model_validate(str(files["moved"]))
    assert not isinstance(LoaderCache().get(reference), AlignedLoader)


def test_threads_read_aligned_models_of_their_own(files: Files, tmp_path: Path) -> None:
    """Contexts of several threads that end in another order than they began; one order a model."""
    spec, found = files["spec"], AlignmentResult.load(files["alignment"])
    moved, plain = ModelReference.model_validate(str(files["moved"])), files["b"]
    stock, before = LoaderCache.get, LoaderCache().get(moved)
    one = on_nlm.aligned_loaders({str(files["moved"]): found}, spec)
    two = on_nlm.aligned_loaders({str(files["moved"]): files["alignment"]}, spec)
    one.__enter__()
    two.__enter__()
    with pytest.raises(ValueError, match=r"one order of units at a time, got .* of '.*moved'"):
        with on_nlm.aligned_loaders({str(files["moved"]): {}}, spec):
            pass
    read: list[Tensor] = []
    name = "model.layers.0.mlp.up_proj.weight"
    thread = threading.Thread(target=lambda: read.append(LoaderCache().get(moved).get_tensor(name)))
    thread.start()
    thread.join()
    one.__exit__(None, None, None)
    read.append(LoaderCache().get(moved).get_tensor(name))
    two.__exit__(None, None, None)
    expected = load_file(plain / "model.safetensors")[name]
    assert all(torch.equal(each, expected) for each in read) and len(read) == 2
    assert LoaderCache.get is stock and LoaderCache().get(moved) is before


def test_the_command_line_is_the_hosts_with_alignment(files: Files, tmp_path: Path) -> None:
    """The specification is found in the model's configuration."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(_with_paths(ties("moved"), files)))
    arguments = [str(recipe), str(out), "--quiet", "--no-copy-tokenizer"]
    aligned = ["--align", f"{files['moved']}={files['alignment']}"]
    done = CliRunner().invoke(command(), [*arguments, *aligned], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert equal(load_file(out / "model.safetensors"), merged(files, tmp_path / "b", ties("b")))
    assert type(get("ties")).__name__ == "GeneralizedTaskArithmeticMerge"
    shown = CliRunner().invoke(command(), ["--help"]).output
    assert "--align MODEL=FILE" in shown and "--out-shard-size" in shown

    model, weights = files["moved"], files["base"] / "model.safetensors"
    for wrong, sentence in {
        "moved": "Error: nlm-mergekit-yaml: --align is MODEL=FILE, got 'moved'\n",
        "c=d": "got 'c'\n",
        f"{model}=none": "Error: nlm: a tensor file must exist, got 'none'\n",
        f"{model}={weights}": "Error: nlm.align: a file of AlignmentResult is read, got another",
    }.items():
        done = CliRunner().invoke(command(), [*arguments, "--align", wrong])
        assert done.exit_code == 1 and sentence in done.output, done.output


def test_what_does_not_fit_is_said(files: Files, tmp_path: Path) -> None:
    spec = nlm.PermutationSpec.load(files["spec"])
    moved, found = str(files["moved"]), AlignmentResult.load(files["alignment"])
    rule = r"nlm\.integrations\.mergekit: "
    with pytest.raises(ValueError, match=rule + "an aligned model is read under .* name 'other'"):
        with on_nlm.aligned_loaders({"other": found}, spec):
            pass
    with pytest.raises(ValueError, match="a permutation names groups of its specification"):
        with on_nlm.aligned_loaders({moved: {"nothing": torch.arange(3)}}, spec):
            pass
    turned = OrthogonalAlignment(found.permutation, found.report, {}, Gauge(spec, {}))
    with pytest.raises(ValueError, match=rule + "an alignment is a permutation alone"):
        with on_nlm.aligned_loaders({moved: turned}, spec):
            pass
    del spec.params["lm_head.weight"]
    with pytest.raises(ValueError, match=rule + r"the files .* 1 more in .*'lm_head\.weight'"):
        with on_nlm.aligned_loaders({moved: found.permutation}, spec):
            merged(files, tmp_path / "out", ties("moved"))
    assert not isinstance(LoaderCache().get(ModelReference.model_validate(moved)), AlignedLoader)


def test_experts_in_a_list_are_permuted_among_one_another(tmp_path: Path) -> None:
    spec, state = written(), Mixture(softmax).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    permutation = spec.random(1)
    expected = spec.apply(permutation, state)
    index = ShardedTensorIndex.from_disk(str(tmp_path))
    loader = AlignedLoader(LazyTensorLoader(index), "mixture", spec, permutation)
    for _ in range(2):
        for name in sorted(state):
            assert torch.equal(loader.get_tensor("no", aliases=["none", name]), expected[name])
        loader.flush()
    assert loader.get_tensor("no", raise_on_missing=False) is None
    with pytest.raises(KeyError):
        loader.get_tensor("no")


def test_sentence_transformers_merge_on_nlm(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="a host, of the extra [hosts]")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    encoders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path / f"bert{seed}"
        save(BertModel(config), folder)
        transformer = Transformer(str(folder))
        encoders.append(SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu"))
    base, *experts = encoders
    parameters = {"weight": 0.5, "density": 0.4}
    on_nlm.register()
    found, host = (
        SentenceTransformer.merge(experts, method, base_model=base, parameters=parameters)
        for method in ("nlm_ties", "ties")
    )
    assert equal(found.state_dict(), host.state_dict())
    assert not equal(found.state_dict(), base.state_dict())
