"""From a configuration alone: the specification of a Hugging Face model, without its weights.

The model is built on meta tensors, which have shapes and no memory, and traced with inputs made
from its configuration. Nothing is downloaded, and nothing can be proven on a model without weights:
:meth:`nlm.PermutationSpec.verify` on the real one, or ``nlm.align`` with data, does that.
"""

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlm.symmetry import shipped
from nlm.symmetry.cache import fingerprint, remember
from nlm.symmetry.spec import PermutationSpec
from nlm.symmetry.trace import trace

_BATCH = 2
_TOKENS = 17
_IMAGE = 64  # pixels, where the configuration does not say
_MAIN_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")


def trace_config(
    source: Any,
    model_class: type[nn.Module] | str | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
    cache: bool = True,
) -> PermutationSpec:
    """Finds what may be permuted in a Hugging Face model from its configuration.

    Parameters
    ----------
    source : a folder with a config.json, that file, an id in the local cache, or a configuration.
    model_class : a class of transformers, or its name; by default the first of the configuration's
        ``architectures``, else what ``AutoModel`` chooses.
    example_inputs : the keyword arguments of a forward pass; by default made from the
        configuration. Their values do not matter, their shapes hardly.
    outputs : names of the outputs that count.
    cache : reuse what was found before for the same configuration, class and versions.

    Returns
    -------
    PermutationSpec
        Not proven: it has seen no weights.

    Raises
    ------
    FileNotFoundError
        There is no such configuration on this machine.
    ImportError
        transformers is not installed.
    ValueError
        The configuration is not understood, or the inputs cannot be made from it.
    """
    model = build_model(source, model_class, "meta")
    kwargs = dict(example_inputs or make_inputs(model))

    def make() -> PermutationSpec:
        try:
            return trace(model, (), kwargs, outputs)
        except ValueError as error:
            if example_inputs is not None or outputs is not None:
                raise
            raise ValueError(f"{error} (example_inputs replace {_described(kwargs)})") from error

    if not cache:
        return make()
    key = fingerprint(model, kwargs, outputs)
    file = shipped.find(key)
    return remember(key, make) if file is None else PermutationSpec.load(file)


def fingerprint_of(source: Any) -> str:
    """Under what a configuration's specification is kept, with the inputs made from it."""
    model = build_model(source, device="meta")
    return fingerprint(model, make_inputs(model), None)


def build_model(
    source: Any, model_class: type[nn.Module] | str | None = None, device: str = "cpu"
) -> nn.Module:
    """The model of a configuration with random weights (seed 0), or none on the device "meta".

    Experts are computed by batched products: the default implementation sorts tokens by expert,
    which hides that experts may be permuted. What may be permuted is the same for both.
    """
    config = copy.deepcopy(read_config(source))
    chosen = _class_of(config, model_class)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        if isinstance(chosen, type) and issubclass(chosen, nn.Module):
            config._experts_implementation = "batched_mm"
            model = chosen(config)
        else:
            model = chosen.from_config(config, experts_implementation="batched_mm")
    return model.to(device).eval()  # a few parameters ignore the device they are made under


def load_model(
    source: str,
    model_class: str | None = None,
    random: bool = False,
    *,
    config: Any = None,
    dtype: torch.dtype | str = torch.float32,
    plain: bool = False,
) -> nn.Module:
    """The model of a folder or an id with its weights in float32, in evaluation mode.

    Parameters
    ----------
    random : draw the weights where there are none.
    config : another configuration than the folder's: of the same network with another head, whose
        weights are drawn.
    dtype : another type; "auto" is that of the file.
    plain : leaves experts computed as transformers would, see :func:`build_model`.

    Raises
    ------
    FileNotFoundError
        There are no weights, and ``random`` is false.
    """
    own: dict[str, Any] = {} if config is None else {"config": copy.deepcopy(config)}
    own |= {} if plain else {"experts_implementation": "batched_mm"}
    chosen = _class_of(config or read_config(source), model_class)
    folder = Path(source).parent if Path(source).is_file() else source
    try:
        with quiet(config is not None):
            model = chosen.from_pretrained(folder, local_files_only=True, dtype=dtype, **own)
    except OSError as error:
        if random:
            return build_model(source, model_class)
        raise FileNotFoundError(
            f"nlm spec: a specification is proven on weights (or on random ones: --random), got "
            f"none in {str(source)!r}"
        ) from error
    return model.eval()


def read_config(source: Any) -> Any:
    """The configuration of a folder, a file or an id in the local cache; one that is one already.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        See :func:`trace_config`.
    """
    transformers = _transformers()
    if isinstance(source, transformers.PretrainedConfig):
        return source
    name = os.fspath(source)
    try:
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise FileNotFoundError(name)
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"nlm.trace_config: a source is a folder with config.json, or an id in the local cache "
            f"of Hugging Face (nothing is downloaded), got {name!r}"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"nlm.trace_config: a config.json names a model_type that transformers "
            f"{transformers.__version__} knows, got {_model_type(name)}{name!r}"
        ) from error


def _model_type(folder: str) -> str:
    """What a configuration says that its model is, for a message."""
    from nlm.checkpoint.headers import read_config as read_file

    try:
        found = (read_file(Path(folder)) or {}).get("model_type")
    except (OSError, ValueError):
        return ""
    return f"{found!r} in " if found else ""


