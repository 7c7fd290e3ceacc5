"""What the tests and the tools in this folder know about the collection: files, blocks, budgets."""
import re
import statistics
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("micro*.py"))

# Seconds of wall clock on an idle 2-core cloud machine with Python 3.12.
BUDGETS = {"microrope": 1.5, "microattention": 1.5, "microflash": 1.5, "microcheckpoint": 1.5,
           "micropaged": 2.0, "microkv": 5.0, "microquant": 7.0, "microparallel": 7.0,
           "microbeam": 9.0, "microssm": 9.0}

# The same loop in every run tells how much slower this machine is, right now, than the one the
# budgets are for, where it takes this many seconds.
YARDSTICK = 0.025

BLOCK = re.compile(r"^# >>> shared: (\w+).*?^# <<< shared: \1\n", re.S | re.M)


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def blocks(name):
    """{block name: its text, markers included}, of one script."""
    return {match.group(1): match.group(0) for match in BLOCK.finditer(source(name))}


def lines(name):
    """(own lines, lines in shared blocks) of one script."""
    shared = sum(text.count("\n") for text in blocks(name).values())
    return source(name).count("\n") - shared, shared


class Cell:
    __slots__ = ("data", "grad")


def yardstick():
    """Seconds for a fixed loop in pure Python that does what the scripts do: floats, objects, lists."""
    cells = [Cell() for _ in range(30_000)]

    def loop():
        start = time.perf_counter()
        for number, cell in enumerate(cells):
            cell.data, cell.grad = number * 0.5, 0.0
        for _ in range(10):
            numbers = [cell.data for cell in cells]
            for cell, number in zip(cells, numbers):
                cell.grad += number * 1.5
        return time.perf_counter() - start
    return statistics.median(loop() for _ in range(7))


def slowness():
    """How many times slower than the budgets' machine this one is now; at least 1."""
    return max(1.0, yardstick() / YARDSTICK)
