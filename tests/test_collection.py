"""The collection as a whole: shared blocks, README, and the report block's promises."""
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from collection import BUDGETS, ROOT, SCRIPTS, blocks, lines, source
from conftest import without_times
from mutants import MUTANTS

ORDER = ["microrope", "microattention", "microkv", "micropaged", "microflash", "microcheckpoint",
         "microparallel", "microquant", "microssm", "microbeam"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# | [microkv.py](microkv.py) | technique | what you will see | 3.2 s (5 s) | 380 + 290 |
ROW = re.compile(r"^\| \[(micro\w+)\.py\]\(\1\.py\) \|.*\| ([\d.]+) s \(([\d.]+) s\) \| (\d+) \+ (\d+) \|$",
                 re.M)
# | microkv | checks | tests | oracle cases | mutants |
VERIFIED = re.compile(r"^\| (micro\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.M)
EXCERPT = re.compile(r"^From `python (micro\w+)\.py`:\n\n```text\n(.*?)```$", re.M | re.S)


@pytest.mark.parametrize("name", SCRIPTS)
def test_has_the_blocks_that_every_script_has(name):
    expected = {"autograd", "report"}
    if name in ("microkv", "micropaged", "microquant", "microbeam"):
        expected |= {"names", "gpt"}
    assert set(blocks(name)) == expected


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)))
def test_shared_blocks_are_the_same(one, other):
    for block in blocks(one).keys() & blocks(other).keys():
        assert blocks(one)[block] == blocks(other)[block], f"block {block}: {one} and {other} differ"


@pytest.mark.parametrize("name", SCRIPTS)
def test_own_lines_stay_within_a_sitting(name):
    assert lines(name)[0] <= 450


def test_readme_lists_the_scripts_that_exist_in_the_order_of_the_path():
    assert [row[0] for row in ROW.findall(README)] == [name for name in ORDER if name in SCRIPTS]
    for name in ORDER:
        marked = re.search(rf"^\| {name}\.py \|.*\| to come \|", README, re.M)
        assert bool(marked) == (name not in SCRIPTS), name


@pytest.mark.parametrize("name, seconds, budget, own, shared", ROW.findall(README))
def test_readme_figures(name, seconds, budget, own, shared):
    assert (int(own), int(shared)) == lines(name)
    assert float(budget) == BUDGETS[name] >= float(seconds)


@pytest.mark.parametrize("name", SCRIPTS)
def test_readme_counts_what_verifies_a_script(name, first_run, request):
    """Tests are counted only in the files that this run has collected as a whole."""
    (checks, tests, oracles, mutants), = (map(int, row[1:]) for row in VERIFIED.findall(README)
                                          if row[0] == name)
    assert checks == len(re.findall(r"^  ✓ ", first_run(name).out, re.M))
    assert mutants == len(MUTANTS[name])
    collected = Counter(item.path.stem for item in request.session.items)
    options = request.config.option
    if not options.keyword and not any("::" in path for path in options.file_or_dir):
        assert collected[f"test_{name}"] in (0, tests)
        assert collected[f"test_oracle_{name}"] in (0, oracles)


@pytest.mark.parametrize("name, excerpt", EXCERPT.findall(README))
def test_readme_excerpts_are_real_output(name, excerpt, first_run):
    assert len(excerpt) > 500 and excerpt.rstrip() in first_run(name).out


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_still_apply(name):
    """The list of mutants.json is in step with the script, and long enough."""
    assert len(MUTANTS[name]) >= 10
    for text, replacement in MUTANTS[name]:
        assert text != replacement and source(name).count(text) == 1, text


def test_top_level_holds_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in tracked.stdout.split("\n") if path}
    assert {name for name in top if not name.startswith(".")} == {
        *(f"{name}.py" for name in SCRIPTS), "tests", "README.md"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_failed_check_is_printed_and_exits_1(name):
    code = f"""if True:
        import {name} as script
        def main(seed=42):
            started = script.begin()
            script.check("one is one", 1 == 1)
            script.check("one is two", 1 == 2, "1 against 2")
            print("the story goes on")
            return script.finish(started, figure=3)
        script.run(main)"""
    run = subprocess.run([sys.executable, "-B", "-X", "utf8", "-c", code], cwd=ROOT,
                         capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 1 and run.stderr == ""
    assert "✓ one is one\n" in run.stdout and "✗ one is two  (1 against 2)\n" in run.stdout
    assert "the story goes on" in run.stdout and "1 of 2 checks hold." in run.stdout


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "microparallel"])
def test_pasted_into_a_notebook(name, first_run):
    """The source as a cell: main runs, with the kernel's stdout, and arguments that are not ours.

    microparallel needs a file to start its processes from, and says so: see test_microparallel."""
    code = """if True:
        import io, sys
        cell = open(sys.argv[1], encoding="utf-8").read()
        sys.ps1, sys.argv = "In: ", ["kernel", "-f", "x.json"]
        terminal, sys.stdout = sys.stdout, io.StringIO()
        exec(compile(cell, "<cell>", "exec"), {"__name__": "__main__"})
        terminal.write(sys.stdout.getvalue())"""
    run = subprocess.run([sys.executable, "-B", "-X", "utf8", "-c", code, str(ROOT / f"{name}.py")],
                         capture_output=True, text=True, encoding="utf-8")
    assert (run.returncode, run.stderr) == (0, "")
    assert without_times(run.stdout) == without_times(first_run(name).out)
