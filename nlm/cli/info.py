"""``nlm info``: what is installed and which fast paths are live."""

import json

import nlm


def show(as_json: bool) -> None:
    """Print `nlm.info()`, as text or as JSON."""
    facts = nlm.info()
    print(json.dumps(dict(facts), indent=2) if as_json else facts)
