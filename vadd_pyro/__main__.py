"""``python -m vadd_pyro``."""

import sys

from vadd_pyro.cli import main

sys.exit(main())
