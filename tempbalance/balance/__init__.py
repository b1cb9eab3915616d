"""Balance: alphas of a model over a run, and the multiplier of every layer."""

from tempbalance.balance.balancer import Balancer as Balancer
from tempbalance.balance.messages import BalanceWarning as BalanceWarning
