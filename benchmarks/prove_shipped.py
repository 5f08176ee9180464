"""Proves the shipped specifications at full size, on random weights.

Each in a process of its own, as ``nlm spec verify NAME FOLDER --random`` does it; one that needs
more memory than the machine has is named and left out. docs/symmetry.md shows what is written.

    python benchmarks/prove_shipped.py [--models NAME ...] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _bench import RESULTS, facts, machine, write

import nlm
from nlm.symmetry import pretrained, shipped

COPIES = 4  # of the weights in float64: a proof was seen to take three


def prove(name: str) -> dict[str, Any]:
    """The proof of one specification, without its digest."""
    model = pretrained.build_model(shipped.config(name))
    spec = nlm.PermutationSpec.load(name)
    proof = asdict(spec.verify(model, (), pretrained.make_inputs(model)))
    del proof["digest"]
    return proof


def needed(name: str) -> int:
    """Bytes that a proof takes."""
    model = pretrained.build_model(shipped.config(name), device="meta")
    return COPIES * 8 * sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=shipped.MODELS, default=list(shipped.MODELS))
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "proofs.json")
    parser.add_argument("--prove", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prove:
        print(json.dumps(prove(options.prove)))
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = []
    for name in options.models:
        if (bytes_needed := needed(name)) > there:
            rows.append({"model": name, "needed_bytes": bytes_needed})
            print(f"{name}: a proof takes {bytes_needed / 2**30:.0f} GiB, there are fewer")
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--prove", name], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        rows.append({"model": name, **json.loads(done.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    write(options.json, {**facts(), "rows": rows})


if __name__ == "__main__":
    main()
