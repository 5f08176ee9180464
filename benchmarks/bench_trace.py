"""What discovery costs: its time beside ``torch.export.export`` alone, and its memory.

Full-size models on meta tensors, each measurement in a process of its own that has traced a small
network before, so that imports are in neither time. Seconds are those of the processor, since both
are the work of one thread. Peak memory is that of the whole process.

    python benchmarks/bench_trace.py [--model PART] [--repeat N] [--json FILE]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, facts, machine, write
from torch import nn

import nlm
from nlm.symmetry import pretrained, shipped

MOST_TIMES_EXPORT = 1.3
MOST_BYTES = 1 << 30
MODELS = ("vit-b-16", "bert-base", "gpt2", "llama-2-7b", "resnet-50", "clip-vit-b-32")


def measure(name: str, what: str) -> dict[str, Any]:
    """Seconds of "export" or "discover" for one model, and the peak memory of this process."""
    torch.set_num_threads(1)
    small = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    torch.export.export(small, (torch.ones(2, 4),), strict=False).run_decompositions({})
    nlm.trace(small, torch.ones(2, 4))
    model = pretrained.build_model(shipped.config(name), device="meta")
    inputs = pretrained.make_inputs(model)
    start = time.process_time()
    if what == "export":
        with torch.no_grad():
            torch.export.export(model, (), inputs, strict=False)
        spec = None
    else:
        spec = pretrained.trace_config(shipped.config(name), example_inputs=inputs, cache=False)
    seconds = time.process_time() - start
    found: dict[str, Any] = {"seconds": seconds}
    found["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if spec is not None:
        found |= {"groups": len(spec.free), "permutations": spec.permutation_count}
    return found


def in_a_process(name: str, what: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, what],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name}, {what}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="only models whose name contains this")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "trace.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    rows = []
    for name in (name for name in MODELS if options.model in name):
        runs = {what: [] for what in ("export", "discover")}
        for _ in range(options.repeat):
            for what, found in runs.items():
                found.append(in_a_process(name, what))
        row = {
            "model": name,
            "export_s": statistics.median(run["seconds"] for run in runs["export"]),
            "discover_s": statistics.median(run["seconds"] for run in runs["discover"]),
            "peak_bytes": max(run["bytes"] for run in runs["discover"]),
            "groups": runs["discover"][0]["groups"],
            "permutations": runs["discover"][0]["permutations"],
        }
        row["times_export"] = row["discover_s"] / row["export_s"]
        rows.append(row)
        print(
            f"{name:<14} export {row['export_s']:5.1f} s  discovery {row['discover_s']:5.1f} s "
            f"x{row['times_export']:.2f}  peak {row['peak_bytes'] / 2**30:.2f} GiB  "
            f"{row['groups']} groups, {row['permutations']} permutations",
            flush=True,
        )
    write(options.json, {**facts(), "rows": rows})
    if missed := [
        row["model"]
        for row in rows
        if row["times_export"] > MOST_TIMES_EXPORT or row["peak_bytes"] > MOST_BYTES
    ]:
        raise SystemExit(f"more than {MOST_TIMES_EXPORT}x export or 1 GiB: {', '.join(missed)}")


if __name__ == "__main__":
    main()
