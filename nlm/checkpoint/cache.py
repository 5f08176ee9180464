"""The folder of what can be made again: ``NLM_CACHE``, or the operating system's place for it."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder of the cached files, by the rules of the operating system; it may not exist."""
    chosen = os.environ.get("NLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = home / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "nlm"
