"""What is done to merges: the system's errors, damaged files, changes under way, bad outputs."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from _faults import PROGRAM, Ended, Programs, World

Scene = Callable[[World], AbstractContextManager]


@dataclass(frozen=True)
class Fault:
    """One disturbance.

    Attributes
    ----------
    names : what the sentence must name. run : the merge, with the fault.
    scene : what is otherwise than usual meanwhile.
    may_pass : whether the merge may do without what failed, and end whole.
    keeps : whether there was another output before, which stays.
    again : options of the merge that then must succeed.
    """

    name: str
    names: Callable[[World], str]
    run: Callable[[World, Programs], Ended]
    scene: Scene = nullcontext
    may_pass: bool = False
    keeps: bool = False
    recipe: str = "dare"
    again: tuple[str, ...] = ("--resume",)


def _calls() -> Iterator[Fault]:
    """Errors of the system, at calls on the output's folder or on the models."""
    run, models = (lambda world: world.run), (lambda world: world.folder / "models")
    for call, numbers, error, place in (
        ("write", (1, 3, 7, 12, 16, 18, 20, 21), "ENOSPC", run),
        ("write", (2, 8, 14), "EIO", run),
        ("fsync", (1, 5, 12, 20, 30, 36), "EIO", run),
        ("fsync", (9,), "ENOSPC", run),
        ("rename", (1, 3, 6, 7), "EIO", run),
        ("open", (1, 9, 20, 40), "EMFILE", run),
        ("open", (15,), "ENOSPC", run),
        ("open", (1, 20), "EACCES", models),
        ("mkdir", (1, 2, 3), "ENOSPC", run),
        ("remove", (1, 8), "EIO", run),
        ("read", (3, 10), "EIO", run),
        ("read", (1, 20, 40), "EIO", models),
        ("map", (1, 6), "ENOMEM", models),
        ("lock", (1,), "ENOLCK", run),
        ("copy", (1, 3), "ENOSPC", run),
        ("write", (4, 13), "short", run),
        ("read", (2, 30), "short", models),
    ):
        number_of = getattr(errno, error, error)
        for number in numbers:
            yield Fault(
                f"{error} at {call} {number}",
                lambda world, place=place: str(place(world)),
                lambda world, programs, text=f"{call} {number} {number_of}", place=place: (
                    programs.run(world.arguments("dare"), text, place(world))
                ),
                may_pass=error == "short" or call == "remove",
            )


@contextmanager
def kept(file: Path) -> Iterator[None]:
    """Within, a file may be damaged; afterwards it is as it was, its time too."""
    content, status = file.read_bytes(), file.stat()
    try:
        yield
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def damaged(name: str, change: Callable[[bytes], bytes]) -> Scene:
    """A file of the world with other bytes."""

    @contextmanager
    def scene(world: World) -> Iterator[None]:
        file = world.folder / name
        with kept(file):
            file.write_bytes(change(file.read_bytes()))
            yield

    return scene


def flipped(place: int | bytes, bit: int = 0) -> Callable[[bytes], bytes]:
    """One bit of the byte at a place, or of the first byte of a text."""

    def change(content: bytes) -> bytes:
        at = content.index(place) if isinstance(place, bytes) else place
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

    return change


def _merge(recipe: str = "dare") -> Callable[[World, Programs], Ended]:
    return lambda world, programs: programs.run(world.arguments(recipe))


