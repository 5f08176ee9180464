"""One merge by sentence-transformers: the process that host_sentence_transformers.py times.

python -m _sentence_transformers sentence_transformers|nlm METHOD FOLDER OUT
"""

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer


def main() -> None:
    if sys.argv[1:] == ["start"]:
        return
    program, method, folder, out = sys.argv[1:]
    if program == "nlm":
        from nlm.integrations import mergekit

        mergekit.register()
        method = f"nlm_{method}"
    base, *experts = (
        SentenceTransformer(str(Path(folder) / name), device="cpu")
        for name in ("base", "one", "two")
    )
    parameters = {"weight": 0.5, "density": 0.2}
    SentenceTransformer.merge(experts, method, base_model=base, parameters=parameters).save(out)


if __name__ == "__main__":
    main()
