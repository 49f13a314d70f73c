"""How the kernels are compiled and kept."""

import os
import shlex
import shutil
import stat
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from models.kernels import compiled

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes CXX a compiler in a folder with a space, which adds arguments to its own."""
    path = tmp_path / "my compilers" / "c++"
    path.parent.mkdir()
    found = shutil.which("g++") or shutil.which("clang++")

    def install(*added, called_with=()):
        path.write_text(f'#!/bin/sh\nexec "{found}" {shlex.join(added)} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", shlex.join([str(path), *called_with]))

    return install


def test_the_compiler_may_be_named_with_arguments(compiler, monkeypatch, tmp_path):
    """As build tools read CXX, for example with ccache before it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "FLAGS", tuple(flag for flag in compiled.FLAGS if flag != "-O3"))
    compiler(called_with=["-Dmoments_float32=renamed"])
    monkeypatch.setenv("CXX", f"env {os.environ['CXX']}")
    library = compiled._load()
    assert library.renamed and not hasattr(library, "moments_float32")


def test_a_library_is_of_one_compiler_and_one_processor(compiler, monkeypatch):
    """Its name in the cache depends on whatever changes the code: version at the same place, features, arguments."""
    monkeypatch.setattr(compiled, "from_cache", lambda name, read: name)
    names = []
    for added, called_with in (
        ((), ()),
        (("-U__VERSION__", '-D__VERSION__="99.1"'), ()),
        (("-D__ANOTHER_FEATURE__=1",), ()),
        ((), ("-fno-inline",)),
    ):
        compiler(*added, called_with=called_with)
        names.append(compiled._load())
        assert compiled._load() == names[-1]
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-fno-inline"))
    names.append(compiled._load())
    assert len(set(names)) == len(names)


def test_a_compiler_that_cannot_be_run_is_none(monkeypatch):
    for name in ("no-such-compiler", "g++ 'unbalanced", "false"):
        monkeypatch.setenv("CXX", name)
        compiled._library.cache_clear()
        try:
            with pytest.warns(UserWarning, match="not compiled"):
                assert not compiled.available()
        finally:
            compiled._library.cache_clear()


def test_several_threads_compile_once(monkeypatch):
    """And a machine without a compiler warns once."""
    loads = []

    def load():
        loads.append(1)
        time.sleep(0.2)
        raise OSError("no C++ compiler found")

    monkeypatch.setattr(compiled, "_load", load)
    compiled._library.cache_clear()
    try:
        with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
            warnings.simplefilter("ignore")
            assert not any(pool.map(lambda _: compiled.available(), range(4)))
        assert len(loads) == 1
    finally:
        compiled._library.cache_clear()
