"""Layer-wise learning rates from the spectra of the weights (TempBalance with FARMS)."""

from tempbalance.farms import Farms, WholeMatrix
from tempbalance.measure import LayerRecord, MeasurementError, Outcome
from tempbalance.powerlaw import Hill, KSFit, PeakFit
from tempbalance.report import Report, analyze

__version__ = "0.1.0"

__all__ = [
    "Farms",
    "Hill",
    "KSFit",
    "LayerRecord",
    "MeasurementError",
    "Outcome",
    "PeakFit",
    "Report",
    "WholeMatrix",
    "analyze",
]
