"""Compilation and cache of the native kernels, with a source of four functions."""

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from clr_optim.kernels.native import build

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no native kernels on Windows"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]

SOURCE = """
#include "team.h"
extern "C" int clr_abi_version() { return ABI; }
extern "C" int team(int threads) {
  int size = 0;
#pragma omp parallel num_threads(threads)
#pragma omp master
  size = omp_get_num_threads();
  return size;
}
"""
HEADER = f'extern "C" int omp_get_num_threads();\n#define ABI {build.ABI_VERSION}\n'

# A process that loads the library without importing torch, which takes seconds. Arguments:
# build.py, the source, and the library whose OpenMP is shared, in the place of torch.
WORKER = """
import ctypes, importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
sys.modules["build"] = build
spec.loader.exec_module(build)
source, torch_library = build.Path(sys.argv[2]), sys.argv[3]
build._torch_library = lambda: torch_library

def threads():
    return len(os.listdir("/proc/self/task"))

def runtimes():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
"""


def compiled(*arguments):
    subprocess.run([COMPILER, "-shared", "-fPIC", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def openmp_host(tmp_path_factory):
    """Make a library that is linked against the compiler's OpenMP, in the place of torch."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "team.h").write_text(HEADER)
    (folder / "host.cpp").write_text(SOURCE)
    compiled("-fopenmp", folder / "host.cpp", "-o", folder / "host.so")
    return folder / "host.so"


@pytest.fixture
def source(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/team.h").write_text(HEADER)
    path = tmp_path / "src/kernels.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test an empty cache and temporary folder, and no remembered results."""
    monkeypatch.setattr(build, "_results", {})
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "cache"
    assert not list((tmp_path / "tmp").iterdir()), "something was left behind"


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    return lambda: monkeypatch.setenv("PATH", str(tmp_path / "src"))


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def forget():
    build._results.clear()


def entries(cache):
    found = list(cache.iterdir())
    assert all(path.suffix == ".so" for path in found), found
    return found


def start(code, source, host, **options):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER + textwrap.dedent(code), build.__file__, source, host],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def output(process):
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    return text.split()


def test_load_compiles_once_and_keeps_one_private_entry(source, cache):
    before = os.umask(0)
    try:
        library = build.load(source)
    finally:
        os.umask(before)
    assert library.team(2) == 2
    assert build.load(source) is library
    (entry,) = entries(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert build.compile_ahead(source) == entry


def test_warm_load_starts_no_process(source, monkeypatch):
    entry = build.compile_ahead(source)
    changed = entry.stat().st_mtime_ns

    def refuse(*args, **kwargs):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    assert build.load(source).team(1) == 1
    assert entry.stat().st_mtime_ns == changed


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_eight_processes_at_once(source, cache, tmp_path, openmp_host, locks):
    code = """
        if not {locks}:  # as on some network file systems
            import fcntl
            def flock(*args): raise OSError("no locks")
            fcntl.flock = flock
        print("ready", flush=True)
        while not os.path.exists({go!r}):
            time.sleep(0.001)
        made = []
        make = build._make
        build._make = lambda *args: made.append(args) or make(*args)
        print(build.load(source).clr_abi_version(), len(made))
    """.format(locks=locks == "locks", go=str(tmp_path / "go"))
    processes = [start(code, source, openmp_host) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    versions, made = zip(*[output(process) for process in processes], strict=True)
    assert versions == (str(build.ABI_VERSION),) * 8
    if locks == "locks":
        assert sum(map(int, made)) == 1
    (entry,) = entries(cache)
    assert build.compile_ahead(source) == entry


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "altered", "renamed", "a link", "a dead link", "a pipe", "a folder"],
)
def test_damaged_entry_is_rebuilt(source, cache, tmp_path, damage):
    entry = build.compile_ahead(source)
    data = entry.read_bytes()
    entry.unlink()  # a new file each time: this process has mapped the old one
    if damage == "a link":
        (tmp_path / "elsewhere").write_bytes(data)
        entry.symlink_to(tmp_path / "elsewhere")
    elif damage == "a dead link":
        entry.symlink_to(tmp_path / "nowhere")
    elif damage == "a pipe":
        os.mkfifo(entry, 0o600)
    elif damage == "a folder":
        entry = entry.with_name(entry.name.replace(entry.stem.split("-")[2], "0" * 32))
        entry.mkdir()
    elif damage == "renamed":
        entry.with_name(entry.name.replace(entry.stem.split("-")[2], "0" * 32)).write_bytes(data)
    else:
        middle = len(data) // 2
        altered = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        bad = {"truncated": data[:middle], "empty": b"", "altered": altered}[damage]
        entry.write_bytes(bad)
    assert build.load(source).team(1) == 1
    if damage == "a folder":
        entry.rmdir()  # only files are deleted as stale
    (rebuilt,) = entries(cache)
    assert not rebuilt.is_symlink()
    assert build._digest(rebuilt.read_bytes()) == rebuilt.stem.split("-")[2]


def test_a_change_of_source_header_or_compiler_compiles_anew(source, cache, tmp_path, monkeypatch):
    compiler = script(tmp_path / "bin/my-c++", f'exec {COMPILER} "$@"')
    monkeypatch.setenv("CXX", str(compiler))
    changes = [
        lambda: None,
        lambda: source.write_text(SOURCE + "\n"),
        lambda: source.with_name("team.h").write_text(HEADER + "\n"),
        lambda: os.utime(compiler, ns=(0, 0)),
        lambda: monkeypatch.setenv("CXX", f"{compiler} -g0"),
    ]
    for count, change in enumerate(changes, start=1):
        change()
        build.compile_ahead(source)
        assert len(entries(cache)) == count


def test_entry_of_another_cpu_is_not_used(source, cache, monkeypatch, no_compiler):
    entry = build.compile_ahead(source)
    path = os.environ["PATH"]
    no_compiler()
    other = build._cpu() + "\nmodel: another"
    monkeypatch.setattr(build, "_cpu", lambda: other)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.compile_ahead(source)
    monkeypatch.setenv("PATH", path)
    assert build.compile_ahead(source) != entry
    assert len(entries(cache)) == 2


def test_compiled_ahead_serves_without_a_compiler(source, monkeypatch, no_compiler):
    entry = build.compile_ahead(source)
    no_compiler()
    assert build.compile_ahead(source) == entry
    monkeypatch.setenv("CXX", "g++-of-the-build-stage")
    assert build.load(source).team(1) == 1
    assert build.describe(source)["entry"] == str(entry)


def test_no_compiler_says_what_to_install(source, monkeypatch, no_compiler):
    no_compiler()
    with pytest.raises(build.BuildError, match=r"no c\+\+, g\+\+ or clang\+\+.*apt-get install"):
        build.load(source)
    assert build.describe(source)["compiler"] == "none found"
    forget()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(build.BuildError, match="CXX=/no/such/compiler is not there"):
        build.load(source)


def test_failing_compiler_is_named_and_not_tried_again(source, cache, tmp_path, monkeypatch):
    tried = tmp_path / "tried"
    compiler = script(tmp_path / "bin/bad", f"echo x >> {tried}; echo cannot compute >&2; exit 3")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError) as first:
        build.load(source)
    for part in (f"CXX={compiler}", "exited with 3", "cannot compute", "Install g++", str(source)):
        assert part in str(first.value)
    count = len(tried.read_text())
    with pytest.raises(build.BuildError) as second:
        build.load(source)
    assert str(second.value) == str(first.value)
    assert len(tried.read_text()) == count
    assert not entries(cache)


