"""A corrected network as one module that compiles and exports."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from nlm import ops
from nlm._modules import OutputHook, install_hooks, stop_nesting

ONE_GRAPH = (  # what a compiler is told that wants all of a corrected model
    "nlm.correct: a corrected model is hooked while it runs, which no single graph holds; what "
    "compiles with fullgraph=True is the module of its own that inline() gives"
)


class Inlined(nn.Module):
    """A network whose points are corrected by hooks that stay: ``module(x)``, ``module(x, task)``.

    What :meth:`Correction.inline` returns. It is called by one thread at a time and takes no lock,
    so that ``torch.compile``, ``torch.export`` and ONNX see one graph.

    Parameters
    ----------
    network : it is hooked for good.
    tables : point -> scale and shift: [channels], or [tasks, channels] for tasks that ids choose.
    points : point -> channel dimension.
    """

    def __init__(
        self,
        network: nn.Module,
        tables: Mapping[str, tuple[Tensor, Tensor]],
        points: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        stop_nesting(network)
        self._rows: list[Tensor | None] = [None]
        for number, (scale, shift) in enumerate(tables.values()):
            self.register_buffer(f"scale_{number}", scale.clone())
            self.register_buffer(f"shift_{number}", shift.clone())
        hooks: dict[str, OutputHook] = {
            point: partial(self._correct, number, points[point])
            for number, point in enumerate(tables)
        }
        self._calls, _ = install_hooks(network, hooks)

    def _correct(self, number: int, dim: int, output: Tensor) -> Tensor:
        scale, shift = getattr(self, f"scale_{number}"), getattr(self, f"shift_{number}")
        return ops.scale_shift(output, scale, shift, self._rows[0], dim)

    def forward(self, *args: Any, task: Tensor | None = None, **kwargs: Any) -> Any:
        """The corrected network's output.

        Parameters
        ----------
        task : int64 [n], the id of each sample's task; of a module for one task there is none.
        """
        self._rows[0] = task
        try:
            with nullcontext() if self._calls is None else self._calls:
                return self.network(*args, **kwargs)
        finally:
            self._rows[0] = None
