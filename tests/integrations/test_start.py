"""What the command lines on nlm do to start a host sooner."""

import gc
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from nlm.integrations import _start


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that says on its path when it was imported."""
    folder = tmp_path / "waiting_package"
    folder.mkdir()
    code = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\nvalue = 3\n"
    (folder / "__init__.py").write_text(code)
    (folder / "part.py").write_text("from waiting_package import value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder.name
    for name in ("waiting_package", "waiting_package.part"):
        sys.modules.pop(name, None)


def test_a_package_is_imported_when_it_is_asked_for(package: str, tmp_path: Path) -> None:
    mark = tmp_path / package / "imported"
    with _start.importing(package, "no_such_package_at_all"):
        assert not gc.isenabled()
        import waiting_package
    assert gc.isenabled() and "no_such_package_at_all" not in sys.modules
    assert find_spec(package) is not None and not mark.exists()
    assert waiting_package.value == 3 and mark.exists()
    assert type(waiting_package) is type(sys) and sys.modules[package] is waiting_package
    with pytest.raises(AttributeError, match="nothing"):
        _ = waiting_package.nothing


def test_threads_wait_for_one_another(package: str, tmp_path: Path) -> None:
    file = tmp_path / package / "__init__.py"
    file.write_text("import time\ntime.sleep(0.2)\n" + file.read_text())
    _start.postpone(package)
    module = sys.modules[package]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: module.value, range(4))) == [3] * 4


def test_two_threads_whose_imports_need_one_another_both_go_on(
    package: str, tmp_path: Path
) -> None:
    """As with packages that are not postponed: neither waits for ever."""
    file = tmp_path / package / "__init__.py"
    file.write_text(
        file.read_text() + "import time\ntime.sleep(0.4)\nimport needs_waiting_package\n"
    )
    (tmp_path / "needs_waiting_package.py").write_text(
        "import time\nimport waiting_package\ntime.sleep(0.2)\nfound = waiting_package.other\n"
    )
    file.write_text(file.read_text() + "other = 4\n")
    _start.postpone(package)
    module, found = sys.modules[package], {}

    def ask() -> None:
        found["asked"] = module.other

    def need() -> None:
        import needs_waiting_package

        found["needed"] = needs_waiting_package.found

    threads = [threading.Thread(target=each, daemon=True) for each in (ask, need)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    sys.modules.pop("needs_waiting_package", None)
    assert not any(thread.is_alive() for thread in threads)
    assert found == {"asked": 4, "needed": 4} and type(module) is type(sys)


def test_what_was_postponed_is_as_if_it_was_not(package: str) -> None:
    """Its specification and loader are the import system's; it can be imported anew."""
    _start.postpone(package)
    module = sys.modules[package]
    assert module.value == 3
    plain = find_spec("json")
    assert type(module.__spec__.loader) is type(plain.loader) is type(module.__loader__)
    assert importlib.reload(module) is module and "__waits__" not in vars(module)


def test_an_import_that_fails_is_tried_again(package: str, tmp_path: Path) -> None:
    file = tmp_path / package / "__init__.py"
    good = file.read_text()
    file.write_text("import no_such_package_at_all\n")
    _start.postpone(package)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        _ = sys.modules[package].value
    file.write_text(good + "# of another length than before\n")
    assert sys.modules[package].value == 3


def test_a_part_of_it_may_be_imported_first(package: str) -> None:
    with _start.importing(package):
        from waiting_package.part import value
    assert value == 3


def test_the_collector_stays_off_where_it_was() -> None:
    gc.disable()
    try:
        with _start.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.host
def test_mergekit_waits_for_no_adapters() -> None:
    """Its command is imported without PEFT's models, which are there where they are asked for."""
    pytest.importorskip("mergekit", reason="a host, of the extra [hosts]")
    code = (
        "import sys\nfrom nlm.integrations import _start\n"
        "with _start.importing('peft'):\n"
        "    from nlm.integrations.mergekit.command import command\n    command()\n"
        "assert 'peft.peft_model' not in sys.modules\n"
        "from mergekit import common\n"
        "assert common.peft.PeftModel.__module__ == 'peft.peft_model'\n"
        "import peft.tuners.lora.model\n"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
