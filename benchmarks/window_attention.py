"""window_attention against eager, SDPA and torch.compile at every shape of the suite."""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("window_attention", __doc__))
