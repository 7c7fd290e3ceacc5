"""What all tests share: the scripts, one run of each as a user runs it, and the speed of the machine."""
import contextlib
import functools
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("micro*.py"))
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True          # a script may not leave a file behind, nor may its tests


@functools.cache
def _measured(name, seed):
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name).main(seed=seed)


@pytest.fixture(scope="session")
def measured():
    """measured(name, seed=42): the dict that the script's main returns, computed once."""
    return lambda name, seed=42: _measured(name, seed)
