"""patch_transformer_layer against eager, SDPA and torch.compile at the layers of MobileViT.

On a CPU the forward is on packed weights, and the backward is the reference's: the C++ kernels have none.
"""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("patch_transformer_layer", __doc__))
