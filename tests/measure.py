"""Print the README's table of scripts with fresh figures, to paste: python tests/measure.py

Time: the median of three runs, each divided by how much slower than the budgets' machine this one
is just before and after it (the yardstick of collection.py). Use Python 3.12, and an idle machine.
"""
import re
import statistics
import sys

from collection import BUDGETS, ROOT, SCRIPTS, YARDSTICK, lines, slowness, yardstick
from conftest import run_script


def scaled_seconds(name):
    before, run, after = slowness(), run_script(name), slowness()
    return run.seconds / ((before + after) / 2)


def main():
    loop = yardstick()
    print(f"Python {sys.version.split()[0]}; yardstick {loop:.3f} s (the budgets' machine: {YARDSTICK} s)",
          file=sys.stderr)
    total = 0.0
    for row in re.findall(r"^\| .*micro\w+\.py.*\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M):
        name = re.search(r"micro\w+", row).group()
        if name in SCRIPTS:
            seconds = statistics.median(scaled_seconds(name) for _ in range(3))
            total += seconds
            texts = [cell.strip() for cell in row.split("|")[2:4]]
            own, shared = lines(name)
            row = (f"| [{name}.py]({name}.py) | {' | '.join(texts)} | "
                   f"{seconds:.1f} s ({BUDGETS[name]:g} s) | {own} + {shared} |")
        print(row, flush=True)
    print(f"all, one after the other: {total:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
