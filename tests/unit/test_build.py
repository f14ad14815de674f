"""The build of the CPU backend's library: once, by one process at a time, and its failures in one line."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from unit.compiled import compiled

from bucketmoo_ds.ops import build

PRINT_PATH = "from bucketmoo_ds.ops import build; print(build.cpu_library())"

pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="needs a C++ compiler and torch's headers"),
    pytest.mark.skipif(
        (build._PACKAGE / build.FOLDER / "libbucketmoo_cpu.so").exists(),
        reason="a wheel's library is installed: nothing is built on first use",
    ),
]


@dataclasses.dataclass(frozen=True)
class Built:
    """A folder into which two processes have built at once, with what, and the paths that they have printed."""

    folder: Path
    compiler: Path
    paths: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The compiler writes what it is asked for, after a moment: what the true one makes, all other tests run."""
    folder = tmp_path_factory.mktemp("build folder")  # with a space, which a shell would take for two names
    compiler = tmp_path_factory.mktemp("compiler") / "quick"
    words = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && sleep 0.3 && echo made > "$2"; shift; done'
    compiler.write_text(f"#!/bin/sh\n{words}\n")
    compiler.chmod(0o755)
    root = str(Path(build.__file__).parents[2])
    environment = os.environ | {build.CACHE: str(folder), "PYTHONPATH": root, "CXX": shlex.quote(str(compiler))}
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
    return Built(folder, compiler, paths)


