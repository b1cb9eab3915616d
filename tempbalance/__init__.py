"""Layer-wise learning rates from the spectra of the weights (TempBalance with FARMS)."""

from tempbalance.analysis.analyze import analyze
from tempbalance.analysis.compare import Comparison, compare
from tempbalance.analysis.details import Details
from tempbalance.analysis.ranking import Ranking, rank
from tempbalance.analysis.report import Report
from tempbalance.assign import (
    Averaged,
    ByRole,
    Clipped,
    Constant,
    DepthDecay,
    DepthLinear,
    Frozen,
    LinearMap,
    Log2Share,
    NullScore,
    PerBlock,
    PerType,
    Population,
    RankMap,
    Reversed,
    Shuffled,
    SigmoidMap,
    SqrtShare,
    StandardSigmoid,
)
from tempbalance.balance import Balancer, BalanceWarning
from tempbalance.measure.measurement import LayerRecord, MeasurementError, Outcome
from tempbalance.measure.null import NullAlpha, null_alpha
from tempbalance.optim.decay import AlphaDecay
from tempbalance.optim.hooks import StepHooks
from tempbalance.optim.scheduler import TempBalanceLR
from tempbalance.spectra.by_layer import ByLayer
from tempbalance.spectra.powerlaw import Hill, KSFit, PeakFit
from tempbalance.spectra.windows import Farms, WholeMatrix

__version__ = "0.1.0"

__all__ = [
    "AlphaDecay",
    "Averaged",
    "BalanceWarning",
    "Balancer",
    "ByLayer",
    "ByRole",
    "Clipped",
    "Comparison",
    "Constant",
    "DepthDecay",
    "DepthLinear",
    "Details",
    "Farms",
    "Frozen",
    "Hill",
    "KSFit",
    "LayerRecord",
    "LinearMap",
    "Log2Share",
    "MeasurementError",
    "NullAlpha",
    "NullScore",
    "Outcome",
    "PeakFit",
    "PerBlock",
    "PerType",
    "Population",
    "RankMap",
    "Ranking",
    "Report",
    "Reversed",
    "Shuffled",
    "SigmoidMap",
    "SqrtShare",
    "StandardSigmoid",
    "StepHooks",
    "TempBalanceLR",
    "WholeMatrix",
    "analyze",
    "compare",
    "null_alpha",
    "rank",
]
