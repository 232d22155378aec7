"""multiscale_linear_attention against eager and torch.compile at the maps of EfficientViT, DC-AE and Sana."""

import sys

from _op import run

if __name__ == "__main__":
    sys.exit(run("multiscale_linear_attention", __doc__))
