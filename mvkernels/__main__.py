"""``python -m mvkernels``."""

import sys

from mvkernels.cli import main

sys.exit(main())
