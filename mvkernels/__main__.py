"""``python -m mvkernels``."""

import sys

from mvkernels.commands.cli import main

sys.exit(main())
