"""What people look at: tables, plots and pages made from the figures of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emendo.report.tables import Column, Table

if TYPE_CHECKING:
    from emendo.report.html import render_report, write_report

__all__ = ["Column", "Table", "render_report", "write_report"]


def __getattr__(name: str) -> Any:  # so that a table needs neither torch nor matplotlib
    if name in ("render_report", "write_report"):
        from emendo.report import html

        return getattr(html, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
