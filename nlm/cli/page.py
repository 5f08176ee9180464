"""A page of HTML that needs no other file, from a template and values; all text is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nlm import __version__


def page(template: str, **values: Any) -> str:
    """The page that a template of ``nlm/cli/templates`` makes of values."""
    environment = Environment(
        loader=PackageLoader("nlm.cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(version=__version__, **values)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a pair of UTF-16 is no text
