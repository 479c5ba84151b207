"""Compile the C++ kernels with the machine's compiler at first use, and keep them in a cache.

The sources include neither Python.h nor a header of torch, so a compilation takes seconds.

**Compilers.** ``CXX`` if set, and then no other compiler. Else the first of c++, g++, clang++ whose
result loads. C++17 is needed: g++ 8 or clang 7 should do. Tried were g++ 11, g++ 12 and clang 14 on
x86-64 Linux. The flags for aarch64 and macOS are untested. Windows is not supported.

**The cache** is ``$CLR_OPTIM_CACHE_DIR``, else ``$XDG_CACHE_HOME/clr_optim``, else
``~/.cache/clr_optim`` (``~/Library/Caches/clr_optim`` on macOS). An entry is one file,
``<key>-<compiler>-<digest>.so``:

- *key*: a digest of the sources, the flags and the CPU (model and features). So machines that share
  a home never run code for another CPU.
- *compiler*: a digest of the compiler's path, size and time of change. Together with the CPU, the
  compiler decides what ``-march=native`` means. Reading these facts needs no subprocess. If no
  compiler is found, an entry of any compiler serves: `compile_ahead` may have run while an image
  was built, and its compiler may have been removed. Sources, flags and CPU must match even then.
- *digest*: of the file's bytes, checked before loading. Loading a truncated library can kill the
  process.

No file or directory is trusted that belongs to a user other than this one or root, or that other
users can write to. The same holds for every directory on the way to the cache, unless its sticky
bit keeps users from renaming each other's files, and for links of other users. If the cache cannot
be used, each process compiles the kernels for itself.

**OpenMP.** A second runtime would bring a second pool of threads. So the library is linked without
any: at load, its references bind to the runtime that torch has loaded, whatever the name of that
file. For pragmas, g++ calls GOMP_* functions, which the runtimes of GNU, LLVM and Intel all export.
clang calls __kmpc_* functions, which GNU's runtime does not export. If torch uses GNU's (Linux
wheels), a library from clang does not load, and the next compiler is tried. A source that calls
GOMP_parallel itself loads from either compiler.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ABI_VERSION = 10
"""The number that the library's ``int clr_abi_version()`` must return."""

SOURCE = Path(__file__).with_name("multi_tensor.cpp")
"""The file that is compiled; it may include any header of its folder."""

