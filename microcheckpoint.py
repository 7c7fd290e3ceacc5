"""Training memory is a choice: forget activations, recompute them later, get the same gradient.

Backpropagation walks the network from its end to its start and needs every activation on the way,
so the forward pass keeps them all: memory grows with depth, and limits batch and context.
But an activation is a function of an earlier one. Keep a few (checkpoints), forget the others, and
run the layers in between again when the backward pass arrives there. How few, and at what price?

  Griewank & Walther 2000 (revolve)    the optimal schedule     Chen et al. 2016 (1604.06174)  √n
  Korthikanti et al. 2022 (2205.05198)  what a transformer layer keeps, selective recomputation

  python microcheckpoint.py [--seed N]       needs only Python, takes about a second

  1. Autograd               derivatives of everything, in fifty lines
  2. Keep everything        a deep residual network, and what its tape holds
  3. Checkpoints            six strategies, one procedure: the same gradient, bit for bit
  4. Every k-th activation  why the best k is √n, and why in bytes it is not
  5. The optimal schedule   revolve: dynamic program, closed form, and the frontier
  6. Training               the same loss curve, dropout included
  7. The bugs people ship   new dropout in the second run, a detached input
  8. The real world         GPT-3 and Llama: gigabytes per device, and the extra arithmetic
"""
import argparse, codecs, gc, os, random, sys, time, tracemalloc
from array import array
from collections import defaultdict
from functools import lru_cache
from math import ceil, comb, exp, log, log2, sqrt, tanh
from operator import mul

# 1. Autograd --------------------------------------------------------------------------------------
# >>> shared: autograd (the same in every script; read it once)
# A Value is a number that remembers its inputs and its derivative with respect to each. The order
# of creation is a topological order: a tape of all computed Values, walked backwards, needs no sort
# and no recursion. A dot product of n-vectors is ONE Value with 2n inputs, not 2n - 1 with two:
# that is a fused kernel, and the difference between seconds and a minute. There is one tape, for
# one graph at a time: backward() empties it, and what was computed before is constant afterwards.
try: from math import sumprod            # since Python 3.12: a dot product in one C loop
except ImportError:
    def sumprod(a, b):
        if len(a) != len(b): raise ValueError(f"{len(a)} numbers times {len(b)}")
        return sum(map(mul, a, b))
TAPE = []                                # every computed Value, in order of creation
COUNT = defaultdict(int)                 # what the code really did, counted where it does it

class Value:
    __slots__ = ("data", "grad", "inputs", "partials")
    def __init__(self, data, inputs=(), partials=()):
        self.data, self.grad, self.inputs, self.partials = data, 0.0, inputs, partials
        if inputs: TAPE.append(self)
    def __add__(self, other):
        if type(other) is not Value: return Value(self.data + other, (self,), (1.0,))
        return Value(self.data + other.data, (self, other), (1.0, 1.0))
    def __mul__(self, other):
        if type(other) is not Value: return Value(self.data * other, (self,), (other,))
        return Value(self.data * other.data, (self, other), (other.data, self.data))
    def __pow__(self, n): return Value(self.data ** n, (self,), (n * self.data ** (n - 1),))
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other ** -1.0
    __radd__, __rmul__ = __add__, __mul__
    def backward(self):
        """Add d self / d x to x.grad for every x that self was computed from; empty the tape."""
        if self not in TAPE: raise ValueError("backward(): not on the tape (a leaf, or used up)")
        self.grad = 1.0
        while TAPE:
            node = TAPE.pop()
            if grad := node.grad:
                for x, partial in zip(node.inputs, node.partials): x.grad += grad * partial

def floats(vector):
    """The data of a vector of Values; a vector of floats comes back as it is."""
    return [x.data for x in vector] if type(vector[0]) is Value else vector

def dot(a, b, x=None, y=None):
    """a, b: [n], Values or floats -> their dot product. x, y: their floats, if already known."""
    x, y = x or floats(a), y or floats(b)
    COUNT["multiply-adds"] += len(x)
    if x is a: return sumprod(x, y) if y is b else Value(sumprod(x, y), b, x)
    return Value(sumprod(x, y), a, y) if y is b else Value(sumprod(x, y), [*a, *b], [*y, *x])

def linear(xs, weight):
    """xs [n][n_in], weight [n_out][n_in] -> [n][n_out]. The weight is read once for all n."""
    COUNT["weights read"] += len(weight) * len(weight[0])
    rows = [(row, floats(row)) for row in weight]
    return [[dot(row, x, w, data) for row, w in rows] for x, data in [(x, floats(x)) for x in xs]]

