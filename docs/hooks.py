"""Hooks of mkdocs: pages of a folder in the navigation, and the roles of docstrings as links."""

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|obj|exc):<code>~?([\w.]+)</code>")


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
    return _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
