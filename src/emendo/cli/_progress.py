"""Progress of long work on standard error: live bars on a terminal, else a line every few seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from emendo.cli._console import messages, note
from emendo.progress import Lines, format_figure


@contextmanager
def show_progress() -> Iterator[Bars | Lines]:
    """Show the progress of everything inside the block; see :class:`emendo.progress.Progress`."""
    console = messages()
    if not console.is_terminal:
        yield Lines(note)
        return
    bars = Bars(console)
    with bars.live:
        yield bars


class Bars:
    """A bar for each task that is under way, the latest figures below them, and reports above them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:>12}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self.live = Live(self._bars, console=console, refresh_per_second=4, transient=True)

    def update(self, task: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """Redraw the bar of a task, and the figures if there are any."""
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        key = self._tasks[task]
        if done < self._bars.tasks[key].completed:
            self._bars.reset(key)  # the task has started again
        self._bars.update(key, completed=done, total=total, visible=done < total)
        if figures:
            table = Table.grid(padding=(0, 2))
            for _ in figures:
                table.add_column(justify="right")
            table.add_row(*[Text(name, "dim") for name in figures])
            table.add_row(*[format_figure(name, value) for name, value in figures.items()])
            self.live.update(Group(self._bars, table))

    def report(self, heading: str, figures: Mapping[str, float], remark: str = "") -> None:
        """Print a line that stays."""
        line = Text(f"  {heading}")
        for name, value in figures.items():
            line.append(f"  {name}", "dim").append(f" {format_figure(name, value)}")
        self.console.print(line.append(f"  {remark}" if remark else "", "green"), soft_wrap=True)
