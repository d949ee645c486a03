"""Self-contained HTML pages of measurements: of a packed directory, and of a model at many rates.

Nothing is loaded from outside and no plotting library is needed: drawings are inline SVG in the
page's own colours, so they follow light and dark mode, and each says its numbers in words as well.
"""

from .curves import Log
from .directory import directory_page, report_directory
from .maps import block_map, heat_map, layer_map
from .measuring import Measured, Request, measure
from .page import Section, facts, html_report, table, texts
from .plots import Series, line_plot
from .trials import COLUMNS, Stage, Trial, model_report, trial_rows

__all__ = [
    "COLUMNS", "Log", "Measured", "Request", "Section", "Series", "Stage", "Trial", "block_map",
    "directory_page", "facts", "heat_map", "html_report", "layer_map", "line_plot", "measure",
    "model_report", "report_directory", "table", "texts", "trial_rows",
]  # fmt: skip
