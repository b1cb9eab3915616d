"""Layer-wise learning rates from the spectra of the weights (TempBalance with FARMS)."""

from tempbalance.assign import (
    Averaged,
    Clipped,
    Constant,
    Frozen,
    LinearMap,
    Log2Share,
    PerType,
    RankMap,
    Reversed,
    Shuffled,
    SigmoidMap,
    SqrtShare,
)
from tempbalance.balance import Balancer, BalanceWarning
from tempbalance.farms import Farms, WholeMatrix
from tempbalance.hooks import StepHooks
from tempbalance.measure import LayerRecord, MeasurementError, Outcome
from tempbalance.powerlaw import Hill, KSFit, PeakFit
from tempbalance.report import Report, analyze
from tempbalance.scheduler import TempBalanceLR

__version__ = "0.1.0"

__all__ = [
    "Averaged",
    "BalanceWarning",
    "Balancer",
    "Clipped",
    "Constant",
    "Farms",
    "Frozen",
    "Hill",
    "KSFit",
    "LayerRecord",
    "LinearMap",
    "Log2Share",
    "MeasurementError",
    "Outcome",
    "PeakFit",
    "PerType",
    "RankMap",
    "Report",
    "Reversed",
    "Shuffled",
    "SigmoidMap",
    "SqrtShare",
    "StepHooks",
    "TempBalanceLR",
    "WholeMatrix",
    "analyze",
]
