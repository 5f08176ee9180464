"""Two LoRA adapters merged into one by PEFT: the process that host_peft.py times.

python -m _peft peft|nlm METHOD FOLDER OUT
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    if sys.argv[1:] == ["start"]:
        return
    program, method, folder, out = sys.argv[1:]
    if program == "nlm":
        from nlm.integrations.peft import use_as_default as switch
    else:
        switch = nullcontext
    base = AutoModelForCausalLM.from_pretrained(Path(folder) / "base")
    model = PeftModel.from_pretrained(base, str(Path(folder) / "adapter_one"), adapter_name="one")
    model.load_adapter(str(Path(folder) / "adapter_two"), adapter_name="two")
    with switch():
        model.add_weighted_adapter(["one", "two"], [0.6, 0.4], "both", method, density=0.2)
    model.save_pretrained(out, selected_adapters=["both"])


if __name__ == "__main__":
    main()