_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
# Rounding must be that of torch's for-loop step, so no compiler may choose where to fuse a*b+c.
_FLAGS += ["-ffp-contract=off"]
_DIGITS = 32  # hexadecimal digits of a SHA-256: 128 bits
_STALE_S = 3600.0  # the age at which an unfinished compilation counts as killed
_TIMEOUT_S = 300.0
_ADVICE = (
    "Install g++ 8 or newer (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install), or set CXX to a C++17 compiler."
)


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded; the message names the attempts and the remedy."""


class _Compiler(NamedTuple):
    words: list[str]  # the command, as in CXX="ccache g++"
    mark: str  # the compiler's part of an entry's name
    label: str  # the compiler's name in messages


_results: dict[Path, ctypes.CDLL | BuildError] = {}
_results_lock = threading.Lock()


def load(source: Path = SOURCE) -> ctypes.CDLL:
    """Return the compiled library, from the cache or compiled now; loaded once per process.

    Calls into the library release the GIL.

    Raises:
        BuildError: the library cannot be compiled or loaded. Later calls raise the same error at
            once, so that a machine without a compiler does not look for one at every step.
    """
    with _results_lock:
        if source not in _results:
            try:
                _results[source] = _obtain(source)[0]
            except BuildError as error:
                _results[source] = error
        result = _results[source]
    if isinstance(result, BuildError):
        raise BuildError(*result.args)
    return result


def compile_ahead(source: Path = SOURCE) -> Path:
    """Make sure that the cache has the library for this CPU, and return the entry's path.

    Raises:
        BuildError: the library cannot be compiled, or the cache cannot keep it.
    """
    _, entry, problem = _obtain(source)
    if entry is None:
        raise BuildError(f"compiled, but not kept: {problem}. CLR_OPTIM_CACHE_DIR moves the cache.")
    return entry


def describe(source: Path = SOURCE) -> dict[str, str]:
    """Describe the compiler, flags, cache and OpenMP runtime that `load` would use.

    Runs the compiler for its version, but compiles no kernels.

    Returns:
        ``compiler``, ``version``, ``flags``, ``target`` (the compiler's name for this CPU),
        ``cache``, ``problem`` (why the cache cannot be used, or empty), ``entry`` (its path, or
        empty), ``cached`` (``"yes"`` or ``"no"``) and ``openmp`` (the runtime for the kernels).
    """
    compilers = _compilers()
    required, optional = _flags()
    version = target = ""
    with contextlib.suppress(BuildError):
        command = compilers[0].words if compilers else ["c++"]
        version = _run([*command, "--version"]).partition("\n")[0]
        verbose = _run([*command, *required, "-E", "-v", "-x", "c++", os.devnull])
        # The driver repeats -march=native, but calls the compiler proper with the real name.
        if found := re.search(r"(?:-m(?:arch|cpu)=|-target-cpu )(?!native)([\w.+-]+)", verbose):
            target = found[1]
    try:
        openmp = _share_openmp()
    except BuildError as error:
        openmp = str(error)
    cache, problem = _cache(create=False)
    entry = "" if problem else str(next(_entries(cache, _key(source), compilers), ""))
    return {
        "compiler": compilers[0].label if compilers else "none found",
        "version": version,
        "flags": " ".join(required + optional),
        "target": target,
        "cache": str(cache),
        "problem": problem,
        "entry": entry,
        "cached": "yes" if entry else "no",
        "openmp": openmp,
    }


def _obtain(source: Path) -> tuple[ctypes.CDLL, Path | None, str]:
    """Return the library; and its entry, or None and the reason why the cache has no entry."""
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are for Linux and macOS")
    if not source.is_file():
        raise BuildError(f"{source} is missing: the installation is not complete")
    _share_openmp()
    key, compilers = _key(source), _compilers()
    cache, problem = _cache(create=True)
    in_cache = not problem
    if not problem:
        if found := _find(cache, key, compilers):
            return *found, ""
        with _locked(cache):
            if found := _find(cache, key, compilers):  # another process was quicker
                return *found, ""
            try:
                return *_compile(source, key, compilers, cache), ""
            except OSError as error:
                problem = f"{cache} cannot be written to ({error.strerror})"
                in_cache = False
            except BuildError as error:
                # Try once more elsewhere: this disk may be full, or mounted without running code.
                problem = f"a library compiled in {cache} does not load: {error}"
    # The temporary file may be deleted at once: a process keeps a mapped file without a name.
    try:
        return _compile(source, key, compilers, None)[0], None, problem
    except (OSError, BuildError) as error:
        note = "" if in_cache else f" The cache did not help: {problem}."
        raise BuildError(f"{error}{note}") from error


def _find(cache: Path, key: str, compilers: list[_Compiler]) -> tuple[ctypes.CDLL, Path] | None:
    for entry in _entries(cache, key, compilers):
        with contextlib.suppress(BuildError):  # for another libc, say: compile anew
            return _open(entry), entry
    return None


def _entries(cache: Path, key: str, compilers: list[_Compiler]) -> Iterator[Path]:
    """Yield the entries that may be loaded: complete files that no other user can write."""
    for mark in [compiler.mark for compiler in compilers] or ["*"]:
        for entry in sorted(cache.glob(f"{key}-{mark}-*.so")):
            try:
                # Follow no symbolic link, wait for no pipe; and read the same file that is checked.
                descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or _distrust(status):
                    continue
                with open(descriptor, "rb", closefd=False) as file:
                    data = file.read()
            except OSError:
                continue
            finally:
                os.close(descriptor)
            if entry.stem.rpartition("-")[2] == _digest(data):
                yield entry


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        version = library.clr_abi_version()
    except (OSError, AttributeError) as error:
        raise BuildError(f"the library does not load: {error}") from error
    if version != ABI_VERSION:
        raise BuildError(f"the library has ABI {version}, not {ABI_VERSION}")
    return library


def _compile(
    source: Path, key: str, compilers: list[_Compiler], cache: Path | None
) -> tuple[ctypes.CDLL, Path]:
    """Compile with the first compiler whose result loads, and store the result in the cache.

    Without a cache, the returned path no longer exists.
    """
    if not compilers:
        wanted = os.environ.get("CXX")
        reason = f"CXX={wanted} is not there" if wanted else "no c++, g++ or clang++ on PATH"
        raise BuildError(f"there is no C++ compiler: {reason}. {_ADVICE}")
    failures = []
    # Work inside the cache, so that storing is a rename within one file system.
    with tempfile.TemporaryDirectory(
        prefix=".build-", dir=cache, ignore_cleanup_errors=True
    ) as work:
        for number, compiler in enumerate(compilers):
            # One path per compiler: the loader returns the same library for the same path.
            built = Path(work, f"kernels{number}.so")
            try:
                _make(compiler, source, built)
                library = _open(built)
            except BuildError as error:
                failures.append(f"  {compiler.label}: {error}")
                continue
            return library, built if cache is None else _store(built, cache, key, compiler)
    tried = "\n".join(failures)
    raise BuildError(f"the C++ kernels could not be compiled. Tried:\n{tried}\n{_ADVICE}")


def _make(compiler: _Compiler, source: Path, built: Path) -> None:
    required, optional = _flags()
    compiled = str(built.with_suffix(".o"))
    compilation = [*compiler.words, "-c", str(source), "-o", compiled]
    try:
        _run([*compilation, *required, *optional])
    except BuildError:
        if not optional:
            raise
        _run([*compilation, *required])
    # A second command, since only a link without -fopenmp leaves the OpenMP runtime open.
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    _run([*compiler.words, "-shared", compiled, *undefined, "-o", str(built)])


def _run(command: list[str]) -> str:
    """Run a command and return the text that it prints on both streams."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"`{shlex.join(command)}`: {error}") from error
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-12:])[-2000:] or "no output"
        raise BuildError(f"`{shlex.join(command)}` exited with {done.returncode}: {tail}")
    return done.stdout


