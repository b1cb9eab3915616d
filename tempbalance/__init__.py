"""Layer-wise learning rates from the spectra of the weights (TempBalance with FARMS)."""

from tempbalance.analysis.report import Report, analyze
from tempbalance.assign.maps import (
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
from tempbalance.measure.measurement import LayerRecord, MeasurementError, Outcome
from tempbalance.optim.decay import AlphaDecay
from tempbalance.optim.hooks import StepHooks
from tempbalance.optim.scheduler import TempBalanceLR
from tempbalance.spectra.powerlaw import Hill, KSFit, PeakFit
from tempbalance.spectra.windows import Farms, WholeMatrix

__version__ = "0.1.0"

__all__ = [
    "AlphaDecay",
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
