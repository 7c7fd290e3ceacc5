"""How much the fused autograd gains: one training step of the tiny GPT, three ways.

    python tests/bench_autograd.py [--rounds N]

The collection's autograd, a plain one with one node per operation (micrograd's design: a closure
per node, a recursive topological sort per backward), and PyTorch eager on one thread if it is
installed. Same weights, same names, same forward pass, in one process, interleaved; medians.

The plain graph is full of reference cycles (a node holds a closure that holds the node), so Python's
cycle collector must run, and does, again and again while the graph grows. The tape has none, and the
scripts turn the collector off. What that is worth is shown by a plain row without the collector,
which nobody could use for long: its graphs would never be freed.

Exit status 1 if the gradients differ by more than 1e-9 or the gain is below 15x.
"""
import argparse
import gc
import importlib.util
import math
import random
import statistics
import sys
import time

from collection import ROOT

try:
    import torch
    import torch_gpt
except ImportError:
    torch = None


class Node:
    """One number, one operation, as in micrograd: what an autograd looks like before it is fused."""

    def __init__(self, data, inputs=(), operation=""):
        self.data, self.grad = data, 0.0
        self.inputs, self.operation = set(inputs), operation
        self.propagate = lambda: None

    def __add__(self, other):
        other = other if isinstance(other, Node) else Node(other)
        out = Node(self.data + other.data, (self, other), "+")

        def propagate():
            self.grad += out.grad
            other.grad += out.grad
        out.propagate = propagate
        return out

    def __mul__(self, other):
        other = other if isinstance(other, Node) else Node(other)
        out = Node(self.data * other.data, (self, other), "*")

        def propagate():
            self.grad += other.data * out.grad
            other.grad += self.data * out.grad
        out.propagate = propagate
        return out

    def unary(self, data, slope, operation):
        out = Node(data, (self,), operation)

        def propagate():
            self.grad += slope * out.grad
        out.propagate = propagate
        return out

    def __pow__(self, n):
        return self.unary(self.data ** n, n * self.data ** (n - 1), f"**{n}")

    def exp(self):
        return self.unary(math.exp(self.data), math.exp(self.data), "exp")

    def log(self):
        return self.unary(math.log(self.data), 1.0 / self.data, "log")

    def relu(self):
        return self.unary(max(self.data, 0.0), float(self.data > 0.0), "relu")

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -other

    def __truediv__(self, other):
        return self * other ** -1.0

    __radd__, __rmul__ = __add__, __mul__

    def backward(self):
        order, seen = [], set()

        def visit(node):
            if node not in seen:
                seen.add(node)
                for x in node.inputs:
                    visit(x)
                order.append(node)
        visit(self)
        self.grad = 1.0
        for node in reversed(order):
            node.propagate()


def plain_dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def plain_softmax(vector):
    top = max(x.data for x in vector)
    e = [(x - top).exp() for x in vector]
    total = sum(e)
    return [x / total for x in e]


def load(plain):
    """A private copy of microkv, its operations replaced by plain ones if asked: one forward pass."""
    spec = importlib.util.spec_from_file_location("plain" if plain else "fused", ROOT / "microkv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if plain:
        module.Value, module.dot, module.softmax = Node, plain_dot, plain_softmax
        module.linear = lambda xs, weight: [[plain_dot(row, x) for row in weight] for x in xs]
        module.relu = Node.relu
        module.cross_entropy = lambda logits, target: -plain_softmax(logits)[target].log()
    return module


PLAIN, NO_COLLECTOR, FUSED = "one node per operation", "the same, no collector", "fused, with a tape"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    sys.setrecursionlimit(10 ** 6)       # for the plain sort
    modules, models = {PLAIN: load(plain=True), FUSED: load(plain=False)}, {}
    for label, module in modules.items():
        rng = random.Random(42)
        vocabulary, names, _ = module.tokenize(module.NAMES.split(), rng)
        models[label] = module.GPT(len(vocabulary), rng)
        models[label].loss(names[:4]).backward()
    gradients = [[p.grad for p in model.parameters()] for model in models.values()]
    difference = max(abs(p - q) for p, q in zip(*gradients))
    modules[FUSED].COUNT.clear()
    models[FUSED].frozen().loss(names[:1])
    multiply_adds = modules[FUSED].COUNT["multiply-adds"]

    def stepper(label):
        module, model = modules[label], models[label]
        return lambda: module.train(model.parameters(), lambda _: model.loss(names[:1]), 1, 0.001)
    steps = {PLAIN: stepper(PLAIN), NO_COLLECTOR: stepper(PLAIN), FUSED: stepper(FUSED)}
    if torch:
        torch.set_num_threads(1)
        weights = torch_gpt.tensors(models[FUSED], requires_grad=True)
        adam = torch.optim.Adam(weights.values(), lr=0.001)

        def torch_step():
            adam.zero_grad()
            torch_gpt.loss(weights, names[:1], 1, 2).backward()
            adam.step()
        steps["PyTorch eager, one thread"] = torch_step
    times = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            repeats = 10 if steps[label] not in (steps[PLAIN], steps[NO_COLLECTOR]) else 1
            gc.collect()
            gc.freeze()                  # the collector shall look at this step's graph only
            gc.enable() if label == PLAIN else gc.disable()
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[label].append((time.perf_counter() - start) / repeats)
    print(f"One training step (forward, backward, Adam) on a name of {len(names[0]) - 1} tokens, "
          f"{multiply_adds:,} multiply-adds forward.\nMedian of {rounds} rounds.\n")
    for label, values in times.items():
        milliseconds = statistics.median(values) * 1e3
        print(f"  {label:<26} {milliseconds:8.2f} ms {milliseconds * 1e6 / multiply_adds:9.0f} ns per multiply-add")
    gain, lean = (statistics.median(plain / fused for plain, fused in zip(times[label], times[FUSED]))
                  for label in (PLAIN, NO_COLLECTOR))
    print(f"\n  {gain:.1f}x ({lean:.1f}x without the collector); "
          f"largest difference between the gradients {difference:.0e}")
    if difference > 1e-9 or gain < 15.0:
        sys.exit("FAILED: the gradients differ, or the gain is below 15x")


if __name__ == "__main__":
    main()
