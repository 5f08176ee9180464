"""Small networks of many families, each with what discovery must find in it at least.

``ZOO[name]()`` makes a network with random weights, its arguments and its keyword arguments.
``FLOORS[name]`` is the least number of independent permutations and the least fraction of the
parameters that they move, ``UNREAD[name]`` what stays because nothing reads it.
"""

from symmetry.zoo import (
    _blocks,
    _convolutional,
    _decoders,
    _dense,
    _encoders,
    _ideas,
    _mixing,
    _others,
    _recurrent,
    _speech,
    _translators,
    _vision,
    _vision_transformers,
)
from symmetry.zoo._floors import FLOORS, UNREAD

ZOO = {
    **_dense.ZOO,
    **_recurrent.ZOO,
    **_convolutional.ZOO,
    **_blocks.ZOO,
    **_ideas.ZOO,
    **_mixing.ZOO,
    **_encoders.ZOO,
    **_decoders.ZOO,
    **_translators.ZOO,
    **_vision_transformers.ZOO,
    **_vision.ZOO,
    **_speech.ZOO,
    **_others.ZOO,
}

__all__ = ["FLOORS", "UNREAD", "ZOO"]
