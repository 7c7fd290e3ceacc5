"""One run of every script as a user runs it, shared by all tests, and what its main returns."""
import contextlib
import functools
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import settings

from collection import ROOT, slowness

sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True          # importing a script may not leave a file beside it
TIMEOUT = 300
# A background job of a shell ignores Ctrl-C, and its children inherit that; these tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A counterexample must be found again by whoever looks into it, and no database may be left behind.
settings.register_profile("suite", deadline=None, database=None, derandomize=True)
settings.load_profile("suite")


def run_script(name, *arguments, flags=(), cwd=None, **environment):
    """Run a script in a process of its own -> code, out, err, seconds."""
    command = [sys.executable, *flags, str(ROOT / f"{name}.py"), *arguments]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1",
                   **environment}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=TIMEOUT)
    return SimpleNamespace(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode(),
                           seconds=time.perf_counter() - start)


def without_times(out):
    """What a script prints, but for its wall-clock times, which no two runs have in common."""
    return re.sub(r"\d[\d,.]* ?(s|ms|µs)\b", "TIME", out)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """first_run(name): `python name.py` from an empty directory, run once; plus .slowness, .left."""
    @functools.cache
    def run(name):
        directory = tmp_path_factory.mktemp(name)
        before = slowness()
        result = run_script(name, cwd=directory)
        result.slowness = (before + slowness()) / 2
        result.left = [path.name for path in directory.rglob("*")]
        return result
    return run


@functools.cache
def _measured(name, seed):
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name).main(seed=seed)


@pytest.fixture(scope="session")
def measured():
    """measured(name, seed=42): the dict that the script's main returns, computed once."""
    return lambda name, seed=42: _measured(name, seed)


def pytest_terminal_summary(terminalreporter):
    missing = {report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])
               if "could not import" in str(report.longrepr)}
    if missing:
        terminalreporter.section("ORACLES THAT DID NOT RUN", sep="!", red=True)
        for reason in sorted(missing):
            terminalreporter.line(reason)
        terminalreporter.line("Install tests/requirements-oracles.txt to check against them.")
