"""``python -m mlx_turboquant_plugin``: the command ``mlx_turboquant``."""

import sys

from .cli import main

sys.exit(main())