def entry_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What a model calls the entries of its files; transformers renames some as it reads them.

    Parameters
    ----------
    model : with or without weights. names : as they stand in the files.

    Raises
    ------
    ValueError
        An entry that is none of the model's, or only together with others.
    """
    entries = model.state_dict().keys()
    found = {name: name for name in names}
    if not (left := [name for name in found if name not in entries]):
        return found
    rename = _renaming(model, entries)
    for name in left:
        found[name] = rename(name)
        if found[name] not in entries:
            raise ValueError(
                f"nlm: the entries of a model's files are those of its class one by one, got "
                f"{name!r}, which is none of {type(model).__name__}"
            )
    return found


def _renaming(model: Any, entries: Iterable[str]) -> Callable[[str], str]:
    """What transformers makes of a name, from version 5 on."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    known = dict.fromkeys(entries, True)
    prefix = getattr(model, "base_model_prefix", None)
    return lambda name: str(rename_source_key(name, renamings, [], prefix, known)[0])


def make_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for a forward pass of a Hugging Face model, on its device.

    Tokens, pixels, spectra or waves by what ``forward`` takes, in the sizes of the configuration.

    Raises
    ------
    ValueError
        ``forward`` needs something else.
    """
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    text_alone = "use_cache" in parameters and not getattr(config, "is_encoder_decoder", False)
    for name in _MAIN_INPUTS:
        if name in parameters and not (text_alone and "input_ids" in inputs):
            shape = _SHAPES[name](config)
            if name == "input_ids":
                inputs[name] = _tokens(config, shape, generator)
            else:
                inputs[name] = torch.randn(shape, generator=generator)
    if "attention_mask" in parameters and "input_ids" in inputs and "use_cache" not in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = _tokens(config, (_BATCH, 5), generator)
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in inputs
    ]
    if missing or not any(name in inputs for name in _MAIN_INPUTS):
        raise ValueError(
            f"nlm.trace_config: inputs are made for models that take {', '.join(_MAIN_INPUTS)}; "
            f"give example_inputs, got {type(model).__name__}, which takes "
            f"{', '.join(missing or parameters)}"
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "nlm.trace_config: a Hugging Face configuration needs transformers, got no such "
            "package: pip install nlm[hf]"
        ) from error
    return transformers


@contextmanager
def quiet(warnings: bool = False) -> Iterator[None]:
    """Keeps transformers' bars for weights off the terminal, and ``warnings`` too, of weights that
    are drawn where they are meant to be."""
    logging = _transformers().utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _class_of(config: Any, wanted: type[nn.Module] | str | None) -> Any:
    """The class to build: that of a name, of the configuration, or transformers' AutoModel."""
    transformers = _transformers()
    if isinstance(wanted, type):
        return wanted
    named = wanted or next(iter(getattr(config, "architectures", None) or ()), None)
    if named is None:
        return transformers.AutoModel
    found = getattr(transformers, named, None)
    if found is None:
        raise ValueError(
            f"nlm.trace_config: the class is one of transformers {transformers.__version__}, got "
            f"{named!r}"
        )
    return found


def _described(inputs: Mapping[str, Any]) -> str:
    """Inputs by their shapes."""
    return ", ".join(
        f"{name} {list(value.shape) if isinstance(value, Tensor) else value}"
        for name, value in inputs.items()
    )


def _setting(config: Any, *names: str) -> Any:
    """The first of the named settings of a configuration, or of a part of it; None without any."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    parts = (part for part in vars(config).values() if hasattr(part, "to_diff_dict"))
    return next((value for part in parts if (value := _setting(part, *names)) is not None), None)


def _tokens(config: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Tokens of the vocabulary, not among the first, which have special meanings; the last is the
    one that ends a text, behind which CLIP would read nothing.
    """
    size = _setting(config, "vocab_size", "input_vocab_size") or 2
    tokens = torch.randint(min(4, size - 1), size, shape, generator=generator)
    end = _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < size:
        tokens[:, -1] = end
    return tokens


def _text_shape(config: Any) -> tuple[int, ...]:
    positions = _setting(config, "max_position_embeddings", "n_positions") or _TOKENS + 2
    return _BATCH, max(min(_TOKENS, positions - 2), 1)


def _image_shape(config: Any) -> tuple[int, ...]:
    size = _setting(config, "image_size") or _IMAGE
    height, width = (size, size) if isinstance(size, int) else (*size,)[:2]
    frames = _setting(config, "num_frames")
    channels = _setting(config, "num_channels") or 3
    return _BATCH, *(() if frames is None else (frames,)), channels, height, width


def _spectrum_shape(config: Any) -> tuple[int, ...]:
    """[batch, mel bins, frames] as Whisper takes it, [batch, frames, features] otherwise."""
    if features := _setting(config, "input_feat_per_channel", "feature_projection_input_dim"):
        return _BATCH, 8 * _TOKENS, features
    return (
        _BATCH,
        _setting(config, "num_mel_bins") or 80,
        2 * (_setting(config, "max_source_positions") or 4 * _TOKENS),
    )


def _wave_shape(config: Any) -> tuple[int, ...]:
    """[batch, frames, mel bins], [batch, channels, samples] of a codec, or [batch, samples]."""
    frames, bins = _setting(config, "max_length"), _setting(config, "num_mel_bins")
    if frames and bins:
        return _BATCH, frames, bins
    if _setting(config, "codebook_size"):
        return _BATCH, _setting(config, "audio_channels") or 1, 320 * _TOKENS
    strides = _setting(config, "conv_stride") or (320,)
    return _BATCH, 400 + _TOKENS * math.prod(strides)


_SHAPES = {
    "input_ids": _text_shape,
    "pixel_values": _image_shape,
    "input_features": _spectrum_shape,
    "input_values": _wave_shape,
}
