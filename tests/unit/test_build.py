"""The build of the CPU backend's library: once, by one process at a time, and its failures in one line."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bucketmoo_ds.ops import build

PRINT_PATH = "from bucketmoo_ds.ops import build; print(build.cpu_library())"

pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="needs a C++ compiler and torch's headers"),
    pytest.mark.skipif(
        (build._PACKAGE / build.FOLDER / "libbucketmoo_cpu.so").exists(),
        reason="a wheel's library is installed: nothing is built on first use",
    ),
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder into which two processes have built at once, and the paths that they have printed."""
    folder = tmp_path_factory.mktemp("build folder")  # with a space, which ninja would take for two names
    root = str(Path(build.__file__).parents[2])
    environment = os.environ | {build.CACHE: str(folder), "PYTHONPATH": root}
    command = [sys.executable, "-c", PRINT_PATH]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        paths.append(out.strip())
    return folder, paths


def test_two_processes_at_once_give_one_library(built: tuple[Path, list[str]]) -> None:
    folder, paths = built
    assert paths[0] == paths[1]
    assert [str(path) for path in folder.rglob("*.so")] == [paths[0]]
    left = {path.name for path in Path(paths[0]).parent.iterdir()}
    assert left == {"cpu.lock", "libbucketmoo_cpu.so"}, "what was made on the way is gone"


def test_the_second_call_does_not_build(built: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, paths = built
    before = Path(paths[0]).stat()
    monkeypatch.setenv(build.CACHE, str(folder))
    assert build.cpu_library() == paths[0]
    after = Path(paths[0]).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    message = _failure()
    assert "no C++ compiler /nonexistent" in message
    assert "CXX" in message
    assert not build.can_build()


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho the compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    message = _failure()
    (log,) = (tmp_path / "cache").rglob("cpu.log")
    assert str(log) in message
    assert "the compiler is broken" in log.read_text()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"  # where a folder would have to be: root may write to any folder
    file.write_text("")
    monkeypatch.setenv(build.CACHE, str(file))
    message = _failure()
    assert build.CACHE in message
    assert str(file) in message


def test_other_sources_or_flags_are_another_library(tmp_path: Path) -> None:
    library = build._cpu()
    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        shutil.copytree(library.folder, folder)
    with (other / "kernels_impl.h").open("a") as file:
        file.write("\n")

    def fingerprint(folder: Path, **changes: object) -> str:
        return build._fingerprint(build.Library(**{**vars(library), "folder": folder, **changes}))

    assert fingerprint(same) == build._fingerprint(library), "wherever they lie"
    commands = {name: (*command, "-g") for name, command in library.commands.items()}
    assert len({fingerprint(same), fingerprint(other), fingerprint(same, commands=commands)}) == 3


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets to choose from are on x86-64")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize("source", ["kernels_avx2.cpp", "kernels_avx512.cpp"])
def test_no_code_of_an_instruction_set_may_replace_that_of_another(source: str, tmp_path: Path) -> None:
    """Of weak definitions of one name the linker keeps any: one with AVX-512 would run where there is none."""
    library = build._cpu()
    made = tmp_path / "kernels.o"
    command = [*library.commands[source], "-c", str(library.folder / source), "-o", str(made)]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "--demangle", str(made)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2)[-2:] for line in listed.splitlines()]
    assert any(kind == "T" and "_kernels" in name for kind, name in symbols)
    # Of the standard library too: a template of it that is compiled with an instruction set is code of that set.
    assert not [name for kind, name in symbols if kind in "WVu"]


def _failure() -> str:
    with pytest.raises(build.BuildError) as caught:
        build.cpu_library()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