@pytest.fixture
def built_there(built: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    """And this process would build there too."""
    monkeypatch.setenv(build.CACHE, str(built.folder))
    monkeypatch.setenv("CXX", shlex.quote(str(built.compiler)))
    return built


def test_two_processes_at_once_give_one_library(built: Built) -> None:
    assert built.paths[0] == built.paths[1]
    assert [str(path) for path in built.folder.rglob("*.so")] == [built.paths[0]]
    left = {path.name for path in Path(built.paths[0]).parent.iterdir()}
    assert left == {"cpu.lock", "libbucketmoo_cpu.so"}, "what was made on the way is gone"


def test_the_second_call_does_not_build(built_there: Built) -> None:
    before = Path(built_there.paths[0]).stat()
    assert build.cpu_library() == built_there.paths[0]
    after = Path(built_there.paths[0]).stat()
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


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(build.CACHE, raising=False)
    monkeypatch.setattr(Path, "home", home)
    message = _failure()
    assert "no home folder" in message
    assert build.CACHE in message


@pytest.mark.parametrize(
    ("cxx", "words"),
    [
        ("ccache g++", ["{folder}/ccache", "{g++}"]),
        ("{folder}/ccache g++ -m64", ["{folder}/ccache", "{g++}", "-m64"]),
        ("g++ -m64 '-DNAME=a b'", ["{g++}", "-m64", "-DNAME=a b"]),
        ("'{folder}/my g++'", ["{folder}/my g++"]),
        ("", ["{g++}"]),
        (" ", ["{g++}"]),
    ],
)
def test_the_words_of_cxx(cxx: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ccache", "my g++"):
        (tmp_path / name).write_text("#!/bin/sh\nexec \"$@\"\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    known = {"folder": str(tmp_path), "g++": str(shutil.which("g++"))}
    monkeypatch.setenv("CXX", cxx.format(**known))
    expected = tuple(word.format(**known) for word in words)
    library = build._cpu()
    assert library.compiler == expected
    assert all(command[: len(expected)] == expected for command in (*library.commands.values(), library.link[0]))
    build._fingerprint(library)  # it starts the compiler, to learn its version


@pytest.mark.parametrize("cxx", ["g++ 'unbalanced", "ccache", "ccache no-such-compiler", "no-such-compiler -m64"])
def test_a_cxx_that_names_no_compiler(cxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ccache").write_text("#!/bin/sh\n")
    (tmp_path / "ccache").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", cxx)
    assert cxx in _failure()


def test_a_library_that_is_there_is_taken_from_a_place_that_cannot_be_written(
    built_there: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", cannot)
    monkeypatch.setattr(build, "_locked", cannot)
    assert build.cpu_library() == built_there.paths[0]


@pytest.fixture
def quick_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is compiled: the library is a file. Returns what was built."""
    made: list[str] = []

    def write(library: build.Library, folder: Path) -> None:
        made.append(library.file)
        (folder / library.file).write_text("")

    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.setattr(build, "_build", write)
    return made


def test_a_builder_that_was_killed_is_not_waited_for(tmp_path: Path, quick_build: list[str]) -> None:
    folder = tmp_path / build._fingerprint(build._cpu())
    (folder / "tmp-of-a-builder").mkdir(parents=True)
    (folder / "tmp-of-a-builder" / "libbucketmoo_cpu.so").write_text("half of a libr")
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('has it')"
    command = [sys.executable, "-c", f"{hold}; sys.stdout.flush(); time.sleep(600)", str(folder / "cpu.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"has it\n"
        builder.kill()
    assert build.cpu_library() == str(folder / "libbucketmoo_cpu.so")
    assert quick_build == ["libbucketmoo_cpu.so"], "built, as the other one's half is not taken for a library"


@pytest.mark.parametrize("hangs", [True, False])
def test_a_builder_that_lives_is_waited_for_but_not_for_ever(
    hangs: bool, tmp_path: Path, quick_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / build._fingerprint(build._cpu())
    folder.mkdir()
    monkeypatch.setattr(build, "PATIENCE", 1.0 if hangs else 60.0)
    with (folder / "cpu.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def finish() -> None:
            (folder / "libbucketmoo_cpu.so").write_text("")
            fcntl.flock(other, fcntl.LOCK_UN)

        if not hangs:
            threading.Timer(0.5, finish).start()
        began = time.monotonic()
        build.cpu_library()
        assert time.monotonic() - began >= (1.0 if hangs else 0.4)
    assert quick_build == (["libbucketmoo_cpu.so"] if hangs else []), "what the other one has made is taken"


def test_without_locks_each_builds(tmp_path: Path, quick_build: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no fcntl, and some network file systems no locks."""
    monkeypatch.setattr(build, "fcntl", None)
    build.cpu_library()
    assert len(quick_build) == 1

    def no_locks(file: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.undo()
    monkeypatch.setattr(build.fcntl, "flock", no_locks)
    with build._locked(tmp_path / "other.lock"):
        pass


def test_other_sources_or_flags_are_another_library(tmp_path: Path) -> None:
    library = build._cpu()
    same, other, common = tmp_path / "same", tmp_path / "other", tmp_path / "common"
    for folder in (same, other):
        shutil.copytree(library.folder, folder)
    shutil.copytree(library.common, common)
    for header in (other / "kernels_impl.h", common / "min_norm.h"):
        with header.open("a") as file:
            file.write("\n")

    def fingerprint(folder: Path, **changes: object) -> str:
        return build._fingerprint(build.Library(**{**vars(library), "folder": folder, **changes}))

    assert fingerprint(same) == build._fingerprint(library), "wherever they lie"
    commands = {name: (*command, "-g") for name, command in library.commands.items()}
    changed = fingerprint(other), fingerprint(same, common=common), fingerprint(same, commands=commands)
    assert len({fingerprint(same), *changed}) == 4


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((7, 5), None), ((8, 0), "80"), ((8, 6), "80"), ((8, 9), "80"), ((9, 0), "90"), ((10, 0), "100"),
        ((10, 3), "100"), ((11, 0), None), ((12, 0), "120"), ((12, 1), "120"), ((13, 0), "120"),
    ],
)  # fmt: skip
def test_which_code_a_device_runs(capability: tuple[int, int], architecture: str | None) -> None:
    assert build.architecture_of(capability) == architecture


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets to choose from are on x86-64")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
@pytest.mark.parametrize("source", ["kernels_avx2.cpp", "kernels_avx512.cpp"])
def test_no_code_of_an_instruction_set_may_replace_that_of_another(source: str) -> None:
    """Of weak definitions of one name the linker keeps any: one with AVX-512 would run where there is none."""
    library = build._cpu()
    command = [*library.commands[source], "-c", str(library.folder / source)]
    # Of torch, whose headers are many, the version stands for all files.
    depends_on = (library.folder, library.common, Path(torch.version.__file__))
    made, _ = compiled(command, f"{source}.o", depends_on)
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
