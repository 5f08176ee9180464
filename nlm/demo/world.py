"""Everything the demo merges: tasks, two foundations, and experts trained from them.

The first run trains (two minutes on two cores); later ones read the trained weights from the cache
and draw the tasks anew, in seconds. Every tensor is determined by the seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

from nlm.demo import cache
from nlm.demo.glyphs import FACES, FONT_SIZE, Glyphs, render
from nlm.demo.networks import NETWORKS
from nlm.demo.tasks import (
    TASKS,
    Pretraining,
    Sizes,
    Task,
    assert_disjoint,
    make_pretraining,
    make_task,
)
from nlm.demo.training import EXPERT, FOUNDATION, Recipe, train_expert, train_foundation

# Raised with every change of the code that changes what is rendered or trained.
_REVISION = 1

# Seconds of each kind of work on two cores: they set the pace of the progress bar.
_RENDER_SECONDS, _DRAW_SECONDS, _FOUNDATION_SECONDS, _EXPERT_SECONDS = 2, 3, 20, 4

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of all work done; an exception it raises stops."""


@dataclass(frozen=True)
class Settings:
    """What is trained, on how much: the defaults are the demo's, tests take less."""

    network: str = "cnn64"
    foundation_images: int = 24_000
    sizes: Sizes = field(default_factory=Sizes)
    foundation: Recipe | None = None  # the network's own where None
    expert: Recipe | None = None

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(
                f"nlm.demo: network must be one of {', '.join(NETWORKS)}, got {self.network!r}"
            )

    @property
    def foundation_recipe(self) -> Recipe:
        return self.foundation or FOUNDATION[self.network]

    @property
    def expert_recipe(self) -> Recipe:
        return self.expert or EXPERT[self.network]


@dataclass(frozen=True)
class Demo:
    """Two foundations of one architecture, and experts fine-tuned from them.

    Attributes
    ----------
    foundations : two networks trained on the same pre-training task from different seeds
    experts : task -> {index of the foundation: expert}; every task has one from foundation 0, each
        second task also one from foundation 1
    tasks : task -> its data, in the order in which tasks are merged
    pretraining : held-out data of the task that both foundations know
    """

    seed: int
    foundations: tuple[nn.Sequential, nn.Sequential]
    experts: dict[str, dict[int, nn.Sequential]]
    tasks: dict[str, Task]
    pretraining: Pretraining


def load(
    seed: int = 0,
    tasks: int = len(TASKS),
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> Demo:
    """Make, or read from the cache, everything the demo merges.

    Parameters
    ----------
    seed : of weights, images and batches
    tasks : how many of `TASKS`, from the first
    progress : called with what is being done and the share done; may raise to stop
    settings : the demo's own where None

    Examples
    --------
    >>> demo = load(seed=0, tasks=4)  # doctest: +SKIP
    >>> demo.experts["upper"][1]  # the expert of "upper" from foundation 1  # doctest: +SKIP
    """
    if not 1 <= tasks <= len(TASKS):
        raise ValueError(f"nlm.demo: tasks must lie in 1..{len(TASKS)}, got {tasks}")
    settings = settings or Settings()
    names = TASKS[:tasks]
    origins = {name: range(1 + position % 2) for position, name in enumerate(names)}
    trainings = sum(len(indices) for indices in origins.values())
    meter = _Meter(
        progress,
        _RENDER_SECONDS + _DRAW_SECONDS + 2 * _FOUNDATION_SECONDS + trainings * _EXPERT_SECONDS,
    )

    meter.start("rendering glyphs", _RENDER_SECONDS)
    glyphs = load_glyphs()
    meter.start("drawing images", _DRAW_SECONDS)
    data = {name: make_task(name, glyphs, seed, settings.sizes) for name in names}
    for task in data.values():
        assert_disjoint(task.images())
    pretraining = make_pretraining(glyphs, seed, settings.sizes)

    trainer = _Trainer(seed, settings, glyphs)
    foundations = []
    for index in range(2):
        report = meter.start(f"training foundation {'AB'[index]}", _FOUNDATION_SECONDS)
        foundations.append(trainer.foundation(index, report))
    experts: dict[str, dict[int, nn.Sequential]] = {name: {} for name in names}
    for name, indices in origins.items():
        for index in indices:
            what = f"training the expert of {name} from foundation {'AB'[index]}"
            report = meter.start(what, _EXPERT_SECONDS)
            experts[name][index] = trainer.expert(data[name], foundations[index], index, report)
    meter.start("trained", 0)
    return Demo(seed, (foundations[0], foundations[1]), experts, data, pretraining)


def load_glyphs() -> Glyphs:
    """The renderings, read from the cache where they are."""
    settings_key = cache.key(revision=_REVISION, faces=FACES, size=FONT_SIZE)
    tensors = cache.remember("glyphs", settings_key, lambda: render().tensors())
    return Glyphs.from_tensors(tensors)


class _Trainer:
    """Trains what the cache lacks. A key covers all that the weights depend on."""

    def __init__(self, seed: int, settings: Settings, glyphs: Glyphs) -> None:
        self._seed = seed
        self._settings = settings
        self._glyphs = glyphs
        self._glyph_digest = cache.digest(glyphs.tensors())

    def foundation(self, index: int, report: Callable[[float], None]) -> nn.Sequential:
        network = self._settings.network
        images = self._settings.foundation_images
        recipe = self._settings.foundation_recipe

        def train() -> Mapping[str, Tensor]:
            return train_foundation(
                network, self._glyphs, images, recipe, self._seed, index, report
            ).state_dict()

        name = f"{network}-seed{self._seed}-foundation-{'ab'[index]}"
        tensors = cache.remember(name, cache.key(**self._foundation_settings(index)), train)
        model = NETWORKS[network](len(self._glyphs.alphabets["pretraining"]))
        model.load_state_dict(tensors)
        return model

    def expert(
        self,
        task: Task,
        foundation: nn.Sequential,
        index: int,
        report: Callable[[float], None],
    ) -> nn.Sequential:
        network = self._settings.network
        recipe = self._settings.expert_recipe

        def train() -> Mapping[str, Tensor]:
            return train_expert(
                network, foundation, task, recipe, self._seed, index, report
            ).state_dict()

        name = f"{network}-seed{self._seed}-expert-{task.name}-{'ab'[index]}"
        settings_key = cache.key(
            foundation=self._foundation_settings(index),
            task=task.name,
            images=self._settings.sizes.train,
            recipe=asdict(recipe),
        )
        model = NETWORKS[network](len(task.classes))
        model.load_state_dict(cache.remember(name, settings_key, train))
        return model

    def _foundation_settings(self, index: int) -> dict[str, object]:
        return {
            "revision": _REVISION,
            "glyphs": self._glyph_digest,
            "network": self._settings.network,
            "images": self._settings.foundation_images,
            "recipe": asdict(self._settings.foundation_recipe),
            "seed": self._seed,
            "index": index,
        }


class _Meter:
    """Turns progress within one piece of work into the share of all work."""

    def __init__(self, progress: Progress | None, total: float) -> None:
        self._progress = progress
        self._total = total
        self._begun = 0.0

    def start(self, what: str, weight: float) -> Callable[[float], None]:
        """Begin a piece of work; the returned function takes the share of it that is done."""
        base = self._begun
        self._begun += weight

        def report(share: float) -> None:
            if self._progress is not None:
                self._progress(what, (base + share * weight) / self._total)

        report(0.0)
        return report
