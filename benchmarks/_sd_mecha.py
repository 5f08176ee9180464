"""One merge by sd-mecha, by its own methods or by nlm's: the process that host_sd_mecha.py times.

python -m _sd_mecha sd_mecha|nlm METHOD FOLDER OUT
"""

import sys
from pathlib import Path
from typing import Any

import sd_mecha
import torch
from sd_mecha.extensions.merge_methods import resolve

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")


def stock(method: str, base: Any, others: list[Any]) -> Any:
    """A recipe of the host's methods; TIES is the one that elects by sums, as nlm's does."""
    if method == "linear":
        return sd_mecha.n_average(*others)
    vectors = [sd_mecha.subtract(other, base) for other in others]
    by_sums = {"vote_sgn": True, "apply_stock": True}
    if method == "task_arithmetic":
        moved = sd_mecha.n_average(*vectors)
    elif method == "ties":
        moved = sd_mecha.ties_sum_extended(*vectors, k=0.2, **by_sums)
    else:
        moved = sd_mecha.ties_sum_with_dropout(*vectors, k=1.0, probability=0.8, seed=0, **by_sums)
    add = resolve("add_difference")  # the host's function of this name wants a known architecture
    return add(base, moved, alpha=0.5)


def on_nlm(method: str, base: Any, others: list[Any]) -> Any:
    """The same by nlm's."""
    from nlm.integrations import sd_mecha as nlm

    if method == "linear":
        return nlm.nlm_linear(*others)
    if method == "task_arithmetic":
        return nlm.nlm_task_arithmetic(base, *others, alpha=0.5 / len(others))
    if method == "ties":
        return nlm.nlm_ties(base, *others, alpha=0.5, k=0.2)
    return nlm.nlm_dare_ties(base, *others, alpha=0.5, probability=0.8, seed=0)


def main() -> None:
    if sys.argv[1:] == ["start"]:
        return
    program, method, folder, out = sys.argv[1:]
    files = sorted(Path(folder).glob("*/model.safetensors"))
    base, *others = (sd_mecha.model(file) for file in files)
    recipe = (on_nlm if program == "nlm" else stock)(method, base, others)
    sd_mecha.merge(recipe, output=out, merge_dtype=torch.float32, output_dtype=torch.float32)


if __name__ == "__main__":
    main()
