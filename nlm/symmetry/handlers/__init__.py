"""How ATen operations act on axes: one small function per operation, registered by name.

A handler is called with a :class:`Step` and the operation's arguments, tensors as :class:`Array`.
It says which axes of the operands are the same (``unify``), forbids what the operation tells apart
by position (``pin``), and returns the result. It must hold for every permutation that it leaves
possible; also for one that differs along other axes of the operands: an operation that mixes the
positions of an axis gives its result a new axis there, or records what it computes on the way.

An operation without a handler is decomposed into others; one that cannot be pins every axis that it
touches (:class:`NotUnderstood` does the same). So a missing handler costs groups, never soundness.

Operations of the user's own are registered in the same way, by their qualified name::

    @handler("mylib.scaled_add")
    def scaled_add(step, x, y, scale):
        return Array(broadcast(x.axes, y.axes))
"""

from nlm.symmetry.handlers import elements, layers, lookups, shapes
from nlm.symmetry.handlers.registry import (
    HANDLERS,
    Array,
    Lookup,
    NotUnderstood,
    Record,
    Registered,
    Step,
    always_with,
    handler,
)

__all__ = [
    "HANDLERS",
    "Array",
    "Lookup",
    "NotUnderstood",
    "Record",
    "Registered",
    "Step",
    "always_with",
    "elements",
    "handler",
    "layers",
    "lookups",
    "shapes",
]
