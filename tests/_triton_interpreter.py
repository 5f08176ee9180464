"""Runs a Triton kernel file in the interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path


def interpreted(program: str, **variables: str) -> list[dict]:
    """One dictionary per case of a program of tests/kernels/_interpreted.py."""
    script = Path(__file__).parent / "kernels" / "_interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", **variables}
    done = subprocess.run(
        [sys.executable, str(script), program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
