"""The readers of files, fuzzed with guidance by coverage (atheris, libFuzzer): what do they do?

    python benchmarks/experiments/fuzzing.py [--seconds 40] [--seed 0] [--json FILE] [KIND ...]

Each kind of file that nlm reads (``tests/_readers.py``) has a process of its own in which the
package, PyYAML, zipfile and safetensors' Python are instrumented. The fuzzer's bytes are the
choices of ``tests/_mutations.py``, which change parts of a good file, or the file itself. A finding
is anything but a result or an error of nlm's own in one sentence, within 20 s and 1 GiB; it is
counted by its place, and the fuzzing goes on. Needs ``pip install atheris``.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROOMS = [HERE, HERE.parent, HERE.parents[1] / "tests"]
_COVERED = re.compile(rb"cov: (\d+) ft: (\d+)")


def fuzz(name: str, seconds: float, seed: int, output: Path) -> None:
    """Fuzzes one kind in this process, which ends with it."""
    import atheris
    from _mutations import mutated
    from _readers import Examiner, Foreign

    examiner, findings = Examiner(name), dict[str, dict[str, Any]]()
    end, tried = time.perf_counter() + seconds, 0

    def once(data: bytes) -> None:
        nonlocal tried
        tried += 1
        provider = atheris.FuzzedDataProvider(data)
        if provider.ConsumeIntInRange(0, 7) == 0:
            content = provider.ConsumeBytes(len(data))
        else:
            content = mutated(examiner.good, examiner.kind.form, provider.ConsumeIntInRange)
        try:
            examiner.examine(content)
        except Foreign as error:
            assert error.__cause__ is not None
            last = traceback.extract_tb(error.__cause__.__traceback__)[-1]
            place = f"{type(error.__cause__).__name__} at {Path(last.filename).name}:{last.lineno}"
            found = findings.setdefault(place, {"said": str(error)[:300], "times": 0})
            found["times"] += 1
        if time.perf_counter() > end:
            text = {"tried": tried, **examiner.counts, "findings": findings}
            output.write_text(json.dumps(text))
            examiner.close()
            os._exit(0)

    with tempfile.TemporaryDirectory() as corpus:
        draw = random.Random(seed)
        for number in range(16):
            (Path(corpus) / str(number)).write_bytes(draw.randbytes(64))
        (Path(corpus) / "good").write_bytes(examiner.good + b"\x00")
        options = [
            f"-seed={seed + 1}", f"-max_len={4 * len(examiner.good)}",
            f"-artifact_prefix={corpus}/", "-handle_alrm=0", "-rss_limit_mb=0", "-timeout=1200",
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, corpus], once)
        atheris.Fuzz()


def run(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Fuzzes one kind in a child of this process, which has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        output, said = Path(folder) / "result.json", Path(folder) / "said"
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            with said.open("wb") as file:
                os.dup2(file.fileno(), 2)
            try:
                fuzz(name, seconds, seed, output)
            finally:
                os._exit(1)
        while not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.2)
            if time.perf_counter() - start > seconds + 900:
                os.kill(child, signal.SIGKILL)
        told = said.read_bytes()
        if not output.exists():
            lines = told.decode(errors="replace").splitlines()
            last = "\n".join(line for line in lines if "Error" in line or "File" in line)[-1000:]
            return {"kind": name, "tried": 0, "findings": {"the process died": {"said": last}}}
        covered = _COVERED.findall(told)[-1:] or [(b"0", b"0")]
        found = json.loads(output.read_text())
        edges, features = map(int, covered[0])
        return {
            "kind": name, "seconds": round(time.perf_counter() - start, 1), **found,
            "edges": edges, "features": features,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "fuzzing.json")
    options = parser.parse_args()
    sys.path[:0] = map(str, ROOMS)
    import atheris

    with atheris.instrument_imports(include=["nlm", "yaml", "zipfile", "safetensors"]):
        from _readers import KINDS

        import nlm

    rows = []
    for name in options.kinds or KINDS:
        rows.append(run(name, options.seconds, options.seed))
        print(json.dumps({k: v for k, v in rows[-1].items() if v != {}}), flush=True)
    findings = sum(len(row["findings"]) for row in rows)
    report = {
        "versions": {**nlm.info()["versions"], "atheris": _version()}, "seed": options.seed,
        "seconds": options.seconds, "tried": sum(row["tried"] for row in rows),
        "findings": findings, "rows": rows,
    }  # fmt: skip
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['tried']} files tried, {findings} findings")
    sys.exit(1 if findings else 0)


def _version() -> str:
    from importlib.metadata import version

    return version("atheris")


if __name__ == "__main__":
    main()
