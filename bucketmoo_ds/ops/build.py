"""Builds the compiled backends: into a wheel (setup.py), or on first use into a cache.

Imports nothing of this package, so that setup.py can load this file alone. A library is built once for all processes of
a machine: they wait for one another, and it appears under its name only when it is complete. Whatever stands in the way
(no home folder, no compiler, a read-only place) is a `BuildError`, on which the next backend is taken.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CACHE = "BUCKETMOO_BUILD_DIR"
FOLDER = "lib"  # of a wheel's libraries, in the package
PATIENCE = 600.0  # seconds that another process may build; then it hangs, and this one builds too
# Programs that stand before the compiler in CXX.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "buildcache")

# The stable ABI of the oldest PyTorch that we support: a library serves all later ones.
_COMMON = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_CXX_FLAGS = (*_COMMON, "-fPIC", "-fvisibility=hidden")
_KERNEL_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-maybe-uninitialized")
_CPU_SOURCES = {
    "ops.cpp": (),
    # Contraction of products and sums would differ from machine to machine.
    "min_norm.cpp": ("-ffp-contract=off",),
    "kernels_baseline.cpp": _KERNEL_FLAGS,
}
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_X86_SOURCES = {
    "kernels_avx2.cpp": (*_KERNEL_FLAGS, "-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512.cpp": (*_KERNEL_FLAGS, "-mavx2", "-mfma", "-mf16c", *_AVX512),
}
CUDA_SOURCES = (
    "bindings.cpp",
    "gram.cu",
    "add_partials.cu",
    "accumulate.cu",
    "min_norm.cu",
    "combine.cu",
    "resolve.cu",
    "resolve_bfloat16.cu",
    "resolve_float16.cu",
    "resolve_float.cu",
)
# Compiled to machine code, which devices of the same major compute capability run, from this one on.
ARCHITECTURES = ("80", "90", "100", "120")
NVCC_FLAGS = (*_COMMON, "-Xcompiler=-fPIC,-fvisibility=hidden")

_PACKAGE = Path(__file__).resolve().parents[1]


class BuildError(RuntimeError):
    """A library cannot be built here; the message is one line that says why."""


@dataclass(frozen=True)
class Library:
    """What a library is made of.

    Attributes:
        name: of the library.
        folder: where its sources lie.
        common: where the headers lie that it shares with the other one.
        commands: for each source the command that compiles it, without input and output.
        link: the command that links them, and what to link them with.
        compiler: what compiles them; its `--version` tells one from another.
    """

    name: str
    folder: Path
    common: Path
    commands: Mapping[str, tuple[str, ...]]
    link: tuple[tuple[str, ...], tuple[str, ...]]
    compiler: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"libbucketmoo_{self.name}.so"


def cpu_library(*, installed: bool = True) -> str:
    """Returns the path of the CPU backend's library, which is built first if need be.

    Args:
        installed: whether one that came with a wheel will do.

    Raises:
        BuildError: there is no compiler, it fails, or there is no place to write to.
    """
    return _find_or_build("cpu", _cpu, installed)


def architecture_of(capability: tuple[int, int]) -> str | None:
    """Returns which of `ARCHITECTURES` a device of this compute capability runs, or `None`: machine code of its major
    version; or, where it is newer than all of them, what the driver makes of the last one's PTX."""
    majors = {divmod(int(each), 10): each for each in ARCHITECTURES}
    own = [each for version, each in majors.items() if version[0] == capability[0] and version <= capability]
    return own[-1] if own else ARCHITECTURES[-1] if capability > max(majors) else None


def cuda_library(architectures: Sequence[str] = ARCHITECTURES, *, installed: bool = True) -> str:
    """Returns the path of the CUDA backend's library, which is built first if need be.

    Args:
        architectures: what it is built for where it has to be: those of the devices at hand build sooner than all.
        installed: whether one that came with a wheel will do.

    Raises:
        BuildError: torch is built without CUDA, there is no compiler, it fails, or there is no place to write to.
    """
    return _find_or_build("cuda", functools.partial(_cuda, architectures), installed)


def can_build() -> bool:
    """Whether there is what the CPU backend's library takes to build."""
    try:
        _cpu()
    except BuildError:
        return False
    return True


def build_into(folder: Path) -> list[str]:
    """Builds what can be built here into a folder; returns a line for each library, for people."""
    lines = []
    for describe in (_cpu, _cuda):
        try:
            library = describe()
            _build(library, folder)
            lines.append(f"bucketmoo_ds: built {library.file}")
        except BuildError as error:
            lines.append(f"bucketmoo_ds: the {describe.__name__[1:]} backend is skipped: {error}")
    return lines


def _cpu() -> Library:
    compiler = _compiler()
    sources: dict[str, tuple[str, ...]] = dict(_CPU_SOURCES)
    if platform.machine() == "x86_64":
        sources |= _X86_SOURCES
    torch = _torch_folder()
    commands = {name: (*compiler, *_CXX_FLAGS, f"-I{torch}/include", *flags) for name, flags in sources.items()}
    return Library(
        "cpu", _sources("cpu"), _sources("common"), commands, ((*compiler, "-shared"), _linked(torch)), compiler
    )


