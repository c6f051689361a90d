r"""The console that everything is printed on.

It reads no markup, so square brackets in a prompt or a file name stay square brackets; a style is given as a
:class:`rich.text.Text`. A terminal never receives a control character from data: it is shown as an escape such as
``\x1b``. A pipe or a file receives the exact text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from emendo.report.tables import printable


class Console(RichConsole):
    """A console that reads no markup and sends no control character of the text to a terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into a text; a table measures its columns by this, too."""
        return super().render_str(printable(text) if self.is_terminal else text, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; this is where all printing passes."""
        for segment in super().render(renderable, options):
            if segment.control or not self.is_terminal:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """Leave a closed pipe to the one place that handles errors (rich would exit with code 1)."""
        self.quiet = True
        raise BrokenPipeError
