"""Files made malformed: by bytes, by parts of the JSON in them, by the framing of their format.

What is done is chosen by numbers that a caller draws: by hypothesis, or by a fuzzer that is guided
by coverage (``benchmarks/experiments/fuzzing.py``).
"""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

_DEEP = "nested deeply"

Draw = Callable[[int, int], int]
"""A number from the first to the second, both included."""

_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**31, 2**63, 2**70, -(2**70), 1e308, -0.5, float("nan"), float("inf"),
    "", "a", "0", "g0", "__metadata__", "../a", "\ud800", "\x00", "é" * 40, [], [[]], {}, {"a": 1},
    [0] * 40, "g0:8 x ", "<script>", "1e9", "F32", "I64",
)  # fmt: skip
_TOKENS = tuple(
    b"\x00 \xff \n : - [ ] { } , \" ' & * & ! | > % @ ` << #  \\ 1e999 0x .inf .nan ~ null true"
    b" !!python/object:os.system !!binary &a *a ?".split(b" ")
)


def mutated(content: bytes, form: str, draw: Draw) -> bytes:
    """A file, changed once to four times: "text", "lines", "json", "safetensors" or "zip"."""
    for _ in range(draw(1, 4)):
        content = _FORMS[form](content, draw)
    return content


def rewritten(content: bytes, form: str) -> bytes:
    """Other bytes that say the same: what reads a file of the form has to read them."""
    if form == "text":
        return b"# another writing\n" + content + b"\n\n"
    if form == "lines":
        return b"\n" + content + b"\n\n"
    if form == "json":
        return _reordered(content)
    if form == "safetensors":  # padded with spaces, as the format allows
        length = int.from_bytes(content[:8], "little")
        header = _reordered(content[8 : 8 + length])
        header += b" " * (-len(header) % 8 + 8)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    made = io.BytesIO(content)  # what lies where is part of PyTorch's format: not packed again
    with zipfile.ZipFile(made, "a") as archive:
        archive.comment = b"another writing"
    return made.getvalue()


def _reordered(content: bytes) -> bytes:
    """A JSON object with its keys in another order, and as many spaces as there may be."""
    tree = json.loads(content)
    return json.dumps(dict(reversed(tree.items())), indent=3).encode()


def _bytes(content: bytes, draw: Draw) -> bytes:
    """Somewhere a byte, a token or a stretch is changed, put in, doubled or left out."""
    at = draw(0, len(content))
    end = min(len(content), at + draw(0, 24))
    put = (
        bytes([draw(0, 255)]),
        _TOKENS[draw(0, len(_TOKENS) - 1)],
        content[at:end] * draw(0, 4),
        b"",
    )[draw(0, 3)]
    if draw(0, 15) == 0:
        return content[:at]
    return content[:at] + put + content[end if draw(0, 1) else at :]


def _json(content: bytes, draw: Draw) -> bytes:
    """One part of a JSON text is another value, or gone, or nested deeply; or it is bytes."""
    try:
        tree = json.loads(content)
        if draw(0, 3) == 0:
            return _bytes(content, draw)
        text = json.dumps(_changed(tree, draw)).replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000)
    except (ValueError, RecursionError):
        return _bytes(content, draw)
    return text.encode()


def _changed(tree: Any, draw: Draw) -> Any:
    if isinstance(tree, str) and tree[:1] in ("{", "[") and draw(0, 7):
        return _json(tree.encode("utf-8", "surrogatepass"), draw).decode("utf-8", "replace")
    inner = isinstance(tree, (dict, list)) and len(tree) > 0
    if not inner or draw(0, 7) == 0:
        return _STRANGE[draw(0, len(_STRANGE) - 1)]
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[draw(0, len(keys) - 1)]
    if keys[0] == "__metadata__" and draw(0, 1):
        key = keys[0]
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    what = draw(0, 7)
    if what == 0:
        del tree[key]
    elif what == 1 and isinstance(tree, dict):
        tree[str(_STRANGE[draw(0, len(_STRANGE) - 1)])] = tree.pop(key)
    elif what == 2:
        tree[key] = _DEEP
    elif what == 3:
        tree[key] = tree[keys[draw(0, len(keys) - 1)]]
    else:
        tree[key] = _changed(tree[key], draw)
    return tree


def _safetensors(content: bytes, draw: Draw) -> bytes:
    """Another header in a frame that fits it, other data, or other bytes."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8 or draw(0, 7) == 0:
        return _bytes(content, draw)
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw(0, 7):
        header = _json(header, draw)
    elif draw(0, 3) == 0:
        data = _bytes(data, draw)
    elif data:
        at, put = draw(0, len(data) - 1), (b"\xff" * 8, b"\x00" * 8, b"\x7f")[draw(0, 2)]
        data = (data[:at] + put + data[at + len(put) :])[: len(data)]
    return len(header).to_bytes(8, "little") + header + data


def _zip(content: bytes, draw: Draw) -> bytes:
    """Other bytes in one file of an archive: where it lies (PyTorch looks at no sum), or packed
    again with the sum that fits them; or bytes anywhere."""
    what = draw(0, 5)
    if what == 0:
        return _bytes(content, draw)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if what > 2:
                return _within(content, archive.infolist(), draw)
            parts = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # whatever zipfile says of a broken one
        return _bytes(content, draw)
    pickles = [name for name in parts if name.endswith(".pkl")]
    names = pickles if pickles and draw(0, 3) else list(parts)
    if not names:
        return _bytes(content, draw)
    name = names[draw(0, len(names) - 1)]
    parts[name] = _bytes(parts[name], draw)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for each, part in parts.items():
            archive.writestr(each, part)
    return made.getvalue()


def _within(content: bytes, files: list[zipfile.ZipInfo], draw: Draw) -> bytes:
    """One to four other bytes in a file of an archive, mostly the first one, a pickle."""
    chosen = files[draw(0, len(files) - 1) if draw(0, 3) == 0 else 0]
    first = content.find(chosen.filename.encode(), chosen.header_offset) + len(chosen.filename)
    changed = bytearray(content)
    for _ in range(draw(1, 4)):
        at = first + draw(0, chosen.file_size)
        if at < len(changed):
            changed[at] = draw(0, 255)
    return bytes(changed)


_FORMS = {"text": _bytes, "lines": _bytes, "json": _json, "safetensors": _safetensors, "zip": _zip}
