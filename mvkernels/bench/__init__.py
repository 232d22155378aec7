"""Benchmarks of the ops: times, peers, CSV files, plots, comparisons. Used by the command ``mvkernels bench``."""

from mvkernels.bench.measuring import MODES, PEERS, Options, Result, candidates, measure, work
from mvkernels.bench.rows import Row, geomeans, read_csv, size_class, write_csv

__all__ = [
    "MODES",
    "PEERS",
    "Options",
    "Result",
    "Row",
    "candidates",
    "geomeans",
    "measure",
    "read_csv",
    "size_class",
    "work",
    "write_csv",
]
