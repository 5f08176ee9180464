"""Facts about machine code: registers, spills, and what stands inside of loops.

``cuobjdump`` and ``nvdisasm`` are those that come with triton.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

MMA = r"\b(HGMMA|HMMA|DMMA)\b"
WIDE_LOAD = r"\b(LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG)"
WIDE_STORE = r"\bSTG\.E\S*\.128"
SPILL = r"\b(STL|LDL)\b"


@dataclass(frozen=True)
class Facts:
    """Of one kernel for one architecture; loops are the ranges of backward branches."""

    registers: int
    spills: int
    wide_loads: int
    wide_stores: int
    mma: int
    mma_in_loops: int
    wide_loads_in_loops: int


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def facts_of_cubin(cubin: Path) -> Facts:
    usage = _output([tool("cuobjdump"), "-res-usage", str(cubin)])
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    lines = _output([tool("nvdisasm"), "-c", str(cubin)]).splitlines()
    looped = _lines_in_loops(lines)
    return Facts(
        registers=int(registers[1]),
        spills=_count(SPILL, lines),
        wide_loads=_count(WIDE_LOAD, lines),
        wide_stores=_count(WIDE_STORE, lines),
        mma=_count(MMA, lines),
        mma_in_loops=_count(MMA, looped),
        wide_loads_in_loops=_count(WIDE_LOAD, looped),
    )


def _count(pattern: str, lines: list[str]) -> int:
    return sum(re.search(pattern, line) is not None for line in lines)


def _lines_in_loops(lines: list[str]) -> list[str]:
    labels = {
        match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))
    }
    inside: set[int] = set()
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target is not None and labels.get(target[1], i) < i:
            begin = labels[target[1]]
            # A branch to itself ends the program, it is no loop.
            if any(
                re.search(r"\b(LDG|LDGSTS|LDS|FADD|FFMA|DADD)", body) for body in lines[begin:i]
            ):
                inside.update(range(begin, i))
    return [lines[i] for i in sorted(inside)]


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
