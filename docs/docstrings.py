"""An extension of griffe: ``name : what it is``, on one line, is a description and no type; the
parts of an operation's text (bytes, flops, numerics, source) begin paragraphs of their own."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(Parameters|Attributes|Other Parameters)\n-+\n", re.MULTILINE)
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*) : (.+)$")
_PART = re.compile(r"\s(Bytes|Flops|Numerics|Sources?): ")
_TYPE = re.compile(r"^\(?(Tensor|int|float|str|bool|dict|list|tuple|sequence|array)\b[^.;]{0,60}$")


class House(griffe.Extension):
    """Rewrites the sections of docstrings in which each line begins with a name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
            if obj.is_module and obj.path.startswith("nlm.ops."):
                obj.docstring.value = _PART.sub(r"\n\n**\1:** ", obj.docstring.value)


def rewritten(text: str) -> str:
    """The docstring with descriptions below their names."""
    found = _SECTION.search(text)
    if found is None:
        return text
    head, rest = text[: found.end()], text[found.end() :]
    lines: list[str] = []
    body = rest.split("\n")
    for number, line in enumerate(body):
        if number + 1 < len(body) and re.match(r"^-{3,}$", body[number + 1]):
            tail = "\n".join(body[number:])  # the next section
            return head + "\n".join(lines) + "\n" + rewritten(tail)
        entry = _ENTRY.match(line)
        if entry and not _TYPE.match(entry[2]):
            lines += [entry[1], f"    {entry[2]}"]
        else:
            lines.append(line)
    return head + "\n".join(lines)
