"""Every script, as its user runs it. A new micro*.py at the top level is picked up by itself."""
import ast
import re
import signal
import subprocess
import sys
import time

import pytest

from collection import BUDGETS, ROOT, SCRIPTS, blocks, slowness, source
from conftest import TIMEOUT, run_script, without_times

TRAINS_ON_NAMES = [name for name in SCRIPTS if "names" in blocks(name)]
every_script = pytest.mark.parametrize("name", SCRIPTS)

# Runs a script as __main__ and fails at the first network connection or file opened for writing.
AUDITED = """
import os, runpy, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[0] != os.devnull:
        path, mode, flags = arguments
        if (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise RuntimeError(f"open {arguments}")
    if event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        raise RuntimeError(f"{event} {arguments}")
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
sys.dont_write_bytecode = True
sys.stdout.reconfigure(encoding="utf-8")
sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def checks(out):
    """(claims that hold, claims that do not, the total that the last line names)."""
    total = re.search(r"^(\d+) of (\d+) checks hold\. [\d.]+ s$", out, re.M)
    assert total, out[-500:]
    return (len(re.findall(r"^  ✓ ", out, re.M)), len(re.findall(r"^  ✗ ", out, re.M)),
            int(total.group(2)))


def assert_refused(run):
    """Exit status 2 and one line on stderr that is not a traceback."""
    assert run.code == 2 and run.out == "", run.err
    assert run.err.count("\n") == 1 and "Traceback" not in run.err and len(run.err) < 300, run.err


@every_script
def test_runs_and_all_checks_hold(name, first_run):
    run = first_run(name)
    assert run.code == 0, run.err
    assert run.err == ""
    holds, fails, total = checks(run.out)
    assert (holds, fails) == (total, 0) and total >= 3


@every_script
def test_keeps_its_wall_clock_budget(name, first_run):
    # The budgets are for Python 3.12, where a dot product is one C call; before, microkv and
    # microquant take 1.3 times as long on the same machine.
    budget = BUDGETS[name] * (1.0 if sys.version_info >= (3, 12) else 1.3)
    seconds, limit = first_run(name).seconds, budget * first_run(name).slowness
    for _ in range(3):                   # a neighbour on the machine may have disturbed the first
        if seconds <= limit:
            break
        before, seconds = slowness(), run_script(name).seconds
        limit = budget * (before + slowness()) / 2
    assert seconds <= limit


@every_script
def test_output_is_a_picture_of_100_columns(name, first_run):
    out = first_run(name).out
    assert max(map(len, out.split("\n"))) <= 100
    assert out.count("\n") <= 160
    assert not re.search(r"[ \t]+$", out, re.M) and "\n\n\n" not in out
    assert not re.search(r"\b(nan|inf)\b", out, re.I) or "nan" in source(name).lower()


@every_script
def test_sections_are_those_of_the_docstring(name, first_run):
    out, text = first_run(name).out, source(name)
    listed = re.findall(r"^  (\d+)\. (.+?)(?:  .*)?$", ast.get_docstring(ast.parse(text)), re.M)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1)) and listed
    headings = [f"{number}. {title}" for number, title in listed]
    assert re.findall(r"^(\d+\. .+)\n─", out, re.M) == headings
    assert re.findall(r"^# (\d+\. .+?) -{4,}$", text, re.M) == headings
    assert out.split("\n")[0] == text.split("\n")[0].removeprefix('"""')


@every_script
def test_imports_the_standard_library_only(name):
    for node in ast.walk(ast.parse(source(name))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] in sys.stdlib_module_names, module


@every_script
def test_no_line_over_100_columns_and_no_foreign_words(name):
    text = source(name)
    assert max(map(len, text.split("\n"))) <= 100
    assert not re.search(r"\t|[ ]+$|https?://", text, re.M)


@every_script
def test_leaves_no_file_and_opens_no_connection(name, first_run, tmp_path):
    """Also: isolated mode, warnings as errors, another hash seed; and the same output again."""
    assert first_run(name).left == []
    command = [sys.executable, "-I", "-W", "error", "-c", AUDITED, str(ROOT / f"{name}.py")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=TIMEOUT)
    assert run.returncode == 0, run.stderr.decode()
    assert list(tmp_path.rglob("*")) == []
    assert without_times(run.stdout.decode()) == without_times(first_run(name).out)


@every_script
def test_two_at_once(name, first_run):
    """Nothing is shared, not even by two runs of one script: both print what one alone prints."""
    command = [sys.executable, "-B", "-X", "utf8", str(ROOT / f"{name}.py")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"]
    for process in both:
        out, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, err) == (0, b"")
        assert without_times(out.decode()) == without_times(first_run(name).out)


