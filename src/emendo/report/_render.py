"""Self-contained HTML pages in one style; they load nothing from anywhere. The only module that imports Jinja."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from emendo.report import tables
from emendo.report.plots import INK

_HOME = "emendo.report"
"""The package that holds ``page.css``, which every template includes."""


def render_page(template: str, package: str = _HOME, **values: Any) -> str:
    """A page as text.

    Args:
        template: file name of the template.
        package: the package that holds it.
        **values: the template's values; text is escaped.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in dict.fromkeys((package, _HOME))]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": tables.number,
        "share": tables.share,
        "chance": tables.chance,
        "size": tables.size,
        "seconds": tables.seconds,
        "interval": lambda value: tables.show_value(value, "interval")[1].strip("()"),
        "table": lambda table: Markup(tables.to_html(table)),
    }
    return environment.get_template(template).render(**values)


def inline(svg: bytes) -> Markup:
    """An SVG document as part of a page: without prologue, metadata and namespaces, in the page's text colour."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*pt"\s', r"\1 ", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*pt"\s', r"\1 ", text, count=1)
    return Markup(text.replace(INK, "currentColor"))
