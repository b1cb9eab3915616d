"""Command line: ``tempbalance analyze CHECKPOINT``, ``compare A B``, ``rank A B C``, ``plot RUN``.

A subcommand is a module with a function ``add`` that adds its parser and names, as ``run``, the
function that does the work and returns the exit code; it is listed in ``_COMMANDS``.

Tables go to stdout, all else to stderr. Exit codes: 0 done; 1 the measurement found what was asked
to be an error (``--strict``, or no layer with an alpha); 2 it could not be made (usage, a file, the
model).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from tempbalance.cli import analyze, compare, plot, rank, sparsities
from tempbalance.cli.work import FOUND, UNUSABLE
from tempbalance.measure.measurement import MeasurementError

_COMMANDS = (analyze, compare, rank, plot, sparsities)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (argparse itself exits with 2)."""
    parser = argparse.ArgumentParser(
        prog="tempbalance",
        description="How heavy-tailed the weight spectra of a network are, layer by layer.",
        epilog="exit code: 0 done, 1 a layer could not be measured (with --strict, or none could), "
        "2 wrong usage, file or model",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except MeasurementError as error:
        return _fail(error, FOUND)
    except (ImportError, OSError, ValueError) as error:
        return _fail(error, UNUSABLE)
    except KeyboardInterrupt:
        return 130


def _version() -> str:
    from tempbalance import __version__

    return f"tempbalance {__version__} (torch {torch.__version__})"


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"tempbalance: error: {' '.join(str(error).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