def test_cxx_is_false(source, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(build.BuildError, match=r"(?s)CXX=\S*false: .*Install g\+\+"):
        build.load(source)


def test_a_compiler_that_fails_leaves_the_job_to_the_next(source, tmp_path, monkeypatch):
    script(tmp_path / "bin/c++", "exit 1")
    script(tmp_path / "bin/g++", f'exec {COMPILER} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    entry = build.compile_ahead(source)
    script(tmp_path / "bin/g++", "exit 1")
    os.utime(tmp_path / "bin/g++", ns=(0, 0))
    with pytest.raises(build.BuildError):
        build.compile_ahead(source)
    assert entry.exists()


def test_optional_flags_may_be_refused(source, tmp_path, monkeypatch):
    real = build._flags()
    monkeypatch.setattr(build, "_flags", lambda: (real[0], ["-mno-such-flag"]))
    assert build.load(source).team(1) == 1


def test_wrong_abi_is_refused(source, cache):
    source.with_name("team.h").write_text(HEADER.replace("#define ABI ", "#define ABI 9"))
    with pytest.raises(
        build.BuildError, match=f"ABI 9{build.ABI_VERSION}, not {build.ABI_VERSION}"
    ):
        build.load(source)
    assert not entries(cache)


def test_missing_source_is_an_incomplete_installation(tmp_path):
    with pytest.raises(build.BuildError, match="not complete"):
        build.load(tmp_path / "none.cpp")


@pytest.mark.parametrize("which", ["entry", "directory"])
@pytest.mark.parametrize("how", ["group", "others", "owner"])
def test_what_others_can_write_is_not_loaded(source, cache, monkeypatch, no_compiler, which, how):
    if how == "owner" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    entry = build.compile_ahead(source)
    path, target = os.environ["PATH"], entry if which == "entry" else cache
    if how == "owner":
        os.chown(target, 65534, -1)
    else:
        target.chmod(target.stat().st_mode | {"group": 0o020, "others": 0o002}[how])
    no_compiler()  # so that only the entry can be loaded
    with pytest.raises(build.BuildError) as error:
        build.load(source)
    monkeypatch.setenv("PATH", path)
    forget()
    assert build.load(source).team(1) == 1
    if which == "entry":
        (entry,) = entries(cache)
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
        assert entry.stat().st_uid == os.geteuid()
    else:
        reason = "belongs to another user" if how == "owner" else "chmod go-w"
        assert reason in str(error.value)
        assert reason in build.describe(source)["problem"]
        with pytest.raises(build.BuildError, match=reason):
            build.compile_ahead(source)


@pytest.mark.parametrize("poison", ["no library", "another library", "another version"])
def test_what_is_no_library_of_ours_under_a_right_name_is_rebuilt(source, cache, tmp_path, poison):
    """An entry may have the right digest and still hold another library."""
    entry = build.compile_ahead(source)
    if poison == "no library":
        data = b"\x7fELF" + bytes(4096)
    else:
        name = "other" if poison == "another library" else "clr_abi_version"
        text = f'extern "C" int {name}() {{ return 1; }}'
        (tmp_path / "other.cpp").write_text(text)
        compiled(tmp_path / "other.cpp", "-o", tmp_path / "other.so")
        data = (tmp_path / "other.so").read_bytes()
    entry.unlink()
    poisoned = entry.with_name(entry.name.replace(entry.stem.split("-")[2], build._digest(data)))
    poisoned.write_bytes(data)
    poisoned.chmod(0o600)
    assert build.load(source).team(1) == 1
    assert entries(cache) == [entry]


@pytest.mark.parametrize("whose", ["one's own", "another user's"])
@pytest.mark.parametrize("where", ["the folder", "on the way"])
def test_a_link_to_the_cache_is_followed_if_it_is_ones_own(
    source, tmp_path, monkeypatch, whose, where
):
    if whose != "one's own" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (tmp_path / "far/sub").mkdir(parents=True, mode=0o700)
    link = tmp_path / "link"
    link.symlink_to("far/sub" if where == "the folder" else "far")
    if whose != "one's own":
        os.lchown(link, 65534, -1)
    cache = link if where == "the folder" else link / "sub"
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(cache))
    assert build.load(source).team(1) == 1
    assert len(list((tmp_path / "far/sub").iterdir())) == (whose == "one's own")
    if whose != "one's own":
        reason = f"is reached by {link}, a link of another user's"
        assert reason in build.describe(source)["problem"]
        with pytest.raises(build.BuildError, match=reason):
            build.compile_ahead(source)


def test_a_link_to_nowhere_is_no_cache(source, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(tmp_path / "link"))
    assert build.load(source).team(1) == 1
    with pytest.raises(build.BuildError, match=r"not kept: .*link cannot be used"):
        build.compile_ahead(source)


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["any user's", "sticky"])
@pytest.mark.parametrize("through", ["path", "link"])
def test_a_cache_that_any_user_could_replace(source, tmp_path, monkeypatch, mode, through):
    """A directory like one below a /tmp without the sticky bit."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    (tmp_path / "open/cache").mkdir(mode=0o700)
    cache = tmp_path / "open/cache"
    if through == "link":
        (tmp_path / "link").symlink_to(cache)
        cache = tmp_path / "link"
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(cache))
    assert build.load(source).team(1) == 1
    if mode == 0o1777:
        assert build.compile_ahead(source).parent == cache
    else:
        with pytest.raises(build.BuildError, match=r"not kept: .*open, where any user can replace"):
            build.compile_ahead(source)
        assert not list(cache.iterdir())


@pytest.mark.parametrize("what", ["compiler", "folder", "sync", "rename"])
def test_full_disk(source, cache, tmp_path, monkeypatch, what):
    """Fails each write to the cache in turn. The temporary folder is elsewhere."""

    def fails_in_the_cache(function, at):
        def call(*args, **kwargs):
            path = kwargs.get("dir") or args[at]
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            if str(path).startswith(str(cache)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    if what == "compiler":
        full = f'case "$*" in *{cache}*) echo "fatal: No space left on device" >&2; exit 1;; esac'
        compiler = script(tmp_path / "bin/c++", f'{full}\nexec {COMPILER} "$@"')
        monkeypatch.setenv("CXX", str(compiler))
    elif what == "folder":
        monkeypatch.setattr(tempfile, "mkdtemp", fails_in_the_cache(tempfile.mkdtemp, 2))
    elif what == "sync":
        if sys.platform != "linux":
            pytest.skip("reads a descriptor's path in /proc")
        monkeypatch.setattr(os, "fsync", fails_in_the_cache(os.fsync, 0))
    else:
        monkeypatch.setattr(os, "replace", fails_in_the_cache(os.replace, 1))
    assert build.load(source).team(2) == 2
    assert not entries(cache)
    with pytest.raises(build.BuildError, match=r"not kept: (?s:.*)No space left on device"):
        build.compile_ahead(source)


def test_a_really_full_disk(source, cache, tmp_path, monkeypatch):
    """A file system of 8 kB in memory, which is full in the middle of the compilation."""
    cache.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k,mode=700", "tmpfs", cache]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("only root on Linux can mount, and not in every container")
    try:
        assert build.load(source).team(2) == 2
        assert not entries(cache)
        with pytest.raises(build.BuildError, match="not kept: "):
            build.compile_ahead(source)
    finally:
        subprocess.run(["umount", cache], check=True)


def test_no_home(source, monkeypatch):
    """Some containers run under a user id without a user."""

    import pwd  # Windows has no pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "CLR_OPTIM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert build.load(source).team(2) == 2
    assert build.describe(source)["problem"] == "there is no home directory"
    with pytest.raises(build.BuildError, match=r"no home directory\. CLR_OPTIM_CACHE_DIR moves"):
        build.compile_ahead(source)


def test_nowhere_to_write_at_all(source, tmp_path, monkeypatch):
    def none(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    (tmp_path / "file").touch()
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(tmp_path / "file/cache"))
    monkeypatch.setattr(tempfile, "mkdtemp", none)
    with pytest.raises(build.BuildError, match=r"No usable temporary .*The cache did not help"):
        build.load(source)


def test_cache_that_cannot_be_made(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(tmp_path / "file/cache"))
    assert build.load(source).team(2) == 2
    with pytest.raises(build.BuildError, match=r"not kept: .*Not a directory"):
        build.compile_ahead(source)


@pytest.mark.parametrize("how", ["filled", "empty", "home"])
def test_read_only_cache(source, openmp_host, monkeypatch, how):
    """Root writes where permissions forbid it, so root's process becomes another user first."""
    filled = how == "filled"
    # Not below tmp_path, which pytest closes to other users.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        shutil.copytree(source.parent, folder / "src")
        shutil.copy(openmp_host, folder / "host.so")
        cache = folder / "cache"
        cache.mkdir()
        if how == "home":
            for name, value in (
                ("HOME", cache),
                ("XDG_CACHE_HOME", ""),
                ("CLR_OPTIM_CACHE_DIR", ""),
            ):
                monkeypatch.setenv(name, str(value))
        else:
            monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", str(cache))
        if filled:
            build.compile_ahead(folder / "src/kernels.cpp").chmod(0o444)
        cache.chmod(0o555)
        code = """
            import fcntl  # later the user may not read the installation
            if os.geteuid() == 0:
                os.setgroups([]), os.setgid(65534), os.setuid(65534)
            started = []
            run = build.subprocess.run
            build.subprocess.run = lambda *a, **k: started.append(a) or run(*a, **k)
            print(build.load(source).team(2), len(started) > 0)
        """
        monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
        process = start(code, folder / "src/kernels.cpp", folder / "host.so", cwd="/")
        assert output(process) == ["2", str(not filled)]
        cache.chmod(0o755)
        assert len(entries(cache)) == filled
        assert not list((folder / "tmp").iterdir())


