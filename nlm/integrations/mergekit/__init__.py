"""mergekit's merges on nlm's kernels, and of models that were aligned first.

Once in a process, and mergekit's API, ``run_merge`` and sentence-transformers know ``nlm_ties``::

    import nlm.integrations.mergekit as on_nlm

    on_nlm.register()

or, with a configuration as it is, and an expert of another foundation beside the others::

    with on_nlm.use_as_default(), on_nlm.aligned_loaders({"expert_b": "b_to_a.safetensors"}):
        run_merge(configuration, "merged", MergeOptions())

On the command line ``nlm-mergekit-yaml`` is ``mergekit-yaml`` within both. For mergekit from 0.1.5,
which has another API than its predecessors, below 0.2; it is imported when it is needed.

Parameters, defaults and contracts are the host's own, and so are the formulas, down to their order:
float32 results of task_arithmetic, ties and linear are those of the host's, bit by bit (of up to
four experts: the host's sums of more depend on a tensor's shape), but for entries as large as a
threshold, which the host keeps by chance and nlm all. Narrower types are computed in float32 and
rounded once. What is drawn at random is drawn from nlm's generator, seeded by the host's
(``--random-seed``), the name of the tensor and the place of the model alone: the same for any
device and order of the tensors, but not the host's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nlm.integrations import _host

if TYPE_CHECKING:
    import os

    from nlm.align import AlignmentResult
    from nlm.symmetry import Permutation, PermutationSpec

__all__ = ["aligned_loaders", "register", "use_as_default"]

_OLDEST, _TOO_NEW = "0.1.5", "0.2"


def register() -> None:
    """Adds ``nlm_<name>`` for every method that nlm computes; once, however often it is called.

    These are linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs,
    breadcrumbs_ties, della and della_linear. A merge whose inputs require gradients is left to the
    host's method.

    Raises
    ------
    ImportError
        mergekit is missing, or of another version.
    """
    check_host()
    from nlm.integrations.mergekit import methods

    methods.register()


@contextmanager
def use_as_default() -> Iterator[None]:
    """Within it the host's own names (``ties``, ...) run on nlm, in all threads of the process.

    Raises
    ------
    ImportError
        mergekit is missing, or of another version.
    """
    check_host()
    from nlm.integrations.mergekit import methods

    with methods.use_as_default():
        yield


@contextmanager
def aligned_loaders(
    alignments: "Mapping[Any, AlignmentResult | Permutation | str | os.PathLike[str]]",
    spec: "PermutationSpec | str | os.PathLike[str] | None" = None,
) -> Iterator[None]:
    """Within it the host reads these models with their units in another order.

    So every method, slice and tokenizer option takes an expert of another foundation as it takes
    one of its own. Tensors are permuted as they are read, on their device.

    Parameters
    ----------
    alignments : model, as the configuration names it -> its alignment: what ``nlm align`` wrote or
        :func:`nlm.align.align` returned, or a permutation. Not an orthogonal one, which is no
        permutation alone.
    spec : the specification that the alignments are of, its file, or a shipped name; by default
        that of each model's configuration, as ``nlm align`` finds it.

    Raises
    ------
    ImportError
        mergekit is missing, or of another version.
    ValueError
        An alignment does not fit the specification, a model's files have entries that it does not
        know, or another alignment of it is in use; on leaving it, a model was not read under the
        name that was given.
    """
    check_host()
    from nlm.integrations.mergekit import loaders

    with loaders.aligned_loaders(alignments, spec):
        yield


def check_host() -> None:
    """Raises ImportError, in one sentence, where there is no mergekit that this fits."""
    _host.check("nlm.integrations.mergekit", "mergekit", _OLDEST, _TOO_NEW)
