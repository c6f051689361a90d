"""What people look at: tables, plots and pages made from the figures of an evaluation."""

from emendo.report.html import render_report, write_report

__all__ = ["render_report", "write_report"]
