"""Optim: multipliers in, numbers in an optimizer's param groups out.

scheduler.py is :class:`~tempbalance.TempBalanceLR`, decay.py :class:`~tempbalance.AlphaDecay`
(what they share is balanced.py), hooks.py :class:`~tempbalance.StepHooks`. Stands on balance/;
integrations/ stand on it. A newcomer adds here what scales another field of the groups.
"""

from tempbalance.optim.decay import AlphaDecay as AlphaDecay
from tempbalance.optim.hooks import StepHooks as StepHooks
from tempbalance.optim.scheduler import TempBalanceLR as TempBalanceLR
