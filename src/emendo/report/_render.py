"""Self-contained HTML pages with one look; they load nothing from anywhere. The only place that imports Jinja."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from emendo.report.plots import INK

_HOME = "emendo.report"
"""The package that holds ``page.css``, which every template includes."""


def render_page(template: str, package: str = _HOME, **values: Any) -> str:
    """A page as text.

    Args:
        template: file name of the template.
        package: the package that holds it.
        **values: what the template shows; text is escaped.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in dict.fromkeys((package, _HOME))]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "short": short}
    return environment.get_template(template).render(**values)


def number(value: Any) -> str:
    """A number in four digits, everything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short(value: float) -> str:
    """A score in three decimals, or in three digits where it is small or large."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 100 else f"{value:.3g}"


def percent(value: float) -> str:
    """A probability in percent, with one more digit where it is small."""
    if 0 < value < 0.0005:
        return "<0.1%"
    return f"{value:.0%}" if value >= 0.0995 or value == 0 else f"{value:.1%}"


def inline(svg: bytes) -> Markup:
    """An SVG document as part of a page: no prologue, no metadata, no names of namespaces, the page's text colour."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*pt"\s', r"\1 ", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*pt"\s', r"\1 ", text, count=1)
    return Markup(text.replace(INK, "currentColor"))
