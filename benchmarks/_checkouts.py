"""Functions of repositories that are no packages, from checkouts: what host_git_rebasin.py and
host_zipit.py time. Nothing of these repositories is in this one.

    python -m _checkouts git_rebasin|zipit PROGRAM CHECKOUT ROW SIZE OUT
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
from _rebasin import build
from safetensors.torch import save_file
from torch import Tensor, nn

Table = dict[str, tuple[str | None, ...]]


def module(file: Path) -> ModuleType:
    """A file of a checkout, as a module."""
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.exists():
        raise SystemExit(f"a checkout has the file {file.name}, got none at {file}")
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def table(network: nn.Module) -> Table:
    """Which permutation stands on which axis, of a chain of layers."""
    layers = [(name, each) for name, each in network.named_children() if [*each.parameters()]]
    writers = [name for name, each in layers if not isinstance(each, nn.BatchNorm2d)]
    reads = {after: f"P_{before}" for before, after in pairwise(writers)}
    found: Table = {}
    last: str | None = None
    for name, each in layers:
        if isinstance(each, nn.BatchNorm2d):
            found |= {f"{name}.weight": (last,), f"{name}.bias": (last,)}
            continue
        last = f"P_{name}" if name != writers[-1] else None
        kernel = (None,) * (each.weight.dim() - 2)
        found |= {f"{name}.weight": (last, reads.get(name), *kernel), f"{name}.bias": (last,)}
    return found


def align(program: str, checkout: Path, network: str, size: str, out: str) -> None:
    """Weight matching of two networks drawn apart, as the published functions are called."""
    if program == "nlm":
        from nlm.integrations import git_rebasin as host
    else:
        host = module(checkout / "utils" / "weight_matching.py")
    torch.manual_seed(0)
    one, two = (build(network, size)[0] for _ in range(2))
    if out == "-":
        return
    axes = table(one)
    a, b = (dict(net.named_parameters()) for net in (one, two))
    a, b = ({name: x.detach() for name, x in each.items()} for each in (a, b))
    ps = host.permutation_spec_from_axes_to_perm(axes)
    found = host.weight_matching(ps, a, b)
    found = {name: index.long() for name, index in found.items()}  # theirs are floating point
    moved = host.apply_permutation(ps, found, b)
    value = sum(float((a[name].double() * moved[name].double()).sum()) for name in a)
    save_file({n: x.contiguous() for n, x in moved.items()}, out, {"objective": repr(value)})


def match(program: str, checkout: Path, row: str, size: str, out: str) -> None:
    """Units of two models from the covariance of what they compute, as ZipIt hands it over."""
    if program == "nlm":
        from nlm.integrations.zipit import match_tensors_nlm, match_tensors_nlm_zip

        functions = {"permute": match_tensors_nlm, "zip": match_tensors_nlm_zip}
    else:
        host = module(checkout / "matching_functions.py")
        functions = {"permute": host.match_tensors_permute, "zip": host.match_tensors_zipit}
    units = int(size)
    make = torch.Generator().manual_seed(0)
    shared = torch.randn(4 * units, units, generator=make)
    noise = (torch.randn(4 * units, units, generator=make) for _ in range(2))
    order = torch.randperm(units, generator=make)
    features = torch.cat([shared + next(noise), shared[:, order] + next(noise)], 1)
    if out == "-":
        return
    covariance = torch.cov(features.T)
    given = {"covariance": covariance.clone()}
    _, unmerge = functions[row](given, r=0.5, a=1.0, b=1.0)
    save_file({"place": first_of(unmerge)}, out, {"objective": repr(likeness(covariance, unmerge))})


def first_of(unmerge: Tensor) -> Tensor:
    """For every unit the first one that it was matched with: the same for any order of columns."""
    place = unmerge.argmax(1)
    return torch.tensor([int((place == each).nonzero()[0]) for each in place])


def likeness(covariance: Tensor, unmerge: Tensor) -> float:
    """The mean correlation of units that became one."""
    deviation = covariance.diagonal().sqrt()
    same = (unmerge @ unmerge.T).triu(1) > 0
    return float((covariance / deviation / deviation[:, None])[same].double().mean())


def main() -> None:
    world, program, checkout, *rest = sys.argv[1:]
    (match if world == "zipit" else align)(program, Path(checkout), *rest)


if __name__ == "__main__":
    main()
