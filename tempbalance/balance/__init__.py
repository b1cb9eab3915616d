"""Balance: a model over a run. Alphas kept fresh (tracker), and the multiplier of every layer.

Options are written once, in options.py; what reads the clock is tracker.py, what makes multipliers
of alphas balancer.py. It knows no optimizer: optim/ stands on it. Imports measure/, assign/,
layers/ and spectra/. A newcomer adds an option here, and what should be tracked over a run.
"""

from tempbalance.balance.balancer import Balancer as Balancer
from tempbalance.balance.messages import BalanceWarning as BalanceWarning
from tempbalance.balance.options import Options as Options
from tempbalance.balance.tracker import Tracker as Tracker
