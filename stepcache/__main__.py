"""`python -m stepcache`: the command if its folder is not on the path, as in a portable ComfyUI."""

import sys

from .cli import main

sys.exit(main())
