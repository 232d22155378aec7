"""pointwise against eager and torch.compile at every shape of the suite."""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("pointwise", __doc__))
