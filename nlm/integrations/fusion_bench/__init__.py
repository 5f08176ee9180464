"""FusionBench's algorithms on nlm, and of models that were aligned first.

Each is an algorithm of the host, named by its configuration; nothing has to be registered. The
configurations that come with nlm are found by the host's command line where it is told their
folder, which ``python -m nlm.integrations.fusion_bench`` prints::

    fusion_bench --config-dir "$(python -m nlm.integrations.fusion_bench)" \\
        method=nlm/rebasin method@method.inner=nlm/ties modelpool=... taskpool=...

In Python: ``NlmRebasin(inner=NlmTies()).run(modelpool)``. For fusion-bench from 0.2.33, below 0.3;
it is imported when an algorithm is asked for.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlm.integrations import _host

if TYPE_CHECKING:
    from nlm.integrations.fusion_bench.alignment import NlmActivationMatching, NlmRebasin
    from nlm.integrations.fusion_bench.correction import NlmTact
    from nlm.integrations.fusion_bench.merging import NlmTallMask, NlmTies

__all__ = ["NlmActivationMatching", "NlmRebasin", "NlmTact", "NlmTallMask", "NlmTies"]

#: The folder of the configurations, for ``--config-dir``.
CONFIG_DIR = Path(__file__).parent / "conf"

_OLDEST, _TOO_NEW = "0.2.33", "0.3"
_HOME = {
    "NlmActivationMatching": "alignment", "NlmRebasin": "alignment", "NlmTact": "correction",
    "NlmTallMask": "merging", "NlmTies": "merging",
}  # fmt: skip


def check_host() -> None:
    """Raises ImportError, in one sentence, where there is no fusion-bench that this fits."""
    _host.check("nlm.integrations.fusion_bench", "fusion-bench", _OLDEST, _TOO_NEW)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_host()
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
