"""The demo: real tasks, two foundations and their experts, trained in minutes without a network.

Needs the ``demo`` extra (``pip install nlm[demo]``): scikit-learn's handwritten digits and the
fonts that matplotlib ships. The demo, the experiments and the tests share it.

>>> from nlm.demo import load
>>> demo = load(seed=0, tasks=4)  # doctest: +SKIP
"""

from nlm.demo.networks import cnn64, mlp512
from nlm.demo.tasks import TASKS, Pretraining, Sizes, Split, Task, assert_disjoint
from nlm.demo.training import Recipe
from nlm.demo.world import Demo, Progress, Settings, load

__all__ = [
    "TASKS",
    "Demo",
    "Pretraining",
    "Progress",
    "Recipe",
    "Settings",
    "Sizes",
    "Split",
    "Task",
    "assert_disjoint",
    "cnn64",
    "load",
    "mlp512",
]