@every_script
def test_one_seed_after_another(name, first_run):
    """main() in a loop, as in a notebook: all checks hold, and nothing stays for the next run."""
    code = f"""if True:
        import contextlib, io
        import {name} as script
        for seed in 1, 42:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                results = script.main(seed=seed)
            assert all(results["checks"].values()), out.getvalue()
        print(out.getvalue(), end="")"""
    run = subprocess.run([sys.executable, "-B", "-X", "utf8", "-c", code], cwd=ROOT,
                         capture_output=True, text=True, encoding="utf-8")
    assert (run.returncode, run.stderr) == (0, "")
    assert without_times(run.stdout) == without_times(first_run(name).out)


@every_script
def test_ascii_terminal_and_another_seed(name):
    """Also: python -O, and a home and working directory that do not exist or cannot be written."""
    run = run_script(name, "--seed", "7", flags=["-O"], cwd="/", HOME="/nonexistent",
                     PYTHONIOENCODING="ascii")
    assert run.code == 0, run.out[-1000:] + run.err
    assert run.out.isascii() and run.err == ""
    assert len(re.findall(r"^  v ", run.out, re.M)) == int(re.search(r"of (\d+) checks", run.out)[1])


@every_script
def test_import_does_nothing(name):
    code = ("import random, sys; before = random.getstate(), set(sys.modules)\n"
            f"import {name}\n"
            "assert random.getstate() == before[0]\n"
            f"assert not {name}.TAPE and not {name}.COUNT and not {name}.CHECKS")
    run = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@every_script
def test_help_is_the_docstring(name):
    run = run_script(name, "--help")
    assert run.code == 0 and run.err == "" and "--seed" in run.out
    assert ast.get_docstring(ast.parse(source(name))) in run.out


@every_script
@pytest.mark.parametrize("arguments", [["--seed", "x"], ["--seed", "1.5"], ["--seed"], ["--nonsense"]])
def test_bad_arguments_get_one_clear_line(name, arguments):
    run = run_script(name, *arguments)
    assert_refused(run)
    assert run.err.startswith(f"{name}.py: ")


@pytest.mark.parametrize("name", TRAINS_ON_NAMES)
@pytest.mark.parametrize("content", [
    None, b"", b"\n \n\n", b"anna\nben\n", b"anna\nben\n" * 20, b"\xff\xfe\x00anna\n" * 30,
    b"\n".join(b"name%d" % i for i in range(30)) + b"\n" + b"x" * 400,
    "\n".join(chr(0x4e00 + i) for i in range(200)).encode()],
    ids=["missing", "empty", "blank", "too few", "too few that differ", "not UTF-8", "a long line", "too many characters"])
def test_bad_names_get_one_clear_line(name, content, tmp_path):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    run = run_script(name, "--names", str(path))
    assert_refused(run)
    assert run.err.startswith(f"{name}.py: --names: ")


@pytest.mark.parametrize("name", TRAINS_ON_NAMES)
def test_names_of_the_user(name, tmp_path):
    """Other letters, Windows line ends, a byte order mark, a dot, a duplicate."""
    path = tmp_path / "names.txt"
    names = ["Zoë", "Łukasz", "J.R.", "Åsa", "李 明"] + [a + b for a in "bdgkl" for b in
                                                    ("ara", "elin", "iro", "onna", "uz")]
    path.write_bytes("\r\n".join(["\ufeff" + names[0], *names]).encode())
    run = run_script(name, "--names", str(path))
    assert run.code == 0, run.out[-1000:] + run.err
    assert checks(run.out)[1] == 0


@pytest.mark.parametrize("name", TRAINS_ON_NAMES)
@pytest.mark.parametrize("names", [
    ["a" * n for n in range(1, 21)], [chr(97 + n) for n in range(20)],
    ["n" + chr(97 + n) for n in range(20)], [chr(97 + n) * 20 for n in range(20)]],
    ids=["one letter", "a letter each", "two letters each", "twenty letters each"])
def test_names_of_extreme_lengths(name, names, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names), encoding="utf-8")
    run = run_script(name, "--names", str(path))
    assert run.code == 0, run.out[-1000:] + run.err


@every_script
def test_closed_pipe_ends_quietly(name):
    process = subprocess.Popen([sys.executable, "-B", str(ROOT / f"{name}.py")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"})
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(TIMEOUT) == 141


@every_script
def test_help_into_a_closed_pipe_ends_quietly(name):
    process = subprocess.Popen([sys.executable, "-B", str(ROOT / f"{name}.py"), "--help"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(TIMEOUT) in (0, 141)     # argparse forgives some closed pipes by itself


@every_script
def test_interrupt_ends_quietly(name):
    process = subprocess.Popen([sys.executable, "-B", str(ROOT / f"{name}.py")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"})
    process.stdout.readline()            # the title: main has begun
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (130, b"")


@every_script
def test_source_speaks_of_itself_only(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    assert f"python {name}.py" in docstring
    assert re.search(r"\b(19|20)\d\d\b", docstring), "no paper is cited"
