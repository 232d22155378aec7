"""patch_transformer_layer against eager, SDPA and torch.compile at the layers of MobileViT.

On a CPU, where it has no kernel of its own, what is measured is the reference.
"""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("patch_transformer_layer", __doc__))
