"""A merge by "tall_mask" on disk: its masks, and each task's checkpoint from them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming._plans import plan_of
from streaming.test_engine import WEIGHTS, assert_same, loaded

import nlm
from nlm.cli.app import run as cli
from nlm.streaming import run, write_task

LIMITS = {"one": 0.6, "two": 0.4, "three": 1.2}


def merged_at(tmp_path, models, dtype=torch.float32, **given):
    """The models, and the folder that they are merged into."""
    base, experts, base_path, paths = models(dtype, **given)
    plan = plan_of(tmp_path / "out", base_path, paths, "tall_mask", weights=WEIGHTS)

    def value(name, task, tensor):
        return LIMITS[task] if name == "mask_threshold" else plan.value(name, task, tensor)

    run(replace(plan, value=value, memory=64 * 64 * 2))
    merged = nlm.merge(experts, base, "tall_mask", weights=WEIGHTS, mask_threshold=LIMITS)
    return merged, base_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_tasks_are_those_in_memory(models, tmp_path, dtype):
    merged, base = merged_at(tmp_path, models, dtype, shards=2)
    assert_same(loaded(tmp_path / "out"), dict(merged))
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    for task in LIMITS:
        own = load_file(tmp_path / "out" / "masks" / f"{task}.safetensors")
        assert_same(own, merged.masks[task])
        for target in (tmp_path / task / "restored", tmp_path / f"{task}.safetensors"):
            write_task(tmp_path / "out", base, task, target)
            assert_same(loaded(target), merged.for_task(task))
        assert (tmp_path / task / "restored" / "tokenizer.json").is_file()


def test_a_base_of_another_type_than_the_experts(models, tmp_path):
    merged, base = merged_at(tmp_path, models, torch.bfloat16, expert_dtype=torch.float32)
    write_task(tmp_path / "out", base, "two", tmp_path / "two.safetensors", memory=1000)
    assert_same(load_file(tmp_path / "two.safetensors"), merged.for_task("two"))


def test_a_base_whose_axes_lie_in_another_order(models, tmp_path):
    """A PyTorch file may hold a transposed tensor as it lies."""
    merged, base = merged_at(tmp_path, models)
    state = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in loaded(base).items()
    }
    torch.save(state, tmp_path / "base.pt")
    write_task(tmp_path / "out", tmp_path / "base.pt", "two", tmp_path / "two.safetensors")
    assert_same(load_file(tmp_path / "two.safetensors"), merged.for_task("two"))


def test_the_command(models, tmp_path, capsys):
    merged, base = merged_at(tmp_path, models)
    told = ["restore", str(tmp_path / "out"), "two", "--base", str(base), "-o"]
    target = str(tmp_path / "two-restored")
    assert cli([*told, target]) == 0
    assert capsys.readouterr().out == f"the checkpoint of two is {target}\n"
    assert_same(loaded(tmp_path / "two-restored"), merged.for_task("two"))
    assert cli([*told, target]) == 1 and "--force" in capsys.readouterr().err


def test_a_merge_that_ends_among_its_masks_is_resumed(models, tmp_path):
    base, experts, base_path, paths = models()
    plan = plan_of(tmp_path / "out", base_path, paths, "tall_mask")
    asked = []

    def value(name, task, tensor):
        asked.append(name)
        if asked.count("mask_threshold") > 3 * len(base) + 5:  # in the masks of the second task
            raise OSError("no space left")
        return plan.value(name, task, tensor)

    with pytest.raises(OSError, match="no space left"):
        run(replace(plan, value=value))
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.partial/masks/one.safetensors"))
    report = run(plan, resume=True)
    assert report.resumed == ("model.safetensors",)
    merged = nlm.merge(experts, base, "tall_mask")
    assert_same(loaded(tmp_path / "out"), dict(merged))
    for task in experts:
        assert_same(
            load_file(tmp_path / "out" / "masks" / f"{task}.safetensors"), merged.masks[task]
        )


def test_wrong_inputs_write_nothing(models, tmp_path):
    merged_at(tmp_path, models)
    target = tmp_path / "restored"
    with pytest.raises(ValueError, match=r"from the base of its merge, got another one, '.*one'"):
        write_task(tmp_path / "out", tmp_path / "one", "two", target)
    with pytest.raises(FileNotFoundError, match=r"got one, three, two in .* and no 'four'"):
        write_task(tmp_path / "out", tmp_path / "base", "four", target)
    with pytest.raises(FileNotFoundError, match="got none in"):
        write_task(tmp_path / "base", tmp_path / "base", "two", target)
    masks = tmp_path / "out" / "masks" / "two.safetensors"
    own = load_file(masks)
    save_file(own, masks)
    with pytest.raises(ValueError, match="a file of TALL-masks is read, got"):
        write_task(tmp_path / "out", tmp_path / "base", "two", target)
    own["norm.weight"] = torch.zeros(2, dtype=torch.uint8)
    save_file(own, masks, metadata={"nlm": "TALL-masks", "base": "0x0p+0"})
    with pytest.raises(ValueError, match=r"are of one model, got another 'norm.weight'"):
        write_task(tmp_path / "out", tmp_path / "base", "two", target)
    assert not target.exists() and not list(tmp_path.glob(".restored*"))


def test_masks_need_a_folder(models, tmp_path):
    _, _, base, paths = models()
    with pytest.raises(ValueError, match="masks are written to a folder, got the file"):
        run(plan_of(tmp_path / "o.safetensors", base, paths, "tall_mask"))
