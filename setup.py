"""Builds the compiled core: `nlm._C` (C++) and, where nvcc is found, `nlm._C_cuda`.

Neither links torch, so a build needs no torch, takes seconds, and serves every torch release.

    NLM_NO_EXT=1   no compiler: nlm runs on its PyTorch references
    NLM_CUDA=1|0   require, or leave out, the CUDA module (default: built where nvcc is found)
    NLM_WERROR=1   warnings are errors
    NLM_SANITIZE=1 nlm._C with address and undefined-behaviour sanitizers (.ci/sanitize), or
                 =thread with ThreadSanitizer on std::thread (.ci/races)
    NLM_PLAIN=1    nlm._C without any instruction set of its own (.ci/valgrind)
    CXX, NVCC      the compilers

A kernel file csrc/<stem>.cpp is compiled once per instruction set (csrc/core/isa.h). The flags
never depend on the machine that builds: no -march=native, no look at its GPU.
"""

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
PLAIN = not X86 or os.environ.get("NLM_PLAIN") == "1"
ISA_FLAGS = {"plain": []} if PLAIN else {f"v{n}": [f"-march=x86-64-v{n}"] for n in (2, 3, 4)}
AMX_FLAGS = [*ISA_FLAGS.get("v4", []), "-mamx-tile", "-mamx-bf16"]
CUDA_ARCHITECTURES = (80, 90, 100)
SANITIZERS = {
    "1": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-Og"],
    "thread": ["-fsanitize=thread", "-DNLM_STD_THREADS", "-O1"],
}


COMPILERS = ThreadPoolExecutor(os.cpu_count())


def say(text: str) -> None:
    print(f"nlm build: {text}", file=sys.stderr, flush=True)


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"nlm build: failed: {shlex.join(command)}\n{done.stdout}")
    return done.stdout


def compile_if_stale(job: tuple[list[str], Path, Path]) -> Path:
    """Compiles `source` into `target`, unless `target` is newer than it and all headers."""
    command, source, target = job
    inputs = [source, *CSRC.rglob("*.h")]
    command = [*command, "-c", str(source), "-o", str(target)]
    stamp = target.with_suffix(".cmd")
    if (
        target.exists()
        and stamp.exists()
        and stamp.read_text() == shlex.join(command)
        and all(target.stat().st_mtime > path.stat().st_mtime for path in inputs)
    ):
        return target
    if warnings := run(command).strip():
        say(warnings)
    stamp.write_text(shlex.join(command))
    return target


def instruction_sets(source: Path) -> dict[str, list[str]]:
    """Flags by instruction set; AMX for what its header declares with NLM_KERNEL_AMX."""
    has_amx = not PLAIN and "NLM_KERNEL_AMX(" in source.with_suffix(".h").read_text()
    return {**ISA_FLAGS, "amx": AMX_FLAGS} if has_amx else ISA_FLAGS


def cxx() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"nlm build: no C++ compiler ({command[0]}) was found; install one, name it with CXX, "
            "or set NLM_NO_EXT=1 to install without the compiled core"
        )
    return command


def has_openmp() -> bool:
    probe = subprocess.run(
        [*cxx(), "-fopenmp", "-x", "c++", "-", "-o", os.devnull],
        input="#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }",
        text=True,
        capture_output=True,
    )
    return probe.returncode == 0


@functools.cache
def nvcc() -> str | None:
    wanted = os.environ.get("NLM_CUDA")
    if wanted == "0":
        say("no nlm._C_cuda: NLM_CUDA=0")
        return None
    if not (CSRC / "bind_cuda.cpp").exists():
        return None
    found = shutil.which(os.environ.get("NVCC", "nvcc"))
    if found is None:
        home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        found = shutil.which("nvcc", path=str(home / "bin"))
    if found is None and wanted == "1":
        raise SystemExit("nlm build: NLM_CUDA=1, but nvcc was not found (PATH, NVCC, CUDA_HOME)")
    say(f"nlm._C_cuda with {found}" if found else "no nlm._C_cuda: nvcc was not found")
    return found


