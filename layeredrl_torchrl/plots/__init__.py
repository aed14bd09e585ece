"""Plots of a predictor: functions that return a matplotlib figure.

They need matplotlib, which the extra ``plots`` installs. Save a figure with
``figure.savefig(path)``.
"""

from layeredrl_torchrl.plots.calibration import plot_calibration
from layeredrl_torchrl.plots.disagreement import plot_disagreement
from layeredrl_torchrl.plots.horizon import plot_error_by_horizon
from layeredrl_torchrl.plots.prediction import plot_prediction

__all__ = ["plot_calibration", "plot_disagreement", "plot_error_by_horizon", "plot_prediction"]
