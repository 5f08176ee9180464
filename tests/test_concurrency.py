"""All operators at once, after a fork and in data loaders: the bits of one alone, and no hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 240  # on a machine with other work; alone it takes ten


@pytest.mark.parametrize("mode", ["threads", "fork", "loaders"])
def test_the_same_bits(mode: str) -> None:
    """In 8 threads whose number of PyTorch's threads changes midway; in children of a plain
    ``os.fork`` beside their parent; in workers of loaders that fork and that spawn."""
    script = Path(__file__).with_name("_concurrency.py")
    done = subprocess.run(
        [sys.executable, str(script), mode], text=True, capture_output=True, timeout=SECONDS,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["samples"] > 1000
    assert found["wrong"] == []
