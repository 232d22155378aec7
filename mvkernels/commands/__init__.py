"""The ``mvkernels`` command, a file for each of its commands."""
