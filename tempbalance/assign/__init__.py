"""Assign: alphas in, positive multipliers out; pure.

Imports words alone. A new formula of alphas goes into maps.py, one of what else is known of a layer
into a file of its own (null_score.py), a new control into controls.py, each a frozen object that
keeps the contract of contract.py; one row in tests/schedules.py holds it to that.
"""

from tempbalance.assign.contract import Assignment as Assignment
from tempbalance.assign.contract import Population as Population
from tempbalance.assign.contract import check_assignment as check_assignment
from tempbalance.assign.contract import normalized as normalized
from tempbalance.assign.controls import Averaged as Averaged
from tempbalance.assign.controls import ByRole as ByRole
from tempbalance.assign.controls import Clipped as Clipped
from tempbalance.assign.controls import Constant as Constant
from tempbalance.assign.controls import Frozen as Frozen
from tempbalance.assign.controls import PerBlock as PerBlock
from tempbalance.assign.controls import PerType as PerType
from tempbalance.assign.controls import Reversed as Reversed
from tempbalance.assign.controls import Shuffled as Shuffled
from tempbalance.assign.depth import DepthDecay as DepthDecay
from tempbalance.assign.depth import DepthLinear as DepthLinear
from tempbalance.assign.depth import block_of as block_of
from tempbalance.assign.depth import role_of as role_of
from tempbalance.assign.maps import LinearMap as LinearMap
from tempbalance.assign.maps import Log2Share as Log2Share
from tempbalance.assign.maps import RankMap as RankMap
from tempbalance.assign.maps import SigmoidMap as SigmoidMap
from tempbalance.assign.maps import SqrtShare as SqrtShare
from tempbalance.assign.maps import StandardSigmoid as StandardSigmoid
from tempbalance.assign.null_score import NullScore as NullScore
from tempbalance.assign.null_score import bounded as bounded
