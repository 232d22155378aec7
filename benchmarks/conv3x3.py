"""conv3x3 against eager and torch.compile at every shape of the suite."""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("conv3x3", __doc__))
