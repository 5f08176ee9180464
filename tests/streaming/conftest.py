"""Models for the tests of streaming."""

import pytest
import torch
from streaming._checkpoints import TASKS, states, write


@pytest.fixture
def models(tmp_path):
    def make(dtype=torch.float32, expert_dtype=None, shards=1):
        base, *experts = states(4, dtype)
        if expert_dtype is not None:
            experts = [
                {n: t.to(expert_dtype) if t.is_floating_point() and "bn" not in n else t
                 for n, t in expert.items()} for expert in experts
            ]  # fmt: skip
        tasks = dict(zip(TASKS, experts, strict=True))
        write(tmp_path / "base", base, shards)
        paths = {task: write(tmp_path / task, state, shards) for task, state in tasks.items()}
        return base, tasks, tmp_path / "base", paths

    return make
