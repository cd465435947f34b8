"""``python -m fused_sd``: the command line without its script."""

import sys

from fused_sd.cli import main

sys.exit(main())
