"""``python -m tempbalance``: the same as the command ``tempbalance``."""

import sys

from tempbalance.cli import main

if __name__ == "__main__":
    sys.exit(main())
