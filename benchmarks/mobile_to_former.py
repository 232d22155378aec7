"""mobile_to_former against eager, SDPA and torch.compile at the maps of Mobile-Former."""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("mobile_to_former", __doc__))