def relu(x):
    return Value(max(x.data, 0.0), (x,), (float(x.data > 0),)) if type(x) is Value else max(x, 0.0)

def softmax(vector):
    """exp(x) / Σ exp(x). Subtracting the maximum cancels, and keeps exp from overflowing."""
    x = floats(vector)
    top = max(x)
    e = [exp(value - top) for value in x]
    total = sum(e)
    p = [value / total for value in e]
    if x is vector: return p
    return [Value(p_i, vector, [p_i * ((i == j) - p_j) for j, p_j in enumerate(p)])
            for i, p_i in enumerate(p)]

def cross_entropy(logits, target):
    """-log softmax(logits)[target] in nats, as one node: its gradient is softmax minus one-hot."""
    x = floats(logits)
    top = max(x)
    logsumexp = top + log(sum(exp(value - top) for value in x))
    if x is logits: return logsumexp - x[target]
    slope = [exp(value - logsumexp) - (i == target) for i, value in enumerate(x)]
    return Value(logsumexp - x[target], logits, slope)

def train(parameters, loss_at, steps, rate):
    """Minimise loss_at(step), a Value, by Adam (Kingma & Ba 2014), rate falling to 0 -> losses."""
    means, squares, curve = [0.0] * len(parameters), [0.0] * len(parameters), []
    for step in range(steps):
        loss = loss_at(step)
        loss.backward()
        unbias = sqrt(1.0 - 0.99 ** (step + 1))
        pace, eps = rate * (1.0 - step / steps) * unbias / (1.0 - 0.9 ** (step + 1)), 1e-8 * unbias
        for i, p in enumerate(parameters):
            means[i] = mean = 0.9 * means[i] + 0.1 * p.grad
            squares[i] = square = 0.99 * squares[i] + 0.01 * p.grad * p.grad
            p.data -= pace * mean / (sqrt(square) + eps)
            p.grad = 0.0
        curve.append(loss.data)
        progress(f"training: step {step + 1} of {steps}, loss {loss.data:.3f}")
    progress()
    return curve
# <<< shared: autograd

def show_autograd():
    """The tape is the activation memory: it grows with each operation; backward() empties it."""
    x = y = Value(1.1)
    sizes = [len(TAPE)]
    for _ in range(4):
        y = y * y
        sizes.append(len(TAPE))
    y.backward()
    print(f"  x squared 4 times: {sizes} Values on the tape, {len(TAPE)} after backward(); "
          f"dy/dx {x.grad:.9f}")
    exact = 16 * 1.1 ** 15
    check("d x^16 / dx = 16 x^15", abs(x.grad - exact) < 1e-12 * exact, f"{x.grad:.9f}")

# 2. Keep everything -------------------------------------------------------------------------------
# A layer is a square matrix; x becomes x + tanh(weight x). The sum makes the network residual: deep
# as it is, the gradient has a straight way through. With dropout, each number that a layer adds is
# set to 0 at random in training, so that the network relies on none; `mask` says which.
def squash(x):
    """tanh; a new operation of the autograd is one line: the value, its input, its derivative."""
    t = tanh(x.data if type(x) is Value else x)
    return Value(t, (x,), (1.0 - t * t,)) if type(x) is Value else t

def run_layer(weight, x, mask):
    """weight [d][d], x [d] and mask [d], 0 or a factor -> [d]; Values or floats."""
    COUNT["layers run"] += 1
    return [x_i + squash(z) * m for x_i, z, m in zip(x, linear([x], weight)[0], mask)]

def squared_error(y, target):
    """Half the squared distance, one node."""
    gap = [a - b for a, b in zip(floats(y), target)]
    return Value(0.5 * sumprod(gap, gap), y, gap)

def random_network(n_layers, d_model, rng):
    """-> (layers [n_layers][d][d], an input [d], a target [d])"""
    spread = 1.0 / sqrt(n_layers * d_model)
    layers = [[[rng.gauss(0.0, spread) for _ in range(d_model)] for _ in range(d_model)]
              for _ in range(n_layers)]
    return layers, [rng.gauss(0.0, 1.0) for _ in range(d_model)], [0.0] * d_model

