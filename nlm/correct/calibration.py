"""How many samples a correction needs: fits on 8, 16, 32, ... samples beside that on all of them.

At a channel whose corrected activations a have the expert's mean m and variance v, the correction
(s', t') of fewer samples makes of a, which is s x + t,

    r a + t' - r t,  r = s' / s,    off by  (r - 1)^2 v + ((r - 1) m + t' - r t)^2   on average,

which is measured as a share of v; it falls with the number of samples n as 1 / n.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nlm.correct.fitting import ExpertMoments, check_tasks, expert_moments
from nlm.correct.tact import Tact
from nlm.statistics import Data, Moments
from nlm.statistics.data import batches, sample_count

CALLER = "nlm.calibration_size"


@dataclass(frozen=True)
class CalibrationSize:
    """Samples per task -> how far their correction is from that of the most samples.

    Attributes
    ----------
    smallest : the fewest samples within the tolerance, from which on all are.
    distance : samples -> root mean square distance of the corrected activations, in standard
        deviations of the expert's, over channels, points and tasks. That of the most is 0.
    """

    smallest: int
    distance: dict[int, float]


def calibration_size(
    model: nn.Module,
    experts: Mapping[str, nn.Module],
    data: Mapping[str, Data],
    *,
    max_samples: int = 128,
    tolerance: float = 0.1,
    **options: Any,
) -> CalibrationSize:
    """The fewest samples per task whose corrections are those of ``max_samples``, nearly.

    Parameters
    ----------
    model, experts, data, options : as for :meth:`Tact.fit`, which is run for 8, 16, 32, ... samples
        below ``max_samples``, or all that there are, and for these: as many forward passes as two
        fits of that size.
    tolerance : the greatest distance that counts as none. On the glyph networks of the demo it is
        .29 at 8 samples, .12 at 32 and .08 at 64, and accuracy rises up to 32.

    Raises
    ------
    TypeError, ValueError
        As :meth:`Tact.fit` does.
    """
    check_tasks(CALLER, model, experts, data)
    given = [batches(of, max_samples, caller=CALLER) for of in data.values()]
    max_samples = max(sum(sample_count(batch, CALLER) for batch in of) for of in given)
    most = Tact.fit(model, experts, data, max_samples=max_samples, **options)
    left = {name: value for name, value in options.items() if name in ("forward", "mask", "device")}
    moments = expert_moments(experts, data, points=most.points, max_samples=max_samples, **left)
    distance = {}
    size = 8
    while size < max_samples:
        fewer = Tact.fit(model, experts, data, max_samples=size, **options)
        distance[size] = _distance(fewer, most, moments)
        size *= 2
    distance[max_samples] = 0.0
    within = [each for each in distance if distance[each] <= tolerance]
    smallest = next(
        each
        for each in within
        if all(distance[more] <= tolerance for more in distance if more > each)
    )
    return CalibrationSize(smallest, distance)


def _distance(fewer: Tact, most: Tact, moments: ExpertMoments) -> float:
    total = count = 0.0
    for point in most.points:
        for row, task in enumerate(most.tasks):
            pair = [[part[row] for part in each.correction(point)] for each in (fewer, most)]
            share = _share(pair[0], pair[1], moments[task][point])
            total, count = total + float(share.sum()), count + len(share)
    return math.sqrt(total / count) if count else 0.0


def _share(fewer: list[Tensor], most: list[Tensor], target: Moments) -> Tensor:
    """The mean square distance as a share of the variance, of the channels that vary."""
    (scale, shift), (fewer_scale, fewer_shift) = most, fewer
    alive = (target.variance > 0) & (scale != 0)
    ratio = fewer_scale[alive].double() / scale[alive].double()
    mean, variance = target.mean[alive], target.variance[alive]
    off = (ratio - 1) * mean + fewer_shift[alive].double() - ratio * shift[alive].double()
    return (ratio - 1).square() + off.square() / variance
