"""Plots, tables and a page from a run folder; nothing is computed here beyond reading and drawing."""

from pathlib import Path

from reprdpo.report.tables import summary_table

__all__ = ["render", "summary_table"]


def render(run_dir: str | Path) -> Path:
    """Write ``report/*.png`` and the self-contained ``report/index.html`` of a run; returns the page's path.

    Raises :class:`~reprdpo.errors.UserError` where the folder is not a run's, or a file of it is broken.
    """
    from reprdpo.report.page import write_page  # matplotlib is loaded for pages alone

    return write_page(run_dir)
