"""What the command lines on nlm do to end a host sooner."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys, threading, time
from pathlib import Path
from nlm.integrations._end import ending

class Kept:
    def __del__(self):
        print("freed")

def later():
    time.sleep(0.3)
    Path(sys.argv[1], "thread").touch()

atexit.register(Path(sys.argv[1], "atexit").touch)
kept = Kept()
kept.itself = kept
with ending():
    threading.Thread(target=later).start()
    sys.stdout.write("printed")
    {last}
"""


@pytest.mark.parametrize(
    ("last", "code", "frees"),
    [("pass", 0, False), ("sys.exit()", 0, False), ("sys.exit(3)", 3, True), ("1 / 0", 1, True)],
)
def test_what_can_be_seen_of_an_end_is_as_ever(
    tmp_path: Path, last: str, code: int, frees: bool
) -> None:
    command = [sys.executable, "-c", PROGRAM.format(last=last), str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == code and ("ZeroDivisionError" in done.stderr) == ("1" in last)
    assert done.stdout.startswith("printed") and ("freed" in done.stdout) == frees
    assert {each.name for each in tmp_path.iterdir()} == {"atexit", "thread"}


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.format(last="pass"), str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, text=True, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0 and "No space left" in done.stderr
