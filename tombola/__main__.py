"""`python -m tombola` is the command `tombola`."""

import sys

from tombola.cli import main

sys.exit(main())
