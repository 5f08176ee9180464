"""A LoRA adapter in the order of units of another base model.

An adapter adds B A to a weight [out, in], of rank r. Where the weight's rows are gathered by p and
its columns by q, so are the rows of B [out, r] and the columns of A [r, in]: what stands along an
axis of the base's weight stands along one axis of one factor. The specification of the base gives
one of the adapter, whose parameters are the adapter's own entries, and that is applied.

    lora_A          [r, in] and kernel           lora_embedding_A         [r, tokens]
    lora_B          [out, r] and kernel          lora_embedding_B         [dim, r]
    lora_B.bias     [out]                        lora_magnitude_vector    [out] or [1, out, 1, 1]
    what is saved whole, and biases, as in the base; trained tokens are rows of their embedding

Hu et al.: LoRA, arXiv:2106.09685. Liu et al.: DoRA, arXiv:2402.09353.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nlm.checkpoint import atomic_path, read_tensors, write_tensors
from nlm.checkpoint.texts import DamagedFileError, parse_json
from nlm.integrations._host import permutation_of
from nlm.symmetry import PermutationSpec, pretrained, stacks
from nlm.symmetry.layout import Fixed, Layout

if TYPE_CHECKING:
    from nlm.align import AlignmentResult
    from nlm.symmetry import Permutation

_WHERE = "nlm.integrations.peft"
_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector", "token_adapter.trainable_tokens_delta",
)  # fmt: skip
_WRAPPERS = ("base_layer", "modules_to_save", "original_module")
#: they change the base's weights as they begin, by what they compute from them
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Layouts = tuple[Layout, ...]


def align_adapter(
    adapter: Mapping[str, Tensor] | str | os.PathLike[str],
    alignment: "AlignmentResult | Permutation | str | os.PathLike[str]",
    spec: PermutationSpec | str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    fan_in_fan_out: bool | None = None,
    force: bool = False,
) -> dict[str, Tensor]:
    """Moves a LoRA adapter of one base model to the order of units of another.

    With P the permutation and B the base that the adapter was trained on, P(B) with the result
    computes what B computes with the adapter. Aligned with A, P(B) is near A, and so the result is
    an adapter for A.

    Parameters
    ----------
    adapter : a folder as ``save_pretrained`` writes it (adapter_config.json and
        adapter_model.safetensors), or a state dict as ``get_peft_model_state_dict`` returns it.
    alignment : of A with B: what ``nlm align A B`` wrote or ``nlm.align`` returned, or a
        permutation. Not an orthogonal one, which is no permutation alone.
    spec : the specification that the alignment is of, its file, or a shipped name; by default, for
        a folder, found in the configuration of the base model that the folder names.
    output : a folder to write the moved adapter to, with its configuration: for an adapter from a
        folder.
    base_model : what the written configuration names as its base: A's folder or id. By default the
        name stays that of B.
    fan_in_fan_out : whether layers whose weight is square and without a bias store it as [in, out],
        the others show it by their shapes and biases. By default as the configuration says, else
        not.
    force : overwrite files in ``output``.

    Returns
    -------
    dict of str to Tensor
        The adapter's entries, in their order, shapes and types; contiguous.

    Raises
    ------
    ValueError
        An adapter that is no LoRA, or one that changed its base's weights as it began (PiSSA,
        OLoRA, CorDA, LoftQ, LoRA-GA: ``save_pretrained`` can convert them to plain LoRA); an entry
        that is not understood or not in the specification; sizes that do not fit; no specification.
    FileExistsError
        The output holds an adapter, and ``force`` is false.
    FileNotFoundError
        The folder holds no such files.
    """
    config: dict[str, Any] = {}
    if isinstance(adapter, Mapping):
        state = dict(adapter)
        if output is not None:
            raise ValueError(
                f"{_WHERE}: an adapter is written to a folder with its configuration, which a "
                f"state dict lacks, got output={str(output)!r}"
            )
    else:
        config = _read_config(Path(adapter))
        state, _ = read_tensors(Path(adapter) / _WEIGHTS)
    _check_output(output, force)
    if spec is None:
        if not config.get("base_model_name_or_path"):
            raise ValueError(
                f"{_WHERE}: an adapter that names no base model needs a specification, got none"
            )
        spec = pretrained.trace_config(config["base_model_name_or_path"])
    elif not isinstance(spec, PermutationSpec):
        spec = PermutationSpec.load(spec)
    if fan_in_fan_out is None:
        fan_in_fan_out = bool(config.get("fan_in_fan_out", False))
    permutation = permutation_of(_WHERE, alignment)
    moved = adapter_spec(spec, state, fan_in_fan_out).apply(permutation, state)
    if output is not None:
        folder = Path(output)
        folder.mkdir(exist_ok=True)
        if base_model is not None:
            config |= {"base_model_name_or_path": os.fspath(base_model), "revision": None}
        write_tensors(folder / _WEIGHTS, moved, {"format": "pt"}, force)
        with atomic_path(folder / _CONFIG, force) as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return moved


def adapter_spec(
    spec: PermutationSpec, adapter: Mapping[str, Tensor], fan_in_fan_out: bool = False
) -> PermutationSpec:
    """What may be permuted in an adapter of a base model.

    Parameters
    ----------
    spec : of the base. adapter : its state dict. fan_in_fan_out : see :func:`align_adapter`.

    Raises
    ------
    ValueError
        An entry that is not understood or not in the specification, or experts in a list of which
        some have adapters and some have none.
    """
    owners = stacks.stack_of(spec.stacks)
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in adapter.items():
        module, part = _split(key)
        modules[module][part] = tensor
    params: dict[str, Layouts] = {}
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for key in adapter:
        module, part = _split(key)
        entry = part if not module else f"{module}.weight"
        owner = owners.get(entry, entry)
        if owner not in spec.params:
            raise ValueError(
                f"{_WHERE}: an adapter's entries belong to parameters of the specification, got "
                f"{key!r}, and no {entry!r}"
            )
        layouts = spec.params[owner]
        outer, own = (layouts[:1], layouts[1:]) if owner in spec.stacks else ((), layouts)
        if module:
            bias = spec.params.get(f"{owner.removesuffix('weight')}bias", ())
            own = _of_part(part, modules[module], own, bias[len(outer) :], fan_in_fan_out)
        if outer:
            members[f"{owner}:{part}" if module else owner][entry] = key
            params[f"{owner}:{part}" if module else owner] = outer + own
        else:
            params[key] = own
    of = {}
    for role, keys in members.items():
        entries = spec.stacks[role.partition(":")[0]]
        if missing := [entry for entry in entries if entry not in keys]:
            raise ValueError(
                f"{_WHERE}: of experts that may be exchanged all have adapters, or none has, got "
                f"none for {missing[0]!r} beside {next(iter(keys.values()))!r}"
            )
        of[role] = tuple(keys[entry] for entry in entries)
    return replace(spec, params=params, stacks=of, sites={}, verified=None)


def _split(key: str) -> tuple[str, str]:
    """The module that an entry adapts and what the entry is of it; for one that stands in for the
    base's own, no module and the base's name.
    """
    name = key.removeprefix(_PREFIX)
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    if unknown := [each for each in name.split(".") if each.startswith("lora_")]:
        raise ValueError(
            f"{_WHERE}: an adapter's entries end in {', '.join(_PARTS)}, or are the base's, got "
            f"{unknown[0]!r} in {key!r}"
        )
    kept = (each for each in name.split(".") if each not in _WRAPPERS)
    return "", ".".join(kept)


def _of_part(
    part: str, of: Mapping[str, Tensor], weight: Layouts, bias: Layouts, fan_in_fan_out: bool
) -> Layouts:
    """The layouts of one part of an adapted module, from those of the weight."""
    tensor = of[part]
    if part == "token_adapter.trainable_tokens_delta":
        return Fixed(tensor.shape[0]), weight[1]
    rank = Fixed(tensor.shape[1] if part in ("lora_B.weight", "lora_embedding_B") else len(tensor))
    if "lora_embedding_A" in of or "lora_embedding_B" in of:
        tokens, width = weight
        known = {"lora_embedding_A": (rank, tokens), "lora_embedding_B": (width, rank)}
        return known.get(part, (width,))
    rows, columns, *kernel = weight
    if not kernel and _is_transposed(of, weight, bias, fan_in_fan_out):
        rows, columns = columns, rows
    if part == "lora_A.weight":
        return rank, columns, *kernel
    if part == "lora_B.weight":
        return rows, rank, *(Fixed(size) for size in tensor.shape[2:])
    if tensor.dim() == 1:
        return (rows,)
    return Fixed(1), rows, *(Fixed(size) for size in tensor.shape[2:])


def _is_transposed(
    of: Mapping[str, Tensor], weight: Layouts, bias: Layouts, fan_in_fan_out: bool
) -> bool:
    """Whether a weight is [in, out]: said by its shape, else by its bias, else by the caller."""
    first, second = weight
    if first.size != second.size:
        a, b = of.get("lora_A.weight"), of.get("lora_B.weight")
        as_is = (a is not None and a.shape[1] == second.size) or (
            b is not None and b.shape[0] == first.size
        )
        return not as_is and (a is None or a.shape[1] == first.size)
    if bias and first != second:
        return bias == (second,)
    return fan_in_fan_out


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that can be moved."""
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{_WHERE}: an adapter is a folder with {_CONFIG} and {_WEIGHTS}, got {str(folder)!r}"
        )
    try:
        config = parse_json((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(folder, f"a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{_WHERE}: an adapter that is moved is of the type LORA, got "
            f"{config.get('peft_type')!r} in {str(folder)!r}"
        )
    begins = str(config.get("init_lora_weights", True)).lower()
    if begins.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{_WHERE}: an adapter that is moved left its base's weights as they were, got one "
            f"that began by {begins!r}: convert it to plain LoRA as it is saved"
        )
    for setting in ("layer_replication", "target_parameters"):
        if config.get(setting):
            raise ValueError(
                f"{_WHERE}: an adapter that is moved adapts modules of the base as they are, got "
                f"{setting}={config[setting]!r}"
            )
    return config


def _damaged(folder: Path, said: str) -> DamagedFileError:
    return DamagedFileError(
        f"{_WHERE}: an adapter's configuration is a mapping in JSON, got "
        f"{str(folder / _CONFIG)!r} ({' '.join(said.split())})"
    )


def _check_output(output: str | os.PathLike[str] | None, force: bool) -> None:
    """Raises before any work where the output cannot be written."""
    if output is None:
        return
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{_WHERE}: the output is a folder, got the file {str(folder)!r}")
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"{_WHERE}: the folder of the output must exist, got {str(folder.parent)!r}"
        )
    there = [name for name in (_CONFIG, _WEIGHTS) if (folder / name).exists()]
    if there and not force:
        raise FileExistsError(
            f"{_WHERE}: an adapter is overwritten only with force, got {str(folder / there[0])!r}"
        )