def _store(built: Path, cache: Path, key: str, compiler: _Compiler) -> Path:
    """Make a library the only entry of its key and compiler, by one rename; return the entry."""
    built.chmod(0o600)
    with built.open("rb") as file:
        name = f"{key}-{compiler.mark}-{_digest(file.read())}.so"
        os.fsync(file.fileno())
    entry = cache / name
    os.replace(built, entry)
    for other in cache.glob(f"{key}-{compiler.mark}-*.so"):  # a damaged entry
        if other != entry:
            with contextlib.suppress(OSError):  # gone already, or a directory
                other.unlink()
    for leftover in cache.glob(".build-*"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime < time.time() - _STALE_S:
                shutil.rmtree(leftover, ignore_errors=True)
    return entry


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process compile while the other processes wait for its entry.

    The lock only saves work. If the file system has no locks, or the holder hangs, all processes
    compile and the last rename wins. The lock is on the directory, so no lock file is left behind.
    """
    import fcntl  # Windows has no fcntl, and must still import this module

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            deadline = time.monotonic() + _TIMEOUT_S
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield


def _cache(*, create: bool) -> tuple[Path, str]:
    """Return the cache's directory, and why the cache cannot be used (or an empty string)."""
    own, xdg = os.environ.get("CLR_OPTIM_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        cache = Path(os.path.abspath(os.path.expanduser(own)))
    elif os.path.isabs(xdg):  # the specification says to ignore relative paths
        cache = Path(xdg, "clr_optim")
    else:
        home = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
        cache = Path(os.path.expanduser(home), "clr_optim")
        if not cache.is_absolute():
            return cache, "there is no home directory"
    try:
        if create:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not cache.exists():
            return cache, ""
        distrust = _distrust(cache.stat()) or _distrust_way(cache)
    except OSError as error:
        return cache, f"{cache} cannot be used ({error.strerror})"
    return cache, f"{cache} {distrust}" if distrust else ""


def _distrust(status: os.stat_result) -> str:
    """Return why another user may have written the file. Root can write anywhere, so is trusted."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written to by others (chmod go-w would mend that)"
    return ""


def _distrust_way(directory: Path) -> str:
    """Return why another user could replace the directory."""
    for place in (directory, *directory.parents):
        status = place.lstat()
        if stat.S_ISLNK(status.st_mode):
            if status.st_uid not in (os.geteuid(), 0):
                return f"is reached by {place}, a link of another user's (uid {status.st_uid})"
            if problem := _distrust_way(place.parent / os.readlink(place)):
                return problem
        elif status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"lies in {place}, where any user can replace it (chmod o-w would mend that)"
    return ""


def _compilers() -> list[_Compiler]:
    wanted = os.environ.get("CXX", "").strip()
    found: dict[str, _Compiler] = {}
    for command in [wanted] if wanted else ["c++", "g++", "clang++"]:
        words = command.split()
        path = shutil.which(words[0])
        if path is None:
            continue
        real = os.path.realpath(path)  # c++ and g++ are often one
        status = os.stat(real)
        mark = _digest(repr((words[1:], real, status.st_size, status.st_mtime_ns)).encode())[:16]
        label = f"CXX={command}" if wanted else path
        found.setdefault(real, _Compiler([path, *words[1:]], mark, label))
    return list(found.values())


def _flags() -> tuple[list[str], list[str]]:
    """Return the required flags, and flags to leave out if the compiler refuses them."""
    arm = platform.machine() in ("aarch64", "arm64")
    openmp = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    required = [*_FLAGS, *openmp, "-mcpu=native" if arm else "-march=native"]
    # Compilers prefer vectors of 256 bits even if the CPU has 512.
    return required, ["-mprefer-vector-width=512"] if "avx512f" in _cpu().split() else []


def _key(source: Path) -> str:
    digest = hashlib.sha256(repr((ABI_VERSION, source.name, _flags(), _cpu())).encode())
    for file in sorted([*source.parent.glob("*.cpp"), *source.parent.glob("*.h")]):
        digest.update(repr((file.name, file.read_bytes())).encode())
    return digest.hexdigest()[:_DIGITS]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


@functools.cache
def _cpu() -> str:
    """Return the facts about the CPU on which -march=native depends, one per line."""
    facts = [sys.platform, platform.machine()]
    if sys.platform == "darwin":
        for name in (b"machdep.cpu.brand_string", b"machdep.cpu.features"):
            text, size = ctypes.create_string_buffer(4096), ctypes.c_size_t(4096)
            if ctypes.CDLL(None).sysctlbyname(name, text, ctypes.byref(size), None, 0) == 0:
                facts.append(text.value.decode(errors="replace"))
        return "\n".join(facts)
    # Read the first core only: Linux reports features that all cores have. Leave out clock rates,
    # which change from one reading to the next.
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if not line.strip():
                break
            name, _, value = (part.strip() for part in line.partition(":"))
            if name in ("vendor_id", "cpu family", "model", "flags", "Features") or re.match(
                r"CPU (implementer|architecture|variant|part)$", name
            ):
                facts.append(f"{name}: {value}")
    if len(facts) == 2:
        facts.append(platform.node())  # an unknown CPU: no other machine may share the entry
    return "\n".join(facts)


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _openmp_of(library: ctypes.CDLL) -> str | None:
    """Return the file of the OpenMP runtime that `library` uses, or None."""
    info = _SymbolInfo()
    try:
        address = ctypes.cast(library.omp_get_max_threads, ctypes.c_void_p)
    except AttributeError:
        return None
    found = ctypes.CDLL(None).dladdr(address, ctypes.byref(info))
    return os.fsdecode(info.file) if found and info.file else None


def _torch_library() -> str:
    import torch

    return str(torch._C.__file__)


def _share_openmp() -> str:
    """Open torch's OpenMP runtime to the libraries loaded from now on; return its path.

    The loader knows the file, whatever its name: libgomp.so.1, torch.libs/libgomp-a34b3233.so.1 or
    Intel's. If torch uses no OpenMP, the system's runtime is loaded.
    """
    names = [_openmp_of(ctypes.CDLL(_torch_library()))]
    if names[0] is None:
        names = ["libomp.dylib"] if sys.platform == "darwin" else ["libgomp.so.1", "libomp.so.5"]
    for name in names:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # the same file again: not a second copy
            return _openmp_of(ctypes.CDLL(None)) or str(name)
    raise BuildError(f"no OpenMP runtime loads: tried {', '.join(map(str, names))}")
