"""What a running training tells: to nobody, or to a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_LINE_EVERY = 100
"""Steps between two lines where there is no terminal to redraw."""


class Quiet:
    """Hears everything and says nothing; the interface of every progress view."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def trunk(self, done: int, total: int) -> None:
        """``done`` of the ``total`` texts that the next steps need have been through the frozen blocks."""

    def step(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        """A step is done; ``figures`` are running means, episodes per second and seconds left."""

    def validation(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """A validation is done."""

    def note(self, text: str) -> None:
        """Something the user should read."""


class Terminal(Quiet):
    """A live view: a bar and a line of figures that stay in place, validations above them.

    Where the output is no terminal (a log file, CI), a line every so many steps instead.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._train = self._bar.add_task("training", total=None)
        self._trunk = self._bar.add_task("frozen part", total=None, visible=False)
        self._live = Live(self._bar, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def trunk(self, done: int, total: int) -> None:
        """Show how far the trunk is, while it runs."""
        self._bar.update(self._trunk, completed=done, total=total, visible=done < total)

    def step(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        """Redraw the bar and the figures."""
        if not self.console.is_terminal:
            if step % _LINE_EVERY == 0:
                self.validation(step, figures, best=False)
            return
        self._bar.update(self._train, completed=step, total=steps)
        table = Table.grid(padding=(0, 2))
        for _ in figures:
            table.add_column(justify="right")
        table.add_row(*[f"[dim]{name}[/dim]" for name in figures])
        table.add_row(*[_figure(name, value) for name, value in figures.items()])
        self._live.update(Group(self._bar, table))

    def validation(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        """Print a line that stays."""
        text = "  ".join(f"[dim]{name}[/dim] {_figure(name, value)}" for name, value in figures.items())
        mark = "  [green]best so far[/green]" if best else ""
        self.console.print(f"  step {step:>5}  {text}{mark}", soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, soft_wrap=True)


def _figure(name: str, value: float) -> str:
    if name == "time left":
        minutes, seconds = divmod(int(value), 60)
        return f"{minutes}:{seconds:02d}"
    if name in ("success", "generalisation", "locality"):
        return f"{value:.1%}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
