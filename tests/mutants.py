"""Break each script in ways that a careless change could, one at a time, and see that a test fails.

    python tests/mutants.py [SCRIPT ...]        some 10 s a mutant, so by hand and not in CI

A mutant is (text, replacement); the text must occur exactly once in the script. Each runs in a copy
of the checkout. Exit status 1 if one survives.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from collection import ROOT, SCRIPTS, source

MUTANTS = {
    "microkv": [
        ("x.grad += grad * partial", "x.grad = grad * partial"),
        ("(other.data, self.data))", "(self.data, other.data))"),
        ("(n * self.data ** (n - 1),)", "(n * self.data ** n,)"),
        ("[*a, *b], [*y, *x])", "[*a, *b], [*x, *y])"),
        ("((i == j) - p_j)", "((i == j) - p_i)"),
        ("exp(value - logsumexp) - (i == target)", "exp(value - logsumexp) + (i == target)"),
        ("(float(x.data > 0),)", "(1.0,)"),
        ("1.0 - 0.99 ** (step + 1)", "1.0 - 0.99 ** step + 1e-9"),
        ("rate * (1.0 - step / steps) *", "rate *"),
        ("            p.grad = 0.0\n", ""),
        ("del vectors[length:]", "del vectors[length + 1:]"),
        ("dot(x, x) / len(x) + 1e-5", "dot(x, x) + 1e-5"),
        ("x * head_dim ** -0.5", "x"),
        ("slice(start, start + head_dim)", "slice(0, head_dim)"),
        ('linear(mixed, w[f"out{i}"])', "mixed"),
        ("self.values[layer].append(value)", "self.values[layer].append(key)"),
        ("(token, position + i, cache)", "(token, i, cache)"),
        ('COUNT["multiply-adds"] += len(x)', 'COUNT["multiply-adds"] += len(x) - 1'),
        ('COUNT["weights read"] += len(weight) * len(weight[0])', 'COUNT["weights read"] += len(weight)'),
        ("position += len(pending)", "position += 1"),
        ("    if end > model.context:", "    if end > model.context + 1:"),
        ("twin.keys, twin.values = list(map(list, cache.keys)), list(map(list, cache.values))", "pass"),
        ("[last % size] = key, value", "[last % size] = value, key"),
        ("if last == len(self.block_table) * size", "if last >= len(self.block_table) * size - 1"),
        ("return 2 * n_layers * n_kv_heads", "return n_layers * n_kv_heads"),
        ("2 * weights + batch * cache", "2 * weights * batch + batch * cache"),
        ("batch / max(compute, memory)", "batch / (compute + memory)"),
        ('"compute" if compute > memory', '"compute" if compute < memory'),
        ("sum(p * log(p / q)", "sum(q * log(p / q)"),
        ("return vocabulary, rows[len(rows) // 10:], rows[:len(rows) // 10]",
         "return vocabulary, rows, rows[:len(rows) // 10]"),
        ("sys.exit(not all(", "sys.exit(all("),
    ],
    "microcheckpoint": [
        ("(1.0 - t * t,)", "(1.0 - t,)"),
        ("return [x_i + squash(z) * m", "return [squash(z) * m"),
        ("range(lo + k, hi, k)", "range(lo + k, hi, k + 1)"),
        ("[(lo + hi) // 2]", "[lo + 1]"),
        ("if slots > 1 else None", "if slots > 2 else None"),
        ("(self.rng.random() < keep) / keep", "(self.rng.random() < keep)"),
        ("self.stored + hi - lo)", "hi - lo)"),
        ("if state and self.restore", "if state and not self.restore"),
        ("self.tape(self.advance(x, lo, hi - 1), hi - 1, hi)", "self.tape(x, hi - 1, hi)"),
        ("                hi -= 1\n", "                hi -= 2\n"),
        ("edges[i + 1], slots - i)", "edges[i + 1], slots)"),
        ("self.stored -= i > 0", "self.stored -= 1"),
        ("        if self.rng: self.rng.setstate(self.random_state)", "        if 0: pass"),
        ("else: loss = dot(y, self.grad)", "else: loss = dot(y, [1.0] * len(y))"),
        ("for p in row: p.grad = 0.0", "for p in row: pass"),
        ("return max(pieces + last,", "return max(pieces,"),
        ("return m + revolve_cost(n_layers - m, n_slots - 1)", "return m + revolve_cost(n_layers - m, n_slots)"),
        ("comb(n_slots + r, n_slots + 1)", "comb(n_slots + r, n_slots)"),
        ('"none": 34 + 5 * n_heads', '"none": 34 + 4 * n_heads'),
        ("24 * d_model ** 2, 4 * seq_len", "24 * d_model ** 2, 2 * seq_len"),
    ],
}


def survives(name, text, replacement, root):
    """Run the script's tests against the mutant -> whether none failed."""
    mutant = source(name)
    assert mutant.count(text) == 1, f"{name}: {mutant.count(text)} x {text!r}"
    (root / f"{name}.py").write_text(mutant.replace(text, replacement), encoding="utf-8")
    tests = [test for test in (f"test_{name}.py", "test_autograd.py", f"test_oracle_{name}.py")
             if (root / "tests" / test).exists()]
    runs = [tests, ["test_scripts.py", "-k", f"{name} and (checks_hold or refused or clear_line)"]]
    passed = all(subprocess.run([sys.executable, "-B", "-m", "pytest", "-x", *run], cwd=root / "tests",
                                capture_output=True, timeout=600).returncode == 0 for run in runs)
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