def test_left_over_compilations_go_when_they_are_old(source, cache):
    cache.mkdir(mode=0o700)
    old, new = cache / ".build-old", cache / ".build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "kernels0.o").touch()
    os.utime(old, (time.time() - 2 * build._STALE_S,) * 2)
    build.compile_ahead(source)
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/a/b", "/x", "/a/b"),
        ("~/b", "/x", "/home/me/b"),
        ("", "/x", "/x/clr_optim"),
        ("", "relative", "/home/me/.cache/clr_optim"),
        ("", "", "/home/me/.cache/clr_optim"),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has its own default")
def test_place_of_the_cache(monkeypatch, own, xdg, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CLR_OPTIM_CACHE_DIR", own)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert build.describe(Path("/none.cpp"))["cache"] == expected


def test_describe(source, cache):
    before = build.describe(source)
    assert before["cached"] == "no"
    assert not cache.exists()
    entry = build.compile_ahead(source)
    facts = build.describe(source)
    assert facts["cached"] == "yes"
    assert facts["entry"] == str(entry)
    assert facts["compiler"] in (COMPILER, f"CXX={COMPILER}")
    assert facts["version"]
    assert "-ffast-math" not in facts["flags"]
    assert facts["problem"] == ""
    assert Path(facts["openmp"]).is_file()
    assert facts["target"]
    assert facts["target"] != "native"


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


@linux
@pytest.mark.parametrize("order", [1, -1], ids=["library first", "torch first"])
def test_one_pool_shared_with_torch(source, order):
    """Count the threads. torch's file must be the only OpenMP runtime in the process."""
    code = f"""
        import torch
        library = build.load(source)
        maps = runtimes()
        torch.set_num_threads(4)
        first, second = [lambda: library.team(4), lambda: torch.ones(1 << 20)][::{order}]
        base = threads()
        first()
        assert threads() == base + 3
        second(), first()
        print(threads() - base, len(maps), build.describe(source)["openmp"] in maps)
    """
    import torch

    assert output(start(code, source, torch._C.__file__)) == ["3", "1", "True"]


@linux
def test_one_pool_where_the_runtime_has_a_hashed_name(source, tmp_path):
    """CUDA wheels rename their OpenMP; a library linked against such a copy replaces torch here."""
    real = Path(build._share_openmp())
    if "gomp" not in real.name:
        pytest.skip(f"torch uses {real.name}")
    name = "libgomp-" + "a" * (len(real.name) - 11) + ".so"  # of the same length, so no table moves
    copy = tmp_path / name
    copy.write_bytes(real.read_bytes().replace(f"{real.name}\0".encode(), f"{name}\0".encode()))
    host = tmp_path / "torch.so"
    flags = [f"-Wl,-rpath,{tmp_path}", "-o", host]
    compiled("-fopenmp", "-c", source, "-o", tmp_path / "host.o")
    compiled(tmp_path / "host.o", copy, *flags)
    code = """
        host = ctypes.CDLL(torch_library)
        base = threads()
        host.team(4)
        library = build.load(source)
        assert library.team(4) == 4
        print(threads() - base, *runtimes())
    """
    assert output(start(code, source, host)) == ["3", str(copy)]
    # For comparison: a library linked in the usual way brings a second runtime and pool.
    compiled("-fopenmp", source, "-o", tmp_path / "usual.so")
    usual = code.replace("build.load(source)", f"ctypes.CDLL({str(tmp_path / 'usual.so')!r})")
    assert output(start(usual, source, host))[0] == "6"


def test_calls_release_the_gil(source):
    assert isinstance(build.load(source), ctypes.CDLL)
    assert not isinstance(build.load(source), ctypes.PyDLL)
