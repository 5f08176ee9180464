"""The registry of fast operations, and the only file that knows ``torch.library``.

An operation registers a schema, a plain PyTorch ``reference``, an ``out`` function that validates
and allocates, and its fast kernels. :func:`register` gives PyTorch

* for each device with a live kernel, that kernel;
* for every other device, the reference, after the same checks;
* ``out`` as the fake kernel, so that meta tensors, ``torch.compile`` and ``torch.export`` raise the
  same sentence as eager code.

``Library.define`` / ``impl`` dispatch in 5 to 11 us; ``custom_op`` would take 24 to 65.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from nlm import _core

_LIBRARY = torch.library.Library("nlm", "DEF")
_OPERATIONS: dict[str, "Operation"] = {}

#: Dispatch keys by the device names of :attr:`Operation.kernels`.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Operation:
    """A registered operation. Calling it dispatches on the device of the arguments.

    Attributes
    ----------
    stem : str
        File name of the operation in every room: ``nlm/ops``, ``csrc``, ``kernels``, ...
    name : str
        Name of the PyTorch operator, ``torch.ops.nlm.<name>``.
    reference : callable
        The formula in plain PyTorch, with the schema's arguments.
    out : callable
        Validates the arguments and allocates the results; computes nothing.
    kernels : mapping of str to callable
        The fast kernels that can be called here, by device: ``op.kernels["cpu"](...)``.
    missing : mapping of str to str
        Devices whose fast kernel cannot be called here, and why.
    cpu_only : bool
        The operation has no GPU kernel by design.
    default : OpOverload
        The dispatching PyTorch operator.
    """

    stem: str
    name: str
    schema: str
    reference: Callable[..., Any]
    out: Callable[..., Any]
    kernels: Mapping[str, Callable[..., Any]]
    missing: Mapping[str, str]
    cpu_only: bool
    default: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.default(*args)


def register(
    schema: str,
    *,
    stem: str,
    reference: Callable[..., Any],
    out: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None,
    missing: Mapping[str, str | None],
    check_values: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Operation:
    """Registers an operation of the library.

    Parameters
    ----------
    schema : str
        PyTorch schema without the namespace; an argument that is written to is marked ``(a!)``.
    stem : str
        The operation's file name.
    reference, out, cpu, cuda : callable
        See :class:`Operation`. ``cuda=None`` declares the operation ``cpu_only``.
    missing : mapping
        For "cpu" and "cuda", why that kernel cannot be called here; None or absent when it can.
    check_values : callable, optional
        Checks that must read values (index ranges), which ``out`` cannot do on meta tensors. Runs
        before the reference; a kernel calls it itself, unless it checks on the device.
    backward, setup_context : callable, optional
        As in ``torch.library.register_autograd``.
    """
    name = schema.partition("(")[0]
    given = {"cpu": _alone_if_forked(cpu)}
    given |= {} if cuda is None else {"cuda": _on_its_device(cuda)}
    reasons = {device: reason for device in given if (reason := missing.get(device)) is not None}
    kernels = {device: kernel for device, kernel in given.items() if device not in reasons}

    @_alone_if_forked
    @functools.wraps(reference)
    def checked_reference(*args: Any) -> Any:
        out(*args)
        if check_values is not None:
            check_values(*args)
        return reference(*args)

    qualified = f"nlm::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, checked_reference, "CompositeExplicitAutograd")
    writes = [
        argument.alias_info is not None for argument in torch._C.parse_schema(schema).arguments
    ]
    if any(writes):
        kernels = {device: _counting(kernel, writes) for device, kernel in kernels.items()}
    for device, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, _DISPATCH_KEYS[device])
    torch.library.register_fake(qualified, out, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_LIBRARY
        )
    operation = Operation(
        stem=stem,
        name=name,
        schema=schema,
        reference=reference,
        out=out,
        kernels=MappingProxyType(kernels),
        missing=MappingProxyType(reasons),
        cpu_only=cuda is None,
        default=getattr(torch.ops.nlm, name).default,
    )
    _OPERATIONS[name] = operation
    return operation


def _alone_if_forked(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` with what it asks of PyTorch on one thread in a forked child: PyTorch's own loops
    wait there for threads that only the parent has."""

    @functools.wraps(kernel)
    def guarded(*args: Any) -> Any:
        if not _core.forked() or (threads := torch.get_num_threads()) == 1:
            return kernel(*args)
        torch.set_num_threads(1)
        try:
            return kernel(*args)
        finally:
            torch.set_num_threads(threads)

    return guarded


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` with the GPU of its first tensor as the current one, which launches go to."""

    @functools.wraps(kernel)
    def guarded(*args: Any) -> Any:
        lists = (value if isinstance(value, (list, tuple)) else (value,) for value in args)
        tensors = (value for of in lists for value in of if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(next(tensors)):
            return kernel(*args)

    return guarded


def _counting(kernel: Callable[..., Any], writes: list[bool]) -> Callable[..., Any]:
    """``kernel``, after which autograd knows that the arguments written to have changed."""

    @functools.wraps(kernel)
    def counted(*args: Any) -> Any:
        result = kernel(*args)
        for value, written in zip(args, writes, strict=True):
            if written and value is not None:
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if not tensor.is_inference():
                        torch.autograd.graph.increment_version(tensor)
        return result

    return counted


def operations() -> Mapping[str, Operation]:
    """All registered operations by name; imports them first."""
    import nlm.ops  # noqa: F401

    return MappingProxyType(_OPERATIONS)
