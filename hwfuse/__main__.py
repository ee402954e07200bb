"""``python -m hwfuse``: the same as the command ``hwfuse``."""

import sys

from hwfuse._cli import main

sys.exit(main())