def cuda_targets(compiler: str) -> list[str]:
    """-gencode for the architectures that this nvcc knows; PTX of the last serves later ones."""
    known = run([compiler, "--list-gpu-code"]).split()
    chosen = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
    if not chosen:
        raise SystemExit(f"nlm build: {compiler} knows none of {CUDA_ARCHITECTURES}, only {known}")
    say("CUDA architectures " + ", ".join(f"sm_{number}" for number in chosen))
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


class BuildCore(build_ext):
    """Compiles both modules at once with one pool of processes, one per core, and links."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = len(self.extensions or [1])

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = cxx()
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp).resolve() / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        # -Wno-maybe-uninitialized: GCC 12 reports its own AVX-512 header.
        flags += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", f"-I{CSRC}"]
        flags += ["-Werror"] if os.environ.get("NLM_WERROR") == "1" else []
        sanitizers = SANITIZERS.get(os.environ.get("NLM_SANITIZE", ""), [])
        flags += [*sanitizers, *(["-fno-omit-frame-pointer", "-g1"] if sanitizers else [])]
        flags += ["-DNLM_PLAIN", "-g1"] if X86 and PLAIN else []
        folders = (*self.include_dirs, pybind11.get_include())
        includes = [part for folder in folders for part in ("-isystem", folder)]
        openmp = ["-fopenmp"] if has_openmp() and "-fsanitize=thread" not in sanitizers else []

        if ext.name == "nlm._C":
            say(f"nlm._C with {shlex.join(compiler)}, instruction sets {', '.join(ISA_FLAGS)}")
            if not openmp:
                say("one thread only: the compiler has no OpenMP")
            bind = [*compiler, *flags, *openmp, *includes, "-O1"]
            jobs = [(bind, CSRC / "bind.cpp", objects / "bind.o")]
            for source in sorted(CSRC.glob("*.cpp")):
                if source.stem.startswith("bind"):
                    continue
                for isa, march in instruction_sets(source).items():
                    command = [*compiler, *flags, *openmp, *march, f"-DNLM_ISA={isa}"]
                    jobs.append((command, source, objects / f"{source.stem}.{isa}.o"))
            link = [*compiler, "-shared", *openmp, *sanitizers]
        else:
            device = nvcc()
            assert device is not None
            host = ",".join(["-fPIC", "-fvisibility=hidden", "-ffp-contract=off"])
            command = [device, "-std=c++17", "-O3", "-fmad=false", f"-Xcompiler={host}"]
            command += [f"-ccbin={compiler[0]}", f"-I{CSRC}", *cuda_targets(device)]
            command += ["-Werror=all-warnings"] if os.environ.get("NLM_WERROR") == "1" else []
            bind = [*command, *includes]
            jobs = [(bind, CSRC / "bind_cuda.cpp", objects / "bind_cuda.o")]
            jobs += [(command, path, objects / f"{path.stem}.cu.o") for path in CSRC.glob("*.cu")]
            link = [device, "-shared", "-cudart=static", f"-ccbin={compiler[0]}"]

        # The slowest first, so that the last one to finish is short: pybind11, then by size.
        jobs.sort(key=lambda job: (not job[1].stem.startswith("bind"), -job[1].stat().st_size))
        built = list(COMPILERS.map(compile_if_stale, jobs))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        run([*link, *undefined, *map(str, built), "-o", str(target)])


def extensions() -> list[Extension]:
    if os.environ.get("NLM_NO_EXT") == "1":
        say("no compiled core: NLM_NO_EXT=1")
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.glob("*.cpp"))
    modules = [Extension("nlm._C", [path for path in sources if "_cuda" not in path])]
    if nvcc() is not None:
        modules.append(Extension("nlm._C_cuda", ["csrc/bind_cuda.cpp"]))
    return modules


setup(
    packages=[*find_packages(include=["nlm", "nlm.*"]), "nlm.kernels", "nlm.benchmarks"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCore},
)
