"""Importing this puts the folder above, which holds ``_bench``, on the path of a script."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
