"""A model of time that reads machine code: see :mod:`benchmarks/predict.py`, which runs it."""