def show_keep_everything(rng):
    """What the tape holds at the end of the forward pass, over depth -> {depth: Values}."""
    held = {}
    for n_layers in (8, 16, 32, 64):
        layers, x, target = random_network(n_layers, 4, rng)
        for weight in layers: x = run_layer([list(map(Value, row)) for row in weight], x, [1.0] * 4)
        squared_error(x, target)
        held[n_layers] = len(TAPE)
        TAPE.clear()
    print("  Values on the tape when the backward pass begins, over depth (width 4)")
    bars([(f"{n_layers} layers", values) for n_layers, values in held.items()])
    return held

# 3. Checkpoints -----------------------------------------------------------------------------------
# All strategies are one procedure. To take the gradient through layers lo...hi - 1 whose input is
# stored, either run them on the tape and call backward(); or first run ahead without a tape, store
# the activation at some positions, the cuts, and then treat the pieces, the last one first. The
# strategies differ only in where they cut. A cut function gets lo, hi and the number of slots for
# activations that are free, the input's own included, and returns positions. [] means: put the
# piece on the tape. None: no slot is free; run up to the last layer, tape it alone, begin again.
def cut_nowhere(lo, hi, slots): return []

def cut_every(k): return lambda lo, hi, slots: range(lo + k, hi, k)

def cut_in_half(lo, hi, slots): return [(lo + hi) // 2] if hi - lo > 1 else []

def cut_for_slots(lo, hi, slots):
    if hi - lo == 1: return []
    return [lo + best_cut(hi - lo, slots)] if slots > 1 else None

class Reversal:
    """One gradient computation, with counts of what it holds and runs."""
    def __init__(self, layers, target, cut, dropout=0.0, rng=None, restore=True, detach=False):
        self.layers, self.target, self.cut = layers, target, cut
        self.dropout, self.rng, self.restore, self.detach = dropout, rng, restore, detach
        self.parameters = [[list(map(Value, row)) for row in weight] for weight in layers]
        self.gradients = [array("d", bytes(8 * len(weight) ** 2)) for weight in layers]
        self.stored, self.peak = 1, 0    # activations: stored now; alive at the most
        self.grad = None                 # d loss / d the activation that the pass has come back to

    def random_state(self): return self.rng.getstate() if self.rng else None

    def draw(self, n_layers, width):
        """Dropout masks. What is kept is scaled up, so that the mean stays the same."""
        keep = 1.0 - self.dropout
        if not self.dropout: return [[1.0] * width] * n_layers
        return [[(self.rng.random() < keep) / keep for _ in range(width)] for _ in range(n_layers)]

    def advance(self, x, lo, hi):
        """Run layers lo...hi - 1 without a tape -> the activation behind them."""
        for weight, mask in zip(self.layers[lo:hi], self.draw(hi - lo, len(x))):
            x = run_layer(weight, x, mask)
        return x

    def tape(self, x, lo, hi):
        """Run layers lo...hi - 1 on the tape, and take the gradient back through them."""
        self.peak = max(self.peak, self.stored + hi - lo)
        detached = self.detach and lo > 0                    # a bug, see section 7
        inputs = y = x if detached else list(map(Value, x))
        for weight, mask in zip(self.parameters[lo:hi], self.draw(hi - lo, len(x))):
            y = run_layer(weight, y, mask)
        if self.grad is None:            # the end of the network, reached for the first time
            loss = squared_error(y, self.target)
            self.loss, self.end_state = loss.data, self.random_state()
        else: loss = dot(y, self.grad)   # whose derivative with respect to y is the gradient so far
        loss.backward()
        self.grad = [0.0] * len(x) if detached else [value.grad for value in inputs]
        for weight, gradient in zip(self.parameters[lo:hi], self.gradients[lo:hi]):
            for i, p in enumerate(sum(weight, [])): gradient[i], p.grad = p.grad, 0.0

    def reverse(self, x, state, lo, hi, slots):
        """Gradient through layers lo...hi - 1; x, their input, and the random state are stored."""
        while lo < hi:
            if state and self.restore: self.rng.setstate(state)      # draw the same masks again
            cuts = self.cut(lo, hi, slots)
            if cuts is None:
                self.tape(self.advance(x, lo, hi - 1), hi - 1, hi)
                hi -= 1
                continue
            if not cuts: return self.tape(x, lo, hi)
            edges, kept = [lo, *cuts, hi], [(x, state)]
            for start, end in zip(edges, cuts):
                ahead = self.advance(kept[-1][0], start, end)
                kept.append((ahead, self.random_state()))
            self.stored += len(cuts)
            for i in reversed(range(len(kept))):
                self.reverse(*kept.pop(), edges[i], edges[i + 1], slots - i)
                self.stored -= i > 0
            return

    def run(self, x, slots=0):
        """The whole network from its input -> self, with loss, gradients and grad, that of x."""
        self.reverse(x, self.random_state(), 0, len(self.layers), slots)
        if self.rng: self.rng.setstate(self.end_state)       # as if nothing had run twice
        return self

def strategy_cut(strategy, n_layers, k=None, slots=0):
    """-> (cut function, slots) of a strategy by name."""
    if strategy == "sqrt": strategy, k = "every", max(1, round(sqrt(n_layers)))
    if strategy == "recompute": strategy, slots = "revolve", 1
    if strategy == "every" and (k is None or k < 1): raise ValueError(f"every k layers: k is {k}")
    if strategy == "revolve" and slots < 1: raise ValueError(f"revolve with {slots} slots")
    cuts = {"keep": cut_nowhere, "every": cut_every(k), "halve": cut_in_half,
            "revolve": cut_for_slots}
    if strategy not in cuts: raise ValueError(f"unknown strategy {strategy!r}")
    return cuts[strategy], slots

def gradients(layers, x, target, strategy="keep", k=None, slots=0, **options):
    """Loss and gradient of the network -> (loss, gradients like layers, stats).

    layers: floats [n][d][d]; x, target: [d]. strategy: "keep" (everything), "every" (k-th
    activation), "sqrt" (k = √n), "recompute" (from x, for every layer), "halve", "revolve" (with
    `slots` activations, x included). options: dropout and its rng; restore and detach, see section
    7. stats: peak (activations alive, stored or on the tape), runs (of a layer), input_gradient."""
    if not layers: raise ValueError("a network of 0 layers has no gradient")
    if {len(row) for weight in layers for row in (weight, *weight)} | {len(target)} != {len(x)}:
        raise ValueError(f"x has {len(x)} numbers, and so must the target, rows and columns")
    if not 0.0 <= options.get("dropout", 0.0) < 1.0: raise ValueError(f"dropout in {options}")
    cut, slots = strategy_cut(strategy, len(layers), k, slots)
    COUNT.clear()
    done = Reversal(layers, target, cut, **options).run(x, slots)
    stats = {"peak": done.peak, "runs": COUNT["layers run"], "input_gradient": done.grad}
    rows = range(0, len(x) ** 2, len(x))
    return done.loss, [[list(g[i:i + len(x)]) for i in rows] for g in done.gradients], stats

def expected(strategy, n, k=None, slots=0):
    """The closed forms -> (peak, runs) for n layers; for "halve", n is a power of two."""
    if strategy == "keep": return 1 + n, n
    if strategy == "sqrt": strategy, k = "every", round(sqrt(n))
    if strategy == "every":              # the last piece is run once, and may be shorter
        pieces = ceil(n / k)
        last = n - (pieces - 1) * k
        return max(pieces + last, (pieces - 1 + k) * (pieces > 1)), 2 * n - last
    if strategy == "halve": return 2 + round(log2(n)), n + n * round(log2(n)) // 2
    if strategy == "recompute": return 2, n * (n + 1) // 2
    return min(slots, n) + 1, n + revolve_cost(n, slots)

def peak_bytes(layers, x, target, strategy, k=None, slots=0):
    """The most memory that Python allocates at a time, beside weights and their Values."""
    cut, slots = strategy_cut(strategy, len(layers), k, slots)
    peaks, collecting = [], gc.isenabled()
    gc.disable()
    for _ in range(2):                   # one of them may include what Python builds only once
        reversal = Reversal(layers, target, cut)
        gc.collect()                     # or freed objects that Python keeps would be used again,
        tracemalloc.start()              # uncounted
        reversal.run(x, slots)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    if collecting: gc.enable()
    return min(peaks)

def show_strategies(network):
    """Six strategies on one network -> {strategy: {peak, runs, bytes}}."""
    n, truth = len(network[0]), gradients(*network)
    chosen = {"keep everything": ("keep",), "every 16th": ("every", 16), "every √n-th": ("sqrt",),
              "halve, recursively": ("halve",), "revolve, 5 slots": ("revolve", None, 5),
              "recompute everything": ("recompute",)}
    results, rows, same, exact = {}, [], True, True
    for label, strategy in chosen.items():
        loss, found, stats = gradients(*network, *strategy)
        peak, runs = expected(strategy[0], n, *strategy[1:])
        same = same and (loss, found) == truth[:2]
        same = same and stats["input_gradient"] == truth[2]["input_gradient"]
        exact = exact and (stats["peak"], stats["runs"]) == (peak, runs)
        size = peak_bytes(*network, *strategy)
        results[label] = {"peak": stats["peak"], "runs": stats["runs"], "bytes": size}
        rows.append([label, stats["peak"], peak, stats["runs"], runs, f"{stats['runs'] / n:.2f}",
                     f"{size / 1000:.0f}"])
    table([f"{n} layers", "alive", "formula", "layer runs", "formula", "per layer", "kB"], *rows)
    print("  alive: activations at the peak, stored or on the tape; kB: Python's peak allocation")
    check("all strategies: same loss and gradients, bit for bit", same, f"{len(chosen)} strategies")
    check("activations alive and layer runs = their formulas", exact)
    return results

# 4. Every k-th activation -------------------------------------------------------------------------
# With n layers and a checkpoint at every k-th, n/k activations are stored and, while one piece is
# on the tape, k more are alive: n/k + k, least where both are √n. That counts a stored activation
# and a layer on the tape as one each. In bytes they differ: a checkpoint is one vector, of c bytes;
# a layer on the tape holds all that was computed in between, t bytes. n/k·c + k·t is least at
# k = √(n·c/t). In a transformer t/c is so large (section 8) that every layer is a checkpoint.
def show_every_kth(network):
    """Memory over k, in activations and in bytes -> the best k of each, and its formula."""
    layers, x, target = network
    n, half = len(layers), (layers[:len(layers) // 2], x, target)
    peaks = {k: gradients(*network, "every", k)[2]["peak"] for k in range(1, n + 1)}
    sizes = {k: peak_bytes(*network, "every", k) for k in range(1, n + 1) if n % k == 0 or k == 3}
    # c and t are slopes: what a layer more takes as a checkpoint, and what it takes on the tape.
    checkpoint = (sizes[1] - peak_bytes(*half, "every", 1)) / (n - n // 2)
    taped = (sizes[n] - peak_bytes(*half, "keep")) / (n - n // 2)
    plot(f"memory over k (logarithmic), as a share of keeping all {n} layers",
         {"activations": [(k, peak / peaks[n]) for k, peak in peaks.items()],
          "bytes": [(k, size / sizes[n]) for k, size in sizes.items()]}, log_x=True)
    best, best_bytes = min(peaks, key=peaks.get), min(sizes, key=sizes.get)
    formula = sqrt(n * checkpoint / taped)
    print(f"  least activations at k = {best}, √n = {sqrt(n):.1f}; "
          f"least bytes at k = {best_bytes}, √(n·c/t) = {formula:.1f}")
    exact = all(peak == expected("every", n, k)[0] for k, peak in peaks.items())
    check("memory in activations = its formula for every k", exact, f"k from 1 to {n}")
    check("no k needs fewer activations than √n", peaks[best] == peaks[round(sqrt(n))], peaks[best])
    return {"activations": best, "bytes": best_bytes, "bytes_formula": formula}

# 5. The optimal schedule --------------------------------------------------------------------------
# c slots hold activations, the input in one of them. Run ahead m layers and store: the n - m layers
# behind the cut are then treated with c - 1 slots, and after them the m before it with c again.
# With one slot, every layer needs a run from the input. (Griewank & Walther 2000)
@lru_cache(maxsize=None)
def revolve_cost(n_layers, n_slots):
    """The fewest layer runs off the tape; each layer's one run on the tape is not counted."""
    if n_layers < 1 or n_slots < 1: raise ValueError(f"{n_layers} layers, {n_slots} slots")
    if n_layers == 1 or n_slots == 1: return n_layers * (n_layers - 1) // 2
    m = best_cut(n_layers, n_slots)
    return m + revolve_cost(n_layers - m, n_slots - 1) + revolve_cost(m, n_slots)

@lru_cache(maxsize=None)
def best_cut(n_layers, n_slots):
    """Where to store the first activation: the m that makes the sum above least."""
    return min(range(1, n_layers), key=lambda m: m + revolve_cost(n_layers - m, n_slots - 1)
               + revolve_cost(m, n_slots))

def revolve_closed_form(n_layers, n_slots):
    """The same without search. If no layer runs more than r times off the tape, binomial(c + r, c)
    layers can be treated; from the smallest such r, the cost is r n - binomial(c + r, c + 1)."""
    r = 0
    while comb(n_slots + r, n_slots) < n_layers: r += 1
    return r * n_layers - comb(n_slots + r, n_slots + 1)

def show_revolve(network):
    """Cost over slots: counted, by dynamic program, in closed form -> the frontier's points."""
    n, rows, frontier = len(network[0]), [], []
    for slots in (1, 2, 3, 4, 5, 6, 8, 12, 24, 64):
        stats = gradients(*network, "revolve", slots=slots)[2]
        frontier.append((stats["peak"], stats["runs"] / n))
        rows.append([f"{slots}", stats["peak"], stats["runs"] - n, revolve_cost(n, slots),
                     revolve_closed_form(n, slots), f"{stats['runs'] / n:.2f}"])
    table(["slots", "alive", "runs off the tape", "program", "closed form", "per layer"], *rows)
    others = {"every k-th": [("every", k) for k in (1, 2, 4, 8, 16, 32)], "halve": [("halve",)]}
    curves = {"revolve": frontier}
    for name, strategies in others.items():
        found = [gradients(*network, *strategy)[2] for strategy in strategies]
        curves[name] = [(stats["peak"], stats["runs"] / n) for stats in found]
    print()
    plot("runs per layer over activations alive (both logarithmic)", curves, True, True)
    sizes = [(layers, slots) for layers in range(1, n + 1) for slots in range(1, 17)]
    closed = all(revolve_cost(*size) == revolve_closed_form(*size) for size in sizes)
    check("revolve: runs counted = dynamic program", all(row[2] == row[3] for row in rows))
    check("dynamic program = closed form", closed, f"{len(sizes):,} sizes")
    return frontier

# 6. Training --------------------------------------------------------------------------------------
def fit(network, strategy, dropout, seed, steps=24, rate=0.2):
    """Gradient descent -> the losses."""
    layers, x, target = network
    rng, losses = random.Random(seed), []
    for _ in range(steps):
        loss, grads, _ = gradients(layers, x, target, *strategy, dropout=dropout, rng=rng)
        layers = [[[w - rate * g for w, g in zip(*rows)] for rows in zip(weight, grad)]
                  for weight, grad in zip(layers, grads)]
        losses.append(loss)
    return losses

def show_training(rng):
    """Loss curves with and without checkpoints, with and without dropout -> the curves."""
    network, seed = random_network(16, 4, rng), rng.random()
    curves, same = {}, True
    for dropout in (0.0, 0.1):
        kept, forgot = (fit(network, [name], dropout, seed) for name in ("keep", "sqrt"))
        same = same and kept == forgot
        curves[f"dropout {dropout}"] = list(enumerate(forgot))
    plot("loss (log) over steps, with checkpoints at every √n-th layer", curves, log_y=True,
         height=8)
    check("training with checkpoints: the same losses, bit for bit, with dropout too", same)
    return curves

# 7. The bugs people ship --------------------------------------------------------------------------
def flatten(gradient): return [g for matrix in gradient for row in matrix for g in row]

def compare(found, truth):
    """-> (cosine of the angle between two gradients, ratio of their norms)"""
    a, b = flatten(found), flatten(truth)
    norms = sqrt(sumprod(a, a)), sqrt(sumprod(b, b))
    return sumprod(a, b) / (norms[0] * norms[1]), norms[0] / norms[1]

def show_bugs(rng):
    """Wrong gradients that no error reports -> {bug: (cosine, norm ratio, layers without one)}."""
    network, seed = random_network(16, 8, rng), rng.random()
    def gradient(strategy, **mistake):
        return gradients(*network, strategy, dropout=0.2, rng=random.Random(seed), **mistake)[1]
    truth, rows, results = gradient("keep"), [], {}
    for label, mistake in {"correct": {}, "new dropout in the second run": {"restore": False},
                           "the piece's input is detached": {"detach": True}}.items():
        found = gradient("sqrt", **mistake)
        empty = sum(not any(flatten([matrix])) for matrix in found)
        results[label] = (*compare(found, truth), empty)
        rows.append([label, f"{results[label][0]:.4f}", f"{results[label][1]:.4f}", empty])
    table(["against the true gradient", "cosine", "norm ratio", "layers with gradient 0"], *rows)
    _, redrawn, detached = results.values()
    check("random state restored: the true gradient, bit for bit", gradient("sqrt") == truth)
    check("new dropout in the second run: not the gradient", redrawn[0] < 1.0 - 1e-6,
          f"cosine {redrawn[0]:.4f}")
    check("detached input: gradient 0 in all but the last piece", detached[2] >= 12,
          f"{detached[2]} layers")
    return results

# 8. The real world --------------------------------------------------------------------------------
# Korthikanti et al. 2022: for the backward pass, a transformer layer in 16 bits keeps s·b·h·(34 +
# 5·a·s/h) bytes: s tokens, b sequences, h = d_model, a heads. The second term is the attention's
# core: scores, their softmax and dropout, which FlashAttention recomputes as well (microflash).
# Selective recomputation repeats the core alone; full repeats a layer from its input, 2·s·b·h.
# (The 34 is for GPT's layer; Llama's gated MLP and shared key/value heads change it.)
MODELS = {"GPT-3 175B": (96, 12288, 96, 2048), "Llama-2-70B": (80, 8192, 64, 4096),
          "Llama-3.1-405B": (126, 16384, 128, 8192)}         # layers, d_model, heads, tokens

def activation_bytes(seq_len, d_model, n_heads, n_layers=1, batch=1, recompute="none"):
    """Bytes that n_layers keep for the backward pass; recompute: "none", "selective", "full"."""
    per_number = {"none": 34 + 5 * n_heads * seq_len / d_model, "selective": 34, "full": 2}
    if recompute not in per_number: raise ValueError(f"recompute is {recompute!r}")
    return n_layers * batch * seq_len * d_model * per_number[recompute]

def extra_flops(seq_len, d_model, recompute):
    """FLOPs of the second run as a share of forward and backward. Per token and layer, the matrices
    take 24 h² forward and the attention core 4 s h; the backward pass takes twice as much."""
    matrices, core = 24 * d_model ** 2, 4 * seq_len * d_model
    again = {"none": 0, "selective": core, "full": matrices + core}[recompute]
    return again / (3 * (matrices + core))

def show_real_world(n_devices=8):
    """Activations of one sequence and the price of having less -> {model: {recompute: GB}}."""
    rows, results = [], {}
    for name, (n_layers, d_model, n_heads, seq_len) in MODELS.items():
        results[name] = {}
        for recompute in ("none", "selective", "full"):
            size = activation_bytes(seq_len, d_model, n_heads, n_layers, 1, recompute) / 1e9
            results[name][recompute] = size
            rows.append([f"{name}, {seq_len:,} tokens", recompute, f"{size:,.1f} GB",
                         f"{size / n_devices:,.1f} GB",
                         f"{extra_flops(seq_len, d_model, recompute):.1%}"])
    table(["one sequence", "recompute", "activations", f"per device of {n_devices}", "extra FLOPs"],
          *rows)
    _, d_model, n_heads, seq_len = MODELS["GPT-3 175B"]
    extra, ratio = extra_flops(seq_len, d_model, "selective"), 5 * n_heads * seq_len / d_model
    print(f"  GPT-3: 5as/h is {ratio:.0f}, as in the paper. Its 2.7 % of extra FLOPs for selective "
          f"are {0.027 / extra:.1f} times\n  the core's forward pass, {extra:.2%}, counted here.")
    return results

# Report -------------------------------------------------------------------------------------------
# >>> shared: report (printing, charts, checks, command line; the same in every script)
CHECKS = []                              # (claim, does it hold?, the numbers behind it)

def begin():
    """Forget the previous run and print the title -> the time."""
    for store in (TAPE, COUNT, CHECKS): store.clear()
    print((__doc__ or "").split("\n")[0])
    return time.perf_counter()

def section(title, show=lambda: None, *arguments):
    """Print a heading and what show(*arguments) prints -> what it returns."""
    print(f"\n{title}\n{'─' * len(title)}")
    return show(*arguments)

def progress(text=""):
    if sys.stderr.isatty(): print(f"\r{text:<79}\r", end="", file=sys.stderr, flush=True)

def table(*rows):
    """Aligned columns under a header, the first to the left and the others to the right."""
    rows = [[f"{cell:,}" if type(cell) is int else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows[:1] + [["─" * width for width in widths]] + rows[1:]:
        print(" ", row[0].ljust(widths[0]), *(f" {c:>{w}}" for c, w in zip(row[1:], widths[1:])))

def short(x): return f"{x:,.0f}" if 1e4 <= abs(x) < 1e7 else f"{x:,.4g}"

def bars(rows, unit="", width=50):
    """A horizontal bar for each (label, value)."""
    longest, top = max(len(label) for label, _ in rows), max(value for _, value in rows) or 1.0
    for label, value in rows:
        bar = "█" * round(width * value / top) or "▏"
        print(f"  {label:<{longest}} {bar} {short(value)}{unit}")

def plot(title, curves, log_x=False, log_y=False, width=80, height=12):
    """{name: [(x, y), ...]} over common axes; each curve has its own mark, later ones on top."""
    def cells(values, on_log, n):
        at = [log(value) if on_log else value for value in values]
        low, span = min(at), max(at) - min(at) or 1.0
        return [round((x - low) / span * (n - 1)) for x in at]
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    marks = [mark for mark, curve in zip("●○▲△■", curves.values()) for _ in curve]
    grid = [[" "] * width for _ in range(height)]
    for mark, column, row in zip(marks, cells(xs, log_x, width), cells(ys, log_y, height)):
        grid[-1 - row][column] = mark
    print(f"  {title}\n ", *(f"  {mark} {name}" for mark, name in zip("●○▲△■", curves)))
    for y, line in zip([short(max(ys))] + [""] * (height - 2) + [short(min(ys))], grid):
        print(f"  {y:>9} │{''.join(line)}".rstrip())
    print(f"  {'':9} └{short(min(xs)) + ' ':─<{width // 2}}{' ' + short(max(xs)):─>{width // 2}}")

def heatmap(rows, low, high):
    """A matrix as shades, from blank for `low` to solid for `high`."""
    for row in rows:
        shades = (" ░▒▓█"[round(4 * (value - low) / (high - low))] for value in row)
        print(("   " + "".join(2 * shade for shade in shades)).rstrip())

def check(claim, holds, numbers=""): CHECKS.append((claim, bool(holds), str(numbers)))

def finish(started, **results):
    """Print the checks and the time -> the results, with the checks among them."""
    section("Checks")
    for claim, holds, numbers in CHECKS:
        print(f"  {'✓' if holds else '✗'} {claim}{numbers and f'  ({numbers})'}")
    held = sum(holds for _, holds, _ in CHECKS)
    print(f"\n{held} of {len(CHECKS)} checks hold. {time.perf_counter() - started:.1f} s")
    return results | {"checks": {claim: holds for claim, holds, _ in CHECKS}}

def run(main, **readers):
    """The command line: --help, --seed N, and an option for each function that reads a file."""
    if hasattr(sys, "ps1"): return main()                # pasted into a notebook
    plain = dict(zip("✓✗█▓▒░▏─│└●○▲△■·→≤≥≈×√²", "vx##+.|-|`*o^A#.><>~xV2"))
    def ascii_art(e): return "".join(plain.get(c, "?") for c in e.object[e.start:e.end]), e.end
    codecs.register_error("ascii art", ascii_art)
    sys.stdout.reconfigure(errors="ascii art")
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of all random numbers")
    for name in readers: parser.add_argument(f"--{name}", metavar="FILE", help="UTF-8, one a line")
    gc.disable()                         # graphs have no cycles for the collector to look for
    try:
        try:
            options = {k: text for k, text in vars(parser.parse_args()).items() if text is not None}
            for name in readers.keys() & options.keys():
                try: options[name] = readers[name](options[name])
                except (OSError, ValueError) as error: parser.error(f"--{name}: {error}")
            sys.exit(not all(main(**options)["checks"].values()))
        finally: sys.stdout.flush()
    except KeyboardInterrupt: sys.exit(130)
    except BrokenPipeError: os._exit(141)                # the reader has gone, as in `... | head`
# <<< shared: report

def main(seed=42):
    """Run all sections -> the measurements."""
    started, rng = begin(), random.Random(seed)
    network = random_network(64, 4, rng)
    section("1. Autograd", show_autograd)
    held = section("2. Keep everything", show_keep_everything, rng)
    strategies = section("3. Checkpoints", show_strategies, network)
    best = section("4. Every k-th activation", show_every_kth, network)
    frontier = section("5. The optimal schedule", show_revolve, network)
    curves = section("6. Training", show_training, rng)
    bugs = section("7. The bugs people ship", show_bugs, rng)
    gigabytes = section("8. The real world", show_real_world)
    return finish(started, held=held, strategies=strategies, best_k=best, frontier=frontier,
                  curves=curves, bugs=bugs, gigabytes=gigabytes)

if __name__ == "__main__": run(main)
