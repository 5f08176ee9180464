"""Scripts that several processes run together, started by torchrun or one by one."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

_LIMIT = 600  # seconds; a machine may have much other work

# What a script may call when its processes have parted: the threads of groups that still live.
THREADS = """
def threads_of_groups():
    from pathlib import Path
    names = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]
"""


@dataclass
class Ended:
    """How a process ended: its exit code, or less the signal's number, and its stderr."""

    code: int
    said: str


def torchrun(processes: int, script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """As users start them. Where one dies torchrun ends the others at once, whether they have said
    why they stop or not.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=_LIMIT,
    )  # fmt: skip


def side_by_side(processes: int, script: Path, *arguments: str) -> list[Ended]:
    """Each to its own end. They meet at a store of this process, as under torchrun at its own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(processes),
    }  # fmt: skip
    running: list[subprocess.Popen] = []
    said = [script.with_name(f"{script.stem}.{rank}.txt") for rank in range(processes)]
    try:
        for rank, file in enumerate(said):
            with file.open("w") as target:
                running.append(subprocess.Popen(
                    [sys.executable, str(script), *arguments], stderr=target,
                    env={**os.environ, **place, "RANK": str(rank)},
                ))  # fmt: skip
        codes = [each.wait(_LIMIT) for each in running]
    finally:
        for each in running:
            each.kill()
    return [Ended(code, file.read_text()) for code, file in zip(codes, said, strict=True)]
