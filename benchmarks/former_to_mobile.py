"""former_to_mobile against eager, SDPA and torch.compile at the maps of Mobile-Former."""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("former_to_mobile", __doc__))
