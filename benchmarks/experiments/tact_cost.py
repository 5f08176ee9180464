"""What TACT costs: seconds of a fit and of a mixed batch, and bytes, against the bare model.

    python benchmarks/experiments/tact_cost.py

writes results/tact_cost.json beside this file: curves over 2 to 16 tasks on a small transformer,
and blocks of the sizes of ViT-B/16 and BERT-base, as deep as ``--depth`` says. The network has
random weights, the experts are noisy copies of it: the cost does not depend on them. A fit stands
against one forward pass of the merged model and one of each expert on the same micro-batches; it
also runs one on at most 32 samples, to find the points, which counts for more the fewer samples
there are. The large networks are fitted on two amounts of samples, and what ``AMOUNT`` samples a
task take is on the line through them: tasks are fitted one after the other, so that time is linear
in both. A mixed batch stands against the same batch through the model that is not corrected.
Seconds of the clock stand beside those of the processor (the sum over the threads), which other
work on the machine changes less.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nonlocal_merging import commit
from torch import nn

import nlm

RESULTS = Path(__file__).parent / "results" / "tact_cost.json"
TASKS = (2, 4, 8, 16)
ROUNDS = 15
AMOUNT = 1000  # samples a task, of which large networks are told

Made = tuple[nn.Module, Callable[[int], Any]]


def vit(width: int, depth: int, heads: int, image: int) -> Made:
    """A vision transformer of transformers and its batches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, image_size=image, patch_size=16, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config), lambda count: torch.randn(count, 3, image, image)


def bert(width: int, depth: int, heads: int, length: int) -> Made:
    """A text encoder of transformers and its batches."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    return BertForSequenceClassification(config), lambda count: torch.randint(1000, (count, length))


def noisy(network: nn.Module, amount: float = 0.2) -> nn.Module:
    """A copy whose weights are off by a share of their deviation."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += amount * torch.randn_like(parameter) * parameter.std(correction=0)
    return other.eval()


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Least seconds of each call, NAME_seconds of the clock and NAME_cpu; they take turns.

    What else runs on a machine only adds to them.
    """
    clocks = {"seconds": time.perf_counter, "cpu": time.process_time}
    times: dict[str, list[float]] = {f"{name}_{what}": [] for name in calls for what in clocks}
    for _ in range(rounds):
        for name, call in calls.items():
            start = {what: clock() for what, clock in clocks.items()}
            call()
            for what, clock in clocks.items():
                times[f"{name}_{what}"].append(clock() - start[what])
    return {name: min(each) for name, each in times.items()}


def cost(made: Made, tasks: int, amounts: tuple[int, ...], batch: int) -> dict[str, Any]:
    """One row: fits on so many samples per task in micro-batches of ``batch``, then a mixed batch.

    With several amounts the ratio at ``AMOUNT`` samples is told too.
    """
    torch.manual_seed(0)
    model, draw = made[0].eval(), made[1]
    names = [f"task {number}" for number in range(tasks)]
    expert = noisy(model)
    fit_cost(model, expert, draw, names[:1], 4, 4, 1)  # warm
    rounds = 3 if len(amounts) == 1 else 2
    fits = [fit_cost(model, expert, draw, names, n, batch, rounds) for n in amounts]
    tact = fits[-1].pop("tact")
    row: dict[str, Any] = {"tasks": tasks, "micro_batch": batch, "points": len(tact.points)}
    row |= fits[-1] | {"amounts": [{k: v for k, v in fit.items() if k != "tact"} for fit in fits]}
    if len(fits) > 1:
        for what in ("seconds", "cpu"):
            fit, bare = (on_line(fits[0], fits[-1], f"{name}_{what}") for name in ("fit", "bare"))
            row[f"ratio_at_amount_{what}"] = fit / bare
    mixed = draw(batch)
    ids = torch.arange(len(mixed)) % tasks

    def served() -> None:
        with torch.no_grad():
            tact(mixed, task=ids)

    def uncorrected() -> None:
        with torch.no_grad():
            model(mixed)

    served()
    serving = in_turns({"mixed": served, "plain": uncorrected}, ROUNDS)
    return row | {
        **serving,
        "serving_ratio_seconds": serving["mixed_seconds"] / serving["plain_seconds"],
        "serving_ratio_cpu": serving["mixed_cpu"] / serving["plain_cpu"],
        "correction_bytes": tact.parameter_bytes,
        "model_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def on_line(first: Mapping[str, Any], last: Mapping[str, Any], what: str) -> float:
    """Seconds for ``AMOUNT`` samples a task, on the line through two amounts."""
    slope = (last[what] - first[what]) / (last["samples"] - first["samples"])
    return last[what] + slope * (AMOUNT - last["samples"])


def fit_cost(
    model: nn.Module,
    expert: nn.Module,
    draw: Callable[[int], Any],
    names: Sequence[str],
    samples: int,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Seconds of a fit and of the bare passes, and what was fitted."""
    data = {name: list(draw(samples).split(batch)) for name in names}
    options: dict[str, Any] = {"max_samples": None, "micro_batch": batch}

    def bare() -> None:
        with torch.no_grad():
            for name in names:
                for network in (model, expert):
                    for part in data[name]:
                        network(part)

    fitted: list[nlm.Tact] = []

    def fit() -> None:
        fitted[:] = [nlm.Tact.fit(model, dict.fromkeys(names, expert), data, **options)]

    seconds = in_turns({"bare": bare, "fit": fit}, rounds)
    return {
        "samples": samples,
        **seconds,
        "fit_ratio_seconds": seconds["fit_seconds"] / seconds["bare_seconds"],
        "fit_ratio_cpu": seconds["fit_cpu"] / seconds["bare_cpu"],
        "tact": fitted[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=2, help="blocks of the large networks")
    parser.add_argument(
        "--samples", type=int, nargs=2, default=(16, 48), help="per task, of the large networks"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    rows = [{"network": "small", **cost(vit(96, 4, 4, 64), n, (128,), 32)} for n in TASKS]
    large = {
        "vit-base": lambda: vit(768, options.depth, 12, 224),
        "bert-base": lambda: bert(768, options.depth, 12, 128),
    }
    for name, build in large.items():
        made = cost(build(), 2, tuple(options.samples), 8)
        row = {"network": name, "depth": options.depth, "amount": AMOUNT, **made}
        rows.append(row)
    for row in rows:
        for what in ("seconds", "cpu"):
            at = row.get(f"ratio_at_amount_{what}", row[f"fit_ratio_{what}"])
            print(
                f"{row['network']:<10} {row['tasks']:>2} tasks, {what}: fit x{at:.3f} of the bare "
                f"passes, mixed batch x{row[f'serving_ratio_{what}']:.3f}"
            )
    machine = {"cpu": platform.machine(), "threads": options.threads, "nlm": nlm.__version__}
    report = {"machine": machine, "commit": commit(), "seconds": time.perf_counter() - start}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
