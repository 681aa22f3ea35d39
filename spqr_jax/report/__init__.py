"""One self-contained HTML page on quantized models.

`records.py` and `runs.py` read what it is about, `figures.py` draws, `page.py` writes.
"""

from spqr_jax.report.page import render_page
from spqr_jax.report.records import read_result
from spqr_jax.report.runs import Run, environment, read_run, write_analysis

__all__ = ["Run", "environment", "read_result", "read_run", "render_page", "write_analysis"]
