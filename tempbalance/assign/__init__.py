"""Assign: alphas in, positive multipliers out; pure."""

from tempbalance.assign.maps import Assignment as Assignment
from tempbalance.assign.maps import Averaged as Averaged
from tempbalance.assign.maps import Clipped as Clipped
from tempbalance.assign.maps import Constant as Constant
from tempbalance.assign.maps import Frozen as Frozen
from tempbalance.assign.maps import LinearMap as LinearMap
from tempbalance.assign.maps import Log2Share as Log2Share
from tempbalance.assign.maps import PerType as PerType
from tempbalance.assign.maps import RankMap as RankMap
from tempbalance.assign.maps import Reversed as Reversed
from tempbalance.assign.maps import Shuffled as Shuffled
from tempbalance.assign.maps import SigmoidMap as SigmoidMap
from tempbalance.assign.maps import SqrtShare as SqrtShare
from tempbalance.assign.maps import check_assignment as check_assignment
from tempbalance.assign.maps import normalized as normalized
