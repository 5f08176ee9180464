"""What runs here: :func:`info`."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("nlm", "torch", "triton", "numpy", "scipy", "safetensors")


class Info(Mapping[str, Any]):
    """A mapping that prints as a table."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)

    def __getitem__(self, key: str) -> Any:
        return self._facts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        lines = []
        for key, value in self._facts.items():
            if isinstance(value, Mapping):
                width = max(map(len, value), default=0)
                lines += [
                    f"{key}:",
                    *(f"  {name:<{width}}  {each}" for name, each in value.items()),
                ]
            else:
                lines.append(f"{key}: {value}")
        return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info() -> Info:
    """Live kernels per operation, instruction set, threads and versions.

    Returns
    -------
    Info
        A mapping with the keys "instruction set", "instruction sets", "threads", "compiled core",
        "CUDA core", "triton", "GPU", "operations", "machine" and "versions"; JSON-serialisable by
        ``dict``. An operation's entry names its live kernels, and why the others are missing.

    Examples
    --------
    >>> "channel_moments" in info()["operations"]
    True
    """
    import torch

    from nlm import _native
    from nlm._registry import operations

    described = {}
    for name, operation in operations().items():
        live = [*operation.kernels, "reference"]
        lacking = [f"no {device}: {reason}" for device, reason in operation.missing.items()]
        described[name] = "; ".join([", ".join(live), *lacking])
    core = _native.cpu
    return Info(
        {
            "instruction set": core.isa if core else "none",
            "instruction sets": ", ".join(core.runnable_isas) if core else "none",
            "threads": _native.threads(),
            "compiled core": _native.cpu_missing or "loaded",
            "CUDA core": _native.cuda_missing or "loaded",
            "triton": _native.triton_missing or "found",
            "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "operations": described,
            "machine": f"{platform.machine()}, {platform.system()}, Python "
            f"{platform.python_version()}",
            "versions": {package: _version(package) for package in _PACKAGES},
        }
    )
