"""Print the README's two tables of scripts with fresh figures, to paste: python tests/measure.py

Time: the median of three runs, each divided by how much slower than the budgets' machine this one
is just before and after it (the yardstick of collection.py). Use Python 3.12, and an idle machine.
"""
import re
import statistics
import subprocess
import sys

from collection import BUDGETS, ROOT, YARDSTICK, lines, slowness, yardstick
from conftest import run_script
from mutants import MUTANTS

TABLE_ROW = re.compile(r"^\| \[(micro\w+)\.py\]\(.*\|$", re.M)


def scaled_run(name):
    """-> (seconds on the budgets' machine, number of checks)"""
    before, run, after = slowness(), run_script(name), slowness()
    return run.seconds / ((before + after) / 2), len(re.findall(r"^  [✓✗] ", run.out, re.M))


def collected():
    """{test file: how many tests pytest finds in it}; those of the oracles only if they are there."""
    run = subprocess.run([sys.executable, "-B", "-m", "pytest", "--collect-only", "-qq", "."],
                         cwd=ROOT / "tests", capture_output=True, text=True)
    return {name: int(n) for name, n in re.findall(r"(test_\w+)\.py: (\d+)", run.stdout)}


def main():
    loop = yardstick()
    print(f"Python {sys.version.split()[0]}; yardstick {loop:.3f} s (the budgets' machine: {YARDSTICK} s)",
          file=sys.stderr)
    total, tests, rows = 0.0, collected(), []
    for row in TABLE_ROW.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
        name, cells = row.group(1), [cell.strip() for cell in row.group().split("|")]
        seconds, checks = zip(*(scaled_run(name) for _ in range(3)))
        total += statistics.median(seconds)
        own, shared = lines(name)
        print(f"| {' | '.join(cells[1:4])} | {statistics.median(seconds):.1f} s ({BUDGETS[name]:g} s) | "
              f"{own} + {shared} |", flush=True)
        rows.append([name, checks[0], tests.get(f"test_{name}", 0), tests.get(f"test_oracle_{name}", 0),
                     len(MUTANTS.get(name, []))])
    print()
    for row in [*rows, ["all", *map(sum, zip(*(row[1:] for row in rows)))]]:
        print("|", " | ".join(map(str, row)), "|")
    others = {name: n for name, n in tests.items() if "micro" not in name}
    print(f"all, one after the other: {total:.0f} s; other tests: {others}", file=sys.stderr)


if __name__ == "__main__":
    main()
