"""Whole jobs on the kernels beside the same jobs on the PyTorch references.

One process, in which operations are switched to their references and back. Every job is run once on
both and the results compared; then both take turns. A reference is the operation's formula in plain
PyTorch, that of ``assignment`` is SciPy's solver and a search for the duals. All else is common to
both: reading, and forward passes, among them those that confirm a specification (a row has the
matching alone) and the demo's evaluation and calibration, half of its time. The demo's networks are
trained, where the cache lacks them, before the timing.

    python benchmarks/bench_jobs.py [--job PART] [--threads N] [--seconds S] [--json FILE]
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _bench import RESULTS, error, facts, machine, time_in_turns, write
from torch import Tensor, nn

import nlm
from nlm._registry import operations
from nlm.align import AlignmentResult, activation_matching
from nlm.demo import experiment
from nlm.demo.networks import cnn64

TASKS = 4
SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """What a user calls, with its inputs; returns what the two runs must agree on.

    ``most_error`` is relative to the largest entry of each result.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    most_error: float


@contextmanager
def on_references() -> Iterator[None]:
    """Within it, all operations of this process run on their references."""
    with torch.library._scoped_library("nlm", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden
            for operation in operations().values():
                library.impl(operation.name, operation.reference, "CPU")
        yield


def bert(seed: int) -> nn.Module:
    """Four layers of 256 units, 4.3 M parameters, drawn at random; biases too."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=4000, hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
        intermediate_size=1024, max_position_embeddings=64, num_labels=10,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def fine_tuned(model: nn.Module, count: int) -> dict[str, nn.Module]:
    """Copies with noise on every parameter."""
    make = torch.Generator().manual_seed(0)
    experts = {f"task {number}": copy.deepcopy(model) for number in range(count)}
    for expert in experts.values():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=make)
            parameter.data += 0.2 * parameter.data.std() * noise
    return experts


def align(
    how: Callable[..., AlignmentResult], a: nn.Module, b: nn.Module, inputs: Tensor, **options: Any
) -> Callable[[], list[Tensor]]:
    """What is agreed on is the objective: units that never fire may be matched in any order."""
    spec = nlm.trace(a, inputs[:2])

    def run() -> list[Tensor]:
        reached = how(a, b, spec, **options).report.objective[-1]
        return [torch.tensor(reached, dtype=torch.float64)]

    return run


def merge(model: nn.Module) -> Callable[[], list[Tensor]]:
    states = {task: expert.state_dict() for task, expert in fine_tuned(model, TASKS).items()}
    base = model.state_dict()
    return lambda: list(nlm.merge(states, base, "ties", density=0.2, scale=0.4).values())


def correct(model: nn.Module, inputs: Tensor) -> Callable[[], list[Tensor]]:
    """Fits TACT on ``inputs``, and corrects one batch with a task per sample."""
    experts = fine_tuned(model, TASKS)
    merged = copy.deepcopy(model)
    data = {task: [inputs] for task in experts}
    tasks = torch.arange(len(inputs)) % TASKS

    @torch.no_grad()
    def run() -> list[Tensor]:
        tact = nlm.Tact.fit(copy.deepcopy(merged), experts, data)
        output = tact(inputs, task=tasks)
        return [output if isinstance(output, Tensor) else output.logits]

    return run


def demo() -> list[Tensor]:
    """Every normalised accuracy that ``nlm demo`` shows."""
    settings = experiment.run(tasks=TASKS)["settings"]
    return [
        torch.tensor([score["average"] for score in scores.values()])
        for counts in settings.values()
        for scores in counts.values()
    ]


def jobs() -> Iterator[Job]:
    make = torch.Generator().manual_seed(0)
    images = torch.rand(1024, 1, 16, 16, generator=make)
    words = torch.randint(4000, (128, 32), generator=make)
    network, language = "CNN of 1.4 M", "BERT of 4.3 M"
    pairs = {network: (cnn64(10, 0), cnn64(10, 1), images), language: (bert(0), bert(1), words)}
    for name, (a, b, inputs) in pairs.items():
        yield Job(
            f"align by weights, {name}", align(nlm.align, a, b, inputs, layerwise=False), 1e-6
        )
        seen = {"data": [inputs]}
        run = align(nlm.align, a, b, inputs, method="activations", **seen)
        yield Job(f"align by activations, {name}", run, 1e-6)
        run = align(activation_matching, a, b, inputs, **seen)
        yield Job(f"the same, unproven, {name}", run, 1e-6)
    for name, (a, _, inputs) in pairs.items():
        yield Job(f"merge {TASKS} by TIES, {name}", merge(a), 0.0)
        yield Job(f"TACT of {TASKS} tasks and a forward, {name}", correct(a, inputs[:128]), 1e-3)
    yield Job(f"nlm demo --tasks {TASKS}", demo, 0.02)


def measure(job: Job, seconds: float) -> dict[str, Any]:
    """Compares the results, then the times; a SystemExit where the results differ."""

    def reference() -> Sequence[Tensor]:
        with on_references():
            return job.run()

    start = time.perf_counter()
    found = error(job.run(), tuple(result.double() for result in reference()))
    if not found <= job.most_error:
        raise SystemExit(
            f"{job.name}: kernels and references differ by {found:.1e}, allowed is "
            f"{job.most_error:.1e}; nothing is timed"
        )
    is_long = time.perf_counter() - start > seconds
    calls = {"kernels_s": job.run, "references_s": reference}
    medians = time_in_turns(calls, 0.0 if is_long else seconds)
    ratio = medians["references_s"] / medians["kernels_s"]
    return {"job": job.name, **medians, "ratio": ratio, "difference": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--job", default="", help="only jobs whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for each job")
    parser.add_argument("--json", type=Path, default=RESULTS / machine() / "jobs.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for job in jobs():
        if options.job in job.name:
            row = measure(job, options.seconds)
            rows.append(row)
            print(
                f"{row['job']:<46} kernels {row['kernels_s']:8.3f} s  references "
                f"{row['references_s']:8.3f} s  x{row['ratio']:.2f}  {row['difference']:.0e}",
                flush=True,
            )
    write(options.json, {**facts(), "threads": options.threads, "rows": rows})


if __name__ == "__main__":
    main()