def _inputs() -> Iterator[Fault]:
    """Damaged inputs. A flipped bit of a weight is another weight: only where what is read must be
    finite, or a digest is known, can it be seen."""
    file = "models/two/model-1.safetensors"
    for what, name, change in (
        ("a byte is missing", file, lambda content: content[:-1]),
        ("half is missing", file, lambda content: content[: len(content) // 2]),
        ("it ends in the header", file, lambda content: content[:40]),
        ("it is empty", file, lambda content: b""),
        ("a bit of the header's length", file, flipped(1, 2)),
        ("a bit of a name", file, flipped(b"bias")),
        ("a bit of a type", file, flipped(b"F32", 1)),
        ("a bit of an offset", file, flipped(b"offsets", 2)),
        ("a bit of a shape", file, flipped(b"[", 1)),
        ("weights that are no numbers", file, lambda content: content[:-800] + b"\xff" * 800),
        ("a bit of the index", "models/two/model.safetensors.index.json", flipped(b"weight_map")),
        ("a bit of the configuration", "models/base/config.json", flipped(0, 3)),
    ):
        again = () if "numbers" in what else ("--resume",)  # what was finished had other inputs
        yield Fault(f"{what} ({name})", lambda world, name=name: name.split("/")[1], _merge(),
                    damaged(name, change), again=again)  # fmt: skip
    for name, change in (
        ("spec.json", flipped(0, 3)),
        ("two-to-base.safetensors", lambda content: content[:-8]),
    ):
        yield Fault(f"damaged: {name}", lambda world, name=name: name, _merge("ties"),
                    damaged(name, change), recipe="ties")  # fmt: skip


def _half(world: World, programs: Programs) -> None:
    """Leaves a merge that was killed when three files were finished."""
    programs.run(world.arguments("dare"), "rename 5 kill", world.run)


def _notes() -> Iterator[Fault]:
    """What a killed merge left is damaged before it is resumed."""
    partial = ".out.partial"
    shard = f"{partial}/model-00002-of-00005.safetensors"
    for what, name, change, may_pass in (
        ("a bit of a finished file", shard, flipped(-5), True),
        ("a finished file is shorter", shard, lambda content: content[:-1], True),
        ("the note of a file is torn", f"{partial}/.nlm/{Path(shard).name}.json",
         lambda content: content[:9], True),
        ("the journal is torn", f"{partial}/.nlm/journal.json", lambda content: b"", False),
    ):  # fmt: skip

        def run(world: World, programs: Programs, name=name, change=change) -> Ended:
            _half(world, programs)
            (world.run / name).write_bytes(change((world.run / name).read_bytes()))
            return programs.run(world.arguments("dare", "--resume"))

        yield Fault(what, lambda world: ".out.partial", run, may_pass=may_pass, again=())


def _changes() -> Iterator[Fault]:
    """An input that changes while the merge is held in the middle of its writing."""

    def replace(file: Path) -> None:
        other = file.with_suffix(".new")
        shutil.copyfile(file, other)
        os.replace(other, file)

    for what, change in (
        ("touched", lambda file: os.utime(file)),
        ("longer", lambda file: file.write_bytes(file.read_bytes() + b"x")),
        ("replaced", replace),
        ("removed", lambda file: file.unlink()),
        ("shorter", lambda file: os.truncate(file, 0)),
    ):

        def run(world: World, programs: Programs, change=change) -> Ended:
            process = programs.start(world.arguments("dare"), "write 6 hold", world.run)
            assert programs.wait(process, for_hold=True).is_held
            change(world.folder / "models/two/model-1.safetensors")
            return programs.go_on(process)

        yield Fault(
            f"an input that is {what} meanwhile", lambda world: "two/model-1.safetensors", run,
            lambda world: kept(world.folder / "models/two/model-1.safetensors"),
        )  # fmt: skip


def _to(place: Callable[[World], Path], *more: str) -> Callable[[World, Programs], Ended]:
    return lambda world, programs: programs.run(
        world.arguments("dare", *more, out=place(world)), "any 0 0", world.run
    )


def _outputs() -> Iterator[Fault]:
    """Outputs that cannot be, or are in use."""

    def is_file(world: World) -> nullcontext:
        (world.run / "file").write_text("mine")
        return nullcontext()

    @contextmanager
    def stranger(world: World) -> Iterator[None]:
        (world.run / ".out.partial").mkdir()
        (world.run / ".out.partial" / "letter.txt").write_text("dear")
        yield
        assert (world.run / ".out.partial" / "letter.txt").read_text() == "dear"
        shutil.rmtree(world.run / ".out.partial")

    @contextmanager
    def linked(world: World) -> Iterator[None]:
        world.out.mkdir()
        (world.out / "model.safetensors").symlink_to(world.folder / "spec.json")
        yield
        assert (world.folder / "spec.json").exists()

    def two(world: World, programs: Programs) -> Ended:
        first = programs.start(world.arguments("dare"), "write 6 hold", world.run)
        assert programs.wait(first, for_hold=True).is_held
        second = programs.run(world.arguments("dare", "--resume"))
        assert programs.go_on(first).code == 0
        return second

    def limited(world: World, programs: Programs) -> Ended:
        done = subprocess.run(
            [*PROGRAM, *world.arguments("dare")], capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        )  # fmt: skip
        return Ended(done.returncode, done.stderr)

    def dangling(world: World) -> nullcontext:
        (world.run / "file").mkdir()
        world.out.symlink_to(world.run / "file" / "out")
        return nullcontext()

    @contextmanager
    def made(world: World) -> Iterator[None]:
        world.out.mkdir()
        (world.out / "model.safetensors").write_bytes(b"mine")
        yield
        assert (world.out / "model.safetensors").read_bytes() == b"mine"
        shutil.rmtree(world.out)

    yield Fault("no folder for the output", lambda world: str(world.run / "no"),
                _to(lambda world: world.run / "no" / "out"))  # fmt: skip
    yield Fault("a file in the place of the output's folder", lambda world: str(world.run / "file"),
                _to(lambda world: world.run / "file" / "out"), is_file,
                again=("--resume",))  # fmt: skip
    yield Fault("a folder that nobody writes to", lambda world: "/proc",
                _to(lambda world: Path("/proc/out")))  # fmt: skip
    yield Fault("an output that is there", lambda world: str(world.out), _merge(), made, keeps=True)
    yield Fault("a stranger's folder in the way", lambda world: ".out.partial", _merge(), stranger)
    yield Fault("a link in the replaced output", lambda world: "", _to(lambda world: world.out,
                "--force"), linked, may_pass=True)  # fmt: skip
    yield Fault("two merges into one output", lambda world: str(world.run), two)
    yield Fault("files that may not grow", lambda world: str(world.run), limited)
    yield Fault("an output that is a link to nothing", lambda world: "", _merge(), dangling,
                may_pass=True, again=())  # fmt: skip


FAULTS = [*_calls(), *_inputs(), *_notes(), *_changes(), *_outputs()]
