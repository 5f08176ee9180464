"""``python -m nlm`` is the command ``nlm``."""

from nlm.cli import main

main()
