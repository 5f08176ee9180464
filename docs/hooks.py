"""Hooks of mkdocs: pages of a folder in the navigation, the roles of docstrings as links, and
pictures that open in their own size."""

import re
import runpy
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLACE = runpy.run_path(str(HERE / "reference.py"))["place"]
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|obj|exc):<code>~?([\w.]+)</code>")
_PICTURE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*/?>')


def on_config(config: Any) -> Any:
    """``folder/*`` in the navigation stands for the folder's pages, index first."""
    for section in config.nav:
        for title, value in section.items():
            if isinstance(value, str) and value.endswith("/*"):
                folder = HERE / value[:-2]
                pages = sorted(folder.glob("*.md"), key=lambda p: (p.stem != "index", p.stem))
                section[title] = [str(page.relative_to(HERE)) for page in pages]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """:func:`name` becomes a link where the name has an entry, and code where it has none."""
    html = _PICTURE.sub(r'<a class="picture" href="\1">\g<0></a>', html)
    return _ROLE.sub(_link, html)


def _link(role: re.Match[str]) -> str:
    return f'<autoref identifier="{PLACE(role[1])}" optional><code>{role[1]}</code></autoref>'