def _cuda(architectures: Sequence[str] = ARCHITECTURES) -> Library:
    torch = _torch_folder()
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        raise BuildError("torch is built without CUDA")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "")) / "bin"))
    if nvcc is None:
        raise BuildError("nvcc is neither on the path nor in CUDA_HOME/bin: install the CUDA toolkit")
    compiler = _compiler()
    include = f"-I{torch}/include"
    host = (*compiler, *_CXX_FLAGS, include)
    # nvcc takes the path of a compiler, without launcher and flags.
    behind = next(word for word in compiler if Path(word).name not in LAUNCHERS)
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    # And PTX, of which the driver makes code for newer devices.
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    device = (nvcc, f"-ccbin={behind}", *NVCC_FLAGS, *targets, include)
    commands = {name: device if name.endswith(".cu") else host for name in CUDA_SOURCES}
    link = (nvcc, f"-ccbin={behind}", "-shared", "-cudart=static"), (*_linked(torch), "-ltorch_cuda")
    return Library("cuda", _sources("cuda"), _sources("common"), commands, link, (nvcc,))


def _linked(torch: Path) -> tuple[str, ...]:
    return (f"-L{torch}/lib", "-ltorch", "-ltorch_cpu")


def _sources(name: str) -> Path:
    """Returns a folder of sources: in the package where it is installed, beside it in a checkout."""
    for folder in (_PACKAGE / "csrc" / name, _PACKAGE.parent / "csrc" / name):
        if folder.is_dir():
            return folder
    raise BuildError(f"the sources csrc/{name} are not installed")


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError("torch is not installed")
    return Path(found.origin).parent


def _compiler() -> tuple[str, ...]:
    """Returns the C++ compiler's words: CXX may have a launcher before it, and flags behind it."""
    if sys.platform != "linux":
        raise BuildError(f"compiled backends are for Linux, not for {sys.platform}")
    given = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX = {given}: cannot be read ({error}): name a C++ compiler with it") from error
    # A launcher, and what it launches, must be there.
    needed = 2 if Path(words[0]).name in LAUNCHERS else 1
    for place in range(needed):
        found = shutil.which(words[place]) if place < len(words) else None
        if found is None:
            raise BuildError(f"there is no C++ compiler {given}: install g++ 12 or newer, or name another with CXX")
        words[place] = found
    return tuple(words)


def _find_or_build(name: str, describe: Callable[[], Library], installed: bool) -> str:
    of_the_wheel = _PACKAGE / FOLDER / f"libbucketmoo_{name}.so"
    if installed and of_the_wheel.exists():
        return str(of_the_wheel)
    library = describe()
    folder = _cache() / _fingerprint(library)
    built = folder / library.file
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{library.name}.lock"):
                if not built.exists():
                    _build(library, folder)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written ({error}): name another folder with {CACHE}") from error
    return str(built)


def _cache() -> Path:
    given = os.environ.get(CACHE)
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "bucketmoo_ds"
    except RuntimeError as error:
        raise BuildError(f"there is no home folder to build in ({error}): name a folder with {CACHE}") from error


def _fingerprint(library: Library) -> str:
    """Returns what tells a library from one of other sources, flags, compiler or torch."""
    try:
        version = subprocess.run([*library.compiler, "--version"], capture_output=True, check=False).stdout
    except OSError as error:
        raise BuildError(f"{library.compiler[0]} does not start ({error}): name another compiler with CXX") from error
    made_of = hashlib.sha256(version + repr((sorted(library.commands.items()), library.link)).encode())
    for path in (*sorted(library.folder.iterdir()), *sorted(library.common.iterdir())):
        if path.is_file():
            made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    return made_of.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process of this machine in at a time. One that dies lets go, and one that hangs is waited for no longer
    than `PATIENCE`: two at once cost time and do no harm, as each builds in a folder of its own."""
    with path.open("w") as file:
        end = time.monotonic() + PATIENCE
        while not _taken(file.fileno()) and time.monotonic() < end:
            time.sleep(0.1)
        yield


def _taken(file: int) -> bool:
    """Takes the lock; `False` where another process has it. Where files have no locks everybody has it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system
        pass
    return True


def _build(library: Library, folder: Path) -> None:
    """Compiles the sources side by side, and links them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        objects = {name: f"{made}/{name}.o" for name in library.commands}
        compiles = [
            (*command, "-c", str(library.folder / name), "-o", objects[name])
            for name, command in library.commands.items()
        ]
        link, linked = library.link
        links = (*link, *objects.values(), "-o", f"{made}/{library.file}", *linked)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = [said for said in pool.map(_failure, compiles) if said] or [_failure(links)]
        if any(failures):
            log = folder / f"{library.name}.log"
            log.write_text("\n".join(failures))
            raise BuildError(f"the compiler fails on {library.folder}; it says why in {log}")
        os.replace(f"{made}/{library.file}", folder / library.file)


def _failure(command: Sequence[str]) -> str:
    """Runs a compiler; returns "", or what it says where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"{command[0]} does not start: {error}"
    return f"{shlex.join(command)}\n{done.stdout}{done.stderr}" if done.returncode else ""
