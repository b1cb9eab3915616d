"""Layer-wise learning rates from the spectra of the weights (TempBalance with FARMS)."""

from tempbalance.analysis.analyze import analyze
from tempbalance.analysis.compare import Comparison, compare
from tempbalance.analysis.details import Details
from tempbalance.analysis.ranking import Ranking, rank
from tempbalance.analysis.report import Report
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
from tempbalance.balance.balancer import Balancer, BalanceWarning
from tempbalance.measure.measurement import LayerRecord, MeasurementError, Outcome
from tempbalance.optim.hooks import StepHooks
from tempbalance.optim.scheduler import TempBalanceLR
from tempbalance.spectra.powerlaw import Hill, KSFit, PeakFit
from tempbalance.spectra.windows import Farms, WholeMatrix

__version__ = "0.1.0"

__all__ = [
    "Averaged",
    "BalanceWarning",
    "Balancer",
    "Clipped",
    "Comparison",
    "Constant",
    "Details",
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
    "Ranking",
    "Report",
    "Reversed",
    "Shuffled",
    "SigmoidMap",
    "SqrtShare",
    "StepHooks",
    "TempBalanceLR",
    "WholeMatrix",
    "analyze",
    "compare",
    "rank",
]
