"""Streaming merges are those of nlm.merge, bit by bit, whatever the files, chunks and types."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming._checkpoints import write
from streaming._plans import completed, plan_of

import nlm
from nlm.checkpoint import open_checkpoint
from nlm.checkpoint.shards import sha256_of
from nlm.streaming import run

WEIGHTS = {"one": 0.5, "two": 1.5, "three": 1.0}
CASES = [
    ("linear", {}),
    ("task_arithmetic", {"scale": 0.3}),
    ("model_stock", {}),
    *(
        ("ties", {"dialect": dialect, "density": 0.3, "scale": 0.7})
        for dialect in ("global", "mergekit", "peft")
    ),
    ("dare", {"drop": 0.6, "seed": 3, "scale": 0.5}),
    ("dare", {"drop": 0.6, "seed": 3, "rescale": "none"}),
    ("dare", {"drop": 0.6, "seed": 3, "rescale": "l1"}),
    ("dare_ties", {"drop": 0.6, "seed": 3}),
    ("dare_ties", {"drop": 0.5, "seed": 4, "dialect": "mergekit"}),
    ("task_arithmetic", {"scale": -0.7}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1, "scale": 0.5}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}),
    ("della_linear", {"density": 0.5, "epsilon": 0.3, "seed": 3, "scale": 0.5}),
    ("della_linear", {"density": 0.5, "seed": 3, "rescale": "l1"}),
    ("della", {"density": 0.5, "seed": 3, "rescale": "none", "dialect": "mergekit"}),
    ("uniform_soup", {}),
    ("sce", {"select": 0.3, "scale": 0.5}),
    ("sce", {}),
    ("consensus", {"agreement": 2, "scale": 0.6}),
    ("tall_mask", {}),
]
UNWEIGHTED = ("model_stock", "uniform_soup", "sce")  # fmt: skip


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        own, other = (x.contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(own, other), name


def loaded(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    state = {}
    for file in checkpoint.files:
        state |= load_file(file)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_merges_are_those_in_memory(models, tmp_path, method, options, dtype):
    base, experts, base_path, paths = models(dtype, shards=2)
    given = {name: value for name, value in options.items()}
    if method not in UNWEIGHTED:
        given["weights"] = WEIGHTS
    expected = nlm.merge(experts, base, method, **given)
    plan = plan_of(tmp_path / "out", base_path, paths, method, weights=WEIGHTS, **options)
    report = run(plan)
    found = loaded(tmp_path / "out")
    assert_same(found, dict(expected))
    assert report.tensors == len(base) and report.resumed == ()
    assert report.files == {
        file.name: sha256_of(file) for file in open_checkpoint(tmp_path / "out").files
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [case for case in CASES if case[0] not in ("linear", *UNWEIGHTED) or "select" in case[1]],
)
def test_experts_may_have_another_type(models, tmp_path, method, options):
    base, experts, base_path, paths = models(torch.bfloat16, expert_dtype=torch.float32)
    weights = {} if method in UNWEIGHTED else {"weights": WEIGHTS}
    expected = nlm.merge(experts, base, method, **weights, **options)
    target = tmp_path / ("out" if method == "tall_mask" else "o.safetensors")
    run(plan_of(target, base_path, paths, method, weights=WEIGHTS, **options))
    assert_same(loaded(target), dict(expected))


def test_slerp_is_that_in_memory(models, tmp_path):
    _, experts, _, paths = models(torch.bfloat16)
    pair = {task: experts[task] for task in ("one", "two")}
    expected = nlm.merge(pair, method="slerp", t=0.3)
    plan = plan_of(tmp_path / "out", None, {task: paths[task] for task in pair}, "slerp", t=0.3)
    run(plan)
    assert_same(loaded(tmp_path / "out"), dict(expected))


@pytest.mark.parametrize(("method", "options"), CASES)
def test_chunks_shards_and_threads_do_not_matter(models, tmp_path, method, options, monkeypatch):
    _, _, base_path, paths = models(torch.bfloat16)
    made = {}
    for name, more, threads in (
        ("whole", {}, "2"),
        ("small", {"memory": 64 * 8 * 19, "shard_bytes": 1500}, "1"),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        run(plan_of(tmp_path / name, base_path, paths, method, **options, **more))
        made[name] = loaded(tmp_path / name)
    assert len(open_checkpoint(tmp_path / "small").files) > 2
    assert_same(made["small"], made["whole"])


def test_the_type_of_the_output_is_chosen(models, tmp_path):
    """One rounding, from what is computed in float32."""
    base, experts, base_path, paths = models(torch.bfloat16)
    wide = [{n: t.float() if "bn" not in n and t.is_floating_point() else t for n, t in s.items()}
            for s in (base, *experts.values())]  # fmt: skip
    for method, options in (("task_arithmetic", {"scale": 0.4}), ("ties", {"density": 0.5})):
        expected = nlm.merge(dict(zip(experts, wide[1:], strict=True)), wide[0], method, **options)
        for dtype, kind in (("F32", torch.float32), ("F16", torch.float16)):
            output = tmp_path / f"{method}-{dtype}"
            run(plan_of(output, base_path, paths, method, dtype=dtype, **options))
            found = loaded(output)
            assert found["norm.weight"].dtype == kind
            for name in ("norm.weight", "layers.0.up.weight", "odd.weight"):
                assert torch.equal(found[name], expected[name].to(kind)), name


@pytest.mark.parametrize("shard_bytes", [900, 10**6])
def test_votes_of_zero_follow_the_majority(tmp_path, shard_bytes):
    """Where the votes of all tensors are negative, votes of 0 elect -, in every file."""
    base = {"a.weight": torch.zeros(200), "b.weight": torch.zeros(130)}
    one = {"a.weight": torch.full((200,), -1.0), "b.weight": torch.full((130,), -1.0)}
    two = {name: tensor.clone() for name, tensor in one.items()}
    two["a.weight"][::3], two["b.weight"][5] = 1.0, 1.0
    paths = {"one": write(tmp_path / "one", one), "two": write(tmp_path / "two", two)}
    expected = nlm.merge({"one": one, "two": two}, base, "ties", density=1.0)
    write(tmp_path / "base", base)
    given = {"density": 1.0, "shard_bytes": shard_bytes, "memory": 64 * 8 * 6}
    report = run(plan_of(tmp_path / "out", tmp_path / "base", paths, "ties", **given))
    assert (expected["a.weight"][::3] == -1).all()
    assert_same(loaded(tmp_path / "out"), dict(expected))
    assert len(report.files) == (2 if shard_bytes == 900 else 1)
    assert all(sha256_of(tmp_path / "out" / n) == digest for n, digest in report.files.items())


def test_tensors_that_are_not_aligned(tmp_path):
    """A bool of odd length before float32, as the format allows."""
    paths = {}
    for number, name in enumerate(("base", "one")):
        header = {
            "flag": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
            "w.weight": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        values = np.arange(5, dtype=np.float32) * (number + 1)
        paths[name] = tmp_path / f"{name}.safetensors"
        paths[name].write_bytes(
            len(text).to_bytes(8, "little") + text + b"\1\0\1" + values.tobytes()
        )
    run(plan_of(tmp_path / "out", paths["base"], {"one": paths["one"]}, "ties", density=0.4))
    assert loaded(tmp_path / "out")["w.weight"].tolist() == [0, 1, 2, 6, 8]


def test_the_folder_is_complete(models, tmp_path):
    _, experts, base_path, paths = models()
    (base_path / "pytorch_model.bin").write_bytes(b"no")
    for task, state in experts.items():
        own = {**state, "head.weight": torch.full((2, 8), float(len(task)))}
        for file in paths[task].glob("*.safetensors"):
            file.unlink()
        save_file(own, paths[task] / "model.safetensors")
    plan = plan_of(tmp_path / "out", base_path, paths, "linear", heads=("head",), dtype="F16")
    recipe = "method: linear | yes"
    run(plan, recipe, write_others=lambda to, files: completed(to, plan, recipe, files))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "README.md", "heads"}
    for task in experts:
        head = load_file(tmp_path / "out" / "heads" / f"{task}.safetensors")
        assert head.keys() == {"head.weight"} and (head["head.weight"] == len(task)).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    card = (tmp_path / "out" / "README.md").read_text()
    assert recipe in card and sha256_of(tmp_path / "out" / "model.safetensors") in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("odd.weight"), "got 'odd.weight' missing in expert 'two'"),
        (lambda s: s.update(extra=torch.ones(1)), "got 'extra' extra in expert 'two'"),
        (lambda s: s.update({"norm.weight": torch.ones(9)}), r"got \[9\] for 'norm.weight'"),
        (lambda s: s.update({"norm.weight": torch.ones(8, dtype=torch.int32)}), "got I32 for"),
        (lambda s: s.update(position_ids=torch.arange(1, 5)), "got other I64 values for"),
        (lambda s: s["norm.weight"].fill_(float("nan")),
         r"got NaN or inf in 'norm.weight' \(F32\), as 'two' has"),
    ],
)  # fmt: skip
def test_models_that_do_not_go_together(models, tmp_path, change, message):
    _, experts, base_path, paths = models()
    change(experts["two"])
    save_file(experts["two"], paths["two"] / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        run(plan_of(tmp_path / "out", base_path, paths, "task_arithmetic"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "three", "two"]


@pytest.mark.parametrize("method", ["breadcrumbs", "consensus", "dare", "della", "sce", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_method_leaves_out_is_finite_too(models, tmp_path, method, value):
    """NaN among entries that are dropped would not be seen in the result."""
    _, experts, base_path, paths = models()
    experts["two"]["norm.weight"][3] = value
    save_file(experts["two"], paths["two"] / "model.safetensors")
    given = {"seed": 1} if method in ("dare", "della") else {}
    with pytest.raises(ValueError, match=r"finite, got .*norm\.weight"):
        run(plan_of(tmp_path / "out", base_path, paths, method, **given))
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_while_a_merge_is_completed(models, tmp_path):
    _, experts, base_path, paths = models()

    def touched(folder, files):
        save_file(experts["one"], paths["two"] / "model.safetensors")

    with pytest.raises(RuntimeError, match="two"):
        run(plan_of(tmp_path / "out", base_path, paths, "linear"), write_others=touched)
    assert not (tmp_path / "out").exists()


def test_a_result_that_overflows_is_named(models, tmp_path):
    _, _, base_path, paths = models()
    with pytest.raises(ValueError, match=r"got NaN or inf in .* \(F16\), of finite inputs"):
        run(plan_of(tmp_path / "o", base_path, paths, "task_arithmetic", scale=1e6, dtype="F16"))


def test_wrong_parameters(models, tmp_path):
    _, _, base_path, paths = models()
    for method, given, message in (
        ("median", {}, "the method is one of linear"),
        ("ties", {"density": 1.5}, r"a density lies in \(0, 1\], got 1.5"),
        ("ties", {"dialect": "mine"}, "the dialect is one of global"),
        ("dare", {}, "has a seed, got none"),
        ("dare", {"seed": 0, "drop": 1.0}, r"the share to drop lies in \[0, 1\), got 1.0"),
        ("linear", {"weight": 0.0}, "do not sum to zero"),
        ("breadcrumbs", {"gamma": 1.0}, r"too large lies in \[0, 1\), got 1.0"),
        ("della", {"seed": 0, "epsilon": 0.5}, "got density 0.2 and epsilon 0.5"),
        ("della_linear", {}, "has a seed, got none"),
        ("sce", {"select": 0.0}, r"that is selected lies in \(0, 1\], got 0.0"),
        ("consensus", {"agreement": 1.5}, r"an agreement lies in \[1, 3\], .* got 1.5"),
        ("tall_mask", {"mask_threshold": 0.0}, "a mask threshold is positive, got 0.0 for 'one'"),
        ("fisher", {}, "Fisher information of every expert, got none of 'one'"),
        ("linear", {"memory": 100}, "the memory holds .* buffers"),
    ):
        with pytest.raises(ValueError, match=message):
            run(plan_of(tmp_path / "out", base_path, paths, method, **given))
        assert not list(tmp_path.glob(".out*"))
    with pytest.raises(ValueError, match="'ties' starts from a base, got none"):
        run(plan_of(tmp_path / "out", None, paths, "ties"))


def test_an_existing_output_is_kept_and_replaced_on_demand(models, tmp_path):
    _, _, base_path, paths = models()
    out = tmp_path / "out"
    run(plan_of(out, base_path, paths, "linear"))
    before = (out / "model.safetensors").read_bytes()
    plan = plan_of(out, base_path, paths, "task_arithmetic")
    with pytest.raises(FileExistsError, match=r"overwritten only with force \(--force\)"):
        run(plan)
    assert (out / "model.safetensors").read_bytes() == before
    run(plan, force=True)
    assert (out / "model.safetensors").read_bytes() != before
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="force replaces a checkpoint's folder"):
        run(plan_of(other, base_path, paths, "linear"), force=True)
    assert (other / "letter.txt").read_text() == "dear"
    assert not list(tmp_path.glob(".*"))


def test_an_input_that_changes_under_way_is_named(models, tmp_path):
    _, experts, base_path, paths = models()

    def touch(what, share):
        if share > 0.5:
            save_file(experts["one"], paths["one"] / "model.safetensors")

    with pytest.raises(RuntimeError, match="must stay as it is while it is read"):
        run(plan_of(tmp_path / "out", base_path, paths, "linear"), progress=touch)
    assert not (tmp_path / "out").exists()
