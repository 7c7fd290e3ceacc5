"""Break each script in ways that a careless change could, one at a time, and see that a test fails.

    python tests/mutants.py [SCRIPT ...]        some 10 s a mutant, so by hand and not in CI

A mutant is [text, replacement], in mutants.json; the text occurs exactly once in the script, which a
test makes sure of. Each mutant runs in a copy of the checkout. Exit status 1 if one survives.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from collection import ROOT, SCRIPTS, source

MUTANTS = json.loads((Path(__file__).parent / "mutants.json").read_text(encoding="utf-8"))
PATIENCE = 200                           # seconds for a suite; the longest takes about 60


def passes(arguments, directory):
    """Run pytest -> whether all tests passed. A suite that hangs has not."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", *arguments]
    suite = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return suite.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(suite.pid, signal.SIGKILL)         # and whatever it has started


def survives(name, text, replacement, root):
    """Run the script's tests against the mutant -> whether none failed."""
    mutant = source(name)
    assert mutant.count(text) == 1, f"{name}: {mutant.count(text)} x {text!r}"
    (root / f"{name}.py").write_text(mutant.replace(text, replacement), encoding="utf-8")
    tests = [test for test in (f"test_{name}.py", "test_autograd.py", f"test_oracle_{name}.py")
             if (root / "tests" / test).exists()]
    runs = [tests, ["test_scripts.py", "-k", f"{name} and (checks_hold or refused or clear_line)"]]
    passed = all(passes(run, root / "tests") for run in runs)
    (root / f"{name}.py").write_text(source(name), encoding="utf-8")
    return passed


def main():
    names = sys.argv[1:] or [name for name in SCRIPTS if name in MUTANTS]
    killed, alive = 0, []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for name in names:
            for text, replacement in MUTANTS[name]:
                if survives(name, text, replacement, root):
                    alive.append(f"{name}: {text!r} -> {replacement!r}")
                    print("SURVIVED", alive[-1], flush=True)
                else:
                    killed += 1
    print(f"{killed} of {killed + len(alive)} mutants killed")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
