"""Makes every page and picture of docs/ that is made of results, and README's tables.

    python benchmarks/pages.py

Each maker may be run alone, too. Those whose results are not there are left out.
"""

import runpy
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "experiments" / "results"

MAKERS = (
    "readme", "roofline", "backends_page", "barriers", "many_models_page", "corrections_page",
    "recovery_page", "refit_page", "transformer_tasks_page", "faults_page", "figures",
    "questions_page", "every_merge_page", "scaling_page", "support_page", "trust_page",
    "proteins_page",
)  # fmt: skip
NEEDED = {"proteins_page": ("proteins.json", "ligands.json")}


def main() -> None:
    for name in MAKERS:
        if all((RESULTS / needed).exists() for needed in NEEDED.get(name, ())):
            print(name, flush=True)
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
