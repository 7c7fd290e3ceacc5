"""A state space model reads with a memory of fixed size; selection decides what that memory keeps.

Attention keeps every token, so its cache and its work grow with the text. A state space model keeps
a state of fixed size, h' = A h + B u: a token costs the same after ten or after a million others.
With constant A, B, C it can run as a convolution or a tree, but it treats all tokens alike. Mamba
lets a token choose its step Δ, B and C: a large Δ writes it down, a small one passes over it.

  Gu et al. 2021 (2111.00396) S4, structured state spaces    Blelloch 1990 parallel prefix sums
  Gu & Dao 2023 (2312.00752) Mamba, selection                Dao & Gu 2024 (2405.21060) Mamba-2
  python microssm.py [--seed N]      needs only Python, takes a few seconds

  1. Autograd                a gated state update is one node
  2. Continuous to discrete  a differential equation becomes a recurrence, in three ways
  3. Three programs          recurrence, convolution and tree: one model, the same numbers
  4. Selection               the kernel follows the input; the Mamba block
  5. Selective copying       trained with selection and without: the claim behind Mamba
  6. Constant state          token by token = all at once, beside a growing attention cache
  7. Duality                 the same layer as masked attention, and in chunks
  8. The bugs people ship    a wrong sign, no softplus, a leaking state, Euler, a look ahead
  9. The real world          Mamba-2.8B beside a transformer; what a fixed memory cannot do
"""
import argparse, codecs, gc, os, random, sys, time
from collections import defaultdict
from functools import partial
from itertools import accumulate, combinations, product
from math import ceil, exp, expm1, log, log1p, log2, sqrt, tanh
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

def pointwise(function, x):              # function(x) -> (value, slope); a Value becomes one node
    if type(x) is not Value: return function(x)[0]
    y, slope = function(x.data)
    return Value(y, (x,), (slope,))
def sigmoid(x): return 0.5 + 0.5 * tanh(0.5 * x)         # 1 / (1 + e^-x), without overflow
softplus = partial(pointwise, lambda x: (max(x, 0.0) + log1p(exp(-abs(x))), sigmoid(x)))
silu = partial(pointwise, lambda x: (x * sigmoid(x), sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))))
negative_exp = partial(pointwise, lambda x: (-exp(x), -exp(x)))
def state_update(h, delta, a, b, u):
    """e^(Δa) h + Δ b u as one node, Values or floats; section 2 says what the letters stand for."""
    if type(u) is not Value: return exp(delta * a) * h + delta * u * b
    inputs = h, delta, a, b, u
    h, delta, a, b, u = h.data, delta.data, a.data, b.data, u.data
    decay, inflow = exp(delta * a), delta * u
    slopes = decay, a * decay * h + b * u, delta * decay * h, inflow, delta * b
    return Value(decay * h + inflow * b, inputs, slopes)
def largest_difference(a, b):
    return max(map(largest_difference, a, b)) if isinstance(a, (list, tuple)) else abs(a - b)

def show_autograd(rng, _):
    """The gated state update as one node; its gradient beside the slopes by differences."""
    point, slopes = [rng.uniform(0.5, 1.5) * sign for sign in (1, 1, -1, 1, -1)], []
    for i, x in enumerate(point):
        low, high = (state_update(*point[:i], x + step, *point[i + 1:]) for step in (-1e-5, 1e-5))
        slopes.append((high - low) / 2e-5)
    y = state_update(*(leaves := list(map(Value, point))))
    print(f"  e^(Δa) h + Δ b u, with its five derivatives: {len(TAPE)} node")
    y.backward()
    error = largest_difference(slopes, [x.grad for x in leaves])
    check("the fused state update has the slopes of the function", error < 1e-8, f"{error:.0e}")

# 2. Continuous to discrete ------------------------------------------------------------------------
# In continuous time the model is h' = A h + B u: memory fades at rate A while the input flows in.
# The letters are those of the papers, with these shapes from here on:
#   u  input, y  output  [seq_len][d_inner]  d_inner channels, each with a state of its own
#   h  state, A  decay   [d_inner][d_state]  A is negative: what is in h fades as e^(A t)
#   B  write, C  read    [seq_len][d_state]  u goes into h along B; y = C·h + D u, D [d_inner]
#   Δ  delta, step       [seq_len][d_inner]  the time that passes at a token
# A is diagonal: each number of h is a system of its own, in steps h = ā h + b̄ u. Euler: slope at
# the start of a step; bilinear: mean of both ends; zero-order hold (ZOH): exact for constant u.
def discretize(a, b, delta, method):
    """h' = a h + b u over a step delta > 0 -> (ā, b̄) of h = ā h + b̄ u. ValueError otherwise.
    method: "euler", "bilinear" (Gu et al. 2021) or "zoh" (Gu & Dao 2023, equation 4)."""
    if not delta > 0.0 or method not in ("euler", "bilinear", "zoh"):
        raise ValueError(f"delta {delta} (positive?), method {method!r} (euler, bilinear, zoh?)")
    z = delta * a
    if method == "euler": return 1.0 + z, delta * b
    if method == "bilinear": return (1.0 + z / 2.0) / (1.0 - z / 2.0), delta * b / (1.0 - z / 2.0)
    return exp(z), expm1(z) / a * b if z else delta * b

def show_discretization(*_):
    """h' = 1 - h from h = 0, against the exact 1 - e^-t; then large steps -> orders measured."""
    methods, curves = ("euler", "bilinear", "zoh"), defaultdict(list)
    for n, method in product((4, 8, 16, 32, 64, 128, 256, 512), methods):
        a_bar, b_bar = discretize(-1.0, 1.0, 4.0 / n, method)
        h = accumulate(range(n), lambda h, _: a_bar * h + b_bar, initial=0.0)
        errors = [abs(x - 1.0 + exp(-4.0 * k / n)) for k, x in enumerate(h)]
        curves[method].append((4.0 / n, max(errors)))
    zoh = max(error for _, error in curves.pop("zoh"))       # rounding: no place on a log axis
    plot("h' = 1 - h: largest error over Δ (both axes log)", curves, True, True, height=8)
    order = [log2(curve[-2][1] / curve[-1][1]) for curve in curves.values()]
    decay = [[x, *(discretize(-1.0, 1.0, x, m)[0] for m in methods)] for x in (0.5, 1.5, 2.5, 8.0)]
    table(["Δ|a| and ā by", *methods], *([f"{x:.4f}" for x in row] for row in decay))
    check("Euler converges with order 1, bilinear with order 2; ZOH is exact", zoh < 1e-12
          and largest_difference(order, [1, 2]) < 0.1, "{:.2f}, {:.2f}, {:.0e}".format(*order, zoh))
    check("|ā| > 1 by Euler if Δ|a| > 2, by bilinear and ZOH never", all((abs(x) > 1.0) == (d > 2.0)
          and max(abs(y), abs(z)) < 1.0 for d, x, y, z in decay), f"Euler {decay[-1][1]:.0f} at 8")
    return order

# 3. Three programs --------------------------------------------------------------------------------
# Mamba takes ā by ZOH and b̄ by Euler: B, learned, makes up for the difference. With the same Δ, B
# and C at every step the model is linear and time-invariant (LTI): three programs can run it.
def check_shapes(*cases):
    for name, matrix, n, m in cases:
        if not n * m or [len(row) for row in matrix] != [m] * n:
            raise ValueError(f"{name} is {len(matrix)} x {set(map(len, matrix))}, not {n} x {m}")
def zeros(n_rows, n_columns, like):
    COUNT["numbers held"] += n_rows * n_columns
    return [[Value(0.0) if type(like[0][0]) is Value else 0.0] * n_columns for _ in range(n_rows)]
def read_out(state, u, C, D): return [dot([*h, x], [*C, d]) for h, x, d in zip(state, u, D)]

def selective_scan(u, delta, A, B, C, D, state=None):
    """u, delta: [seq_len][d_inner], A: [d_inner][d_state], B, C: [seq_len][d_state], D: [d_inner]
    -> y [seq_len][d_inner], Values or floats. Gu & Dao 2023, algorithm 2: A by ZOH, B by Euler.
    state [d_inner][d_state]: where to go on from, updated in place. ValueError if shapes misfit."""
    n, d_inner, d_state, ys = len(u), len(A), len(A and A[0]), []
    check_shapes(("u", u, n, d_inner), ("delta", delta, n, d_inner), ("A", A, d_inner, d_state),
                 ("B", B, n, d_state), ("C", C, n, d_state), ("D", [D], 1, d_inner),
                 ("state", A if state is None else state, d_inner, d_state))
    state = state or zeros(d_inner, d_state, like=u)
    for u_t, delta_t, B_t, C_t in zip(u, delta, B, C):
        for i, (x, step) in enumerate(zip(u_t, delta_t)):
            state[i] = [state_update(h, step, a, b, x) for h, a, b in zip(state[i], A[i], B_t)]
        ys.append(read_out(state, u_t, C_t, D))
    COUNT["multiply-adds"] += 4 * n * d_inner * d_state
    COUNT["steps in a row"] += n
    return ys
# The convolution: y[t] sums what every u[s] still weighs at t, C[t]·e^(A (Δ[s+1] + ... + Δ[t]))
# Δ[s] B[s]. If LTI, that depends on t - s alone: a kernel. (Production: FFT, L log L, not L²/2.)
def response(t, s, delta, A, B, C):
    """dy[t] / du[s], s <= t, of one channel without D. delta: [seq_len], A: [d_state]."""
    COUNT["multiply-adds"] += 3 * len(A)
    passed = sum(delta[s + 1:t + 1])
    return dot(C[t], [exp(a * passed) * delta[s] * b for a, b in zip(A, B[s])])
def convolution(u, delta, A, B, C, D):
    kernel = [response(t, 0, [step for step, in delta], A[0], B, C) for t in range(len(u))]
    COUNT["steps in a row"] += 1
    COUNT["numbers held"] += len(kernel) + len(u)
    return [[dot([*kernel[:t + 1], *D], [x for x, in [*u[t::-1], u[t]]])] for t in range(len(u))]
# The tree: (a1, b1), then (a2, b2), is one pair again: a2 (a1 h + b1) + b2. Neighbours combine.
def associative_scan(pairs):
    """[(a, b)] of h = a h + b, from h = 0 -> [h after each], Values or floats. Blelloch 1990."""
    if not pairs: raise ValueError("0 pairs: there is nothing to scan")
    def combine(first, then):
        COUNT["multiply-adds"] += 2
        return then[0] * first[0], then[0] * first[1] + then[1]
    size, step = 1 << (len(pairs) - 1).bit_length(), 1
    tree = [*pairs, *[(1.0, 0.0)] * (size - len(pairs))]     # (1, 0) leaves h as it is
    while step < size:                                       # up: sums of 2, 4, 8, ... pairs
        for i in range(2 * step - 1, size, 2 * step): tree[i] = combine(tree[i - step], tree[i])
        step *= 2
    total, tree[-1] = tree[-1], (1.0, 0.0)
    while step > 1:                      # down: a left child gets what comes before its parent,
        step //= 2                       # a right child that and then its left sibling
        for i in range(2 * step - 1, size, 2 * step):
            tree[i - step], tree[i] = tree[i], combine(tree[i], tree[i - step])
        COUNT["steps in a row"] += 2                         # this level and its twin on the way up
    COUNT["numbers held"] += 2 * size
    return [b for _, b in [*tree[1:], total][:len(pairs)]]

def parallel_scan(u, delta, A, B, C, D, method="zoh"):
    """selective_scan by a tree for each number of the state, in floats; method: for A."""
    n, d_inner, d_state, states = len(u), len(A), len(A[0]), []
    for i, j in product(range(d_inner), range(d_state)):
        COUNT["steps in a row"] = 0                          # the trees do not wait for each other
        states.append(associative_scan([
            (discretize(A[i][j], 1.0, step[i], method)[0], step[i] * b[j] * x[i])
            for step, b, x in zip(delta, B, u)]))
    COUNT["multiply-adds"] += 3 * n * d_inner * d_state
    history = [[h[i:i + d_state] for i in range(0, len(h), d_state)] for h in zip(*states)]
    return list(map(read_out, history, u, C, [D] * n))

def show_programs(rng, _, n=250, N=4):
    """One LTI channel with N numbers of state by all three -> what each took, and its formula."""
    B, C = ([rng.gauss(0.0, 1.0) for _ in range(N)] for _ in range(2))
    u, levels, ys, costs = [[rng.gauss(0.0, 1.0)] for _ in range(n)], ceil(log2(n)), [], {}
    formulas = {selective_scan: [n, (5 * N + 1) * n, N], convolution:
                [1, (4 * N + 1) * n + n * (n + 1) // 2, 2 * n], parallel_scan:
                [2 * levels, (4 * N + 1) * n + 4 * N * (2 ** levels - 1), 2 * N * 2 ** levels]}
    what = "steps in a row", "multiply-adds", "numbers held"
    for program, formula in formulas.items():
        COUNT.clear()
        ys.append(program(u, [[0.1]] * n, [[-0.5, -1, -2, -4]], [B] * n, [C] * n, [1.0]))
        costs[program.__name__] = [COUNT[key] for key in what], formula
    table([f"LTI, {n} steps", *what, "formulas: steps", "multiply-adds", "held"],
          *([name, *counted, *formula] for name, (counted, formula) in costs.items()))
    error = largest_difference(ys[1:], ys[:1] * 2)
    check("recurrence, convolution and tree: the same output", error < 1e-12, f"{error:.0e}")
    counted, formula = map(list, zip(*costs.values()))
    check("what each program took: counted = formula", counted == formula)
    return costs

# 4. Selection -------------------------------------------------------------------------------------
# S6, the layer in Mamba, makes Δ, B and C from the token: Δ near 0 leaves the state alone, a large
# Δ lets it fade and writes the token. The price: no kernel, no convolution. The tree still works.
def s6_weights(rng, d_inner, d_state, selective=True, **shapes):
    """Values by name, with matrices of other `shapes`. A and Δ begin as a spread of time scales."""
    if selective: shapes |= {"W_delta": (d_inner, d_inner), "W_B": (d_state, d_inner)}
    shapes |= {"W_C": (d_state, d_inner)} if selective else {"B": (1, d_state), "C": (1, d_state)}
    def matrix(n_out, n_in):
        return [[Value(rng.gauss(0.0, n_in ** -0.5)) for _ in range(n_in)] for _ in range(n_out)]
    return {name: matrix(*shape) for name, shape in shapes.items()} | {
        "A_log": [[Value(log(n + 1.0)) for n in range(d_state)] for _ in range(d_inner)],
        "delta_bias": [[Value(log(expm1(0.1 ** rng.random()))) for _ in range(d_inner)]],
        "D": [[Value(1.0) for _ in range(d_inner)]]}
def frozen(w): return {name: list(map(floats, matrix)) for name, matrix in w.items()}
def decay_rates(w, rate=negative_exp): return [list(map(rate, row)) for row in w["A_log"]]
def select(u, w, positive=softplus):
    """u [seq_len][d_inner] -> delta, B, C of every step; constant if w has no matrices for them."""
    bias, n = w["delta_bias"][0], len(u)
    if "W_B" not in w: return [list(map(positive, bias))] * n, w["B"] * n, w["C"] * n
    delta = [[positive(x + b) for x, b in zip(row, bias)] for row in linear(u, w["W_delta"])]
    return delta, linear(u, w["W_B"]), linear(u, w["W_C"])       # W_delta: low rank in production
# The Mamba block: S6 between a convolution, causal with a short kernel per channel, and a gate.
def mamba_weights(rng, d_model, d_inner, d_state, d_conv=4, **shapes):
    return s6_weights(rng, d_inner, d_state, conv=(d_inner, d_conv), conv_bias=(1, d_inner),
                      out=(d_model, d_inner), **{"in": (2 * d_inner, d_model)}, **shapes)
def mamba_state(w, like):
    """What a block keeps of the past: the convolution's last d_conv - 1 inputs, and h."""
    d_inner, d_state, d_conv = len(w["A_log"]), len(w["A_log"][0]), len(w["conv"][0])
    return zeros(d_conv - 1, d_inner, like), zeros(d_inner, d_state, like)
def mamba_block(xs, w, state=None, ahead=0):
    """xs [seq_len][d_model] -> [seq_len][d_model]; goes on from `state` and updates it in place.
    Gu & Dao 2023, section 3.4. ahead: how far the convolution sees ahead; a bug, any but 0."""
    (window, h), projected = state or mamba_state(w, xs), linear(xs, w["in"])
    d_inner, d_conv = len(h), len(w["conv"][0])
    window += [row[:d_inner] for row in projected][ahead:] + zeros(ahead, d_inner, xs)
    u = [[silu(dot(column, kernel) + bias) for column, kernel, bias
          in zip(zip(*window[t:t + d_conv]), w["conv"], w["conv_bias"][0])] for t in range(len(xs))]
    del window[:len(xs)]
    delta, B, C = select(u, w)
    y = selective_scan(u, delta, decay_rates(w), B, C, w["D"][0], h)
    return linear([[v * silu(gate) for v, gate in zip(row, both[d_inner:])]
                   for row, both in zip(y, projected)], w["out"])

def show_selection(rng, _, n=12):
    """What each input weighs in each output -> how far the weights at one distance t - s differ."""
    lti, s6 = (frozen(s6_weights(rng, 4, 4, selective)) for selective in (False, True))
    one, other = ([[rng.gauss(0.0, 1.0) for _ in range(4)] for _ in range(n)] for _ in range(2))
    panels, bent = [[] for _ in range(n)], []
    for w, u in (lti, one), (s6, one), (s6, other):
        (delta, B, C), A = select(u, w), decay_rates(w)
        weights = [[response(t, s, [row[0] for row in delta], A[0], B, C) for s in range(t + 1)]
                   for t in range(n)]
        top = max(abs(x) for row in weights for x in row)
        bent += [max(abs(x - y[0]) / top for row in weights for x, y in zip(row[::-1], weights))]
        for line, row in zip(panels, weights):
            line += [0.0] * 2 + [0.25 + 0.75 * abs(x) / top for x in row] + [0.25] * (n - len(row))
    y, z = (scan(u, delta, A, B, C, w["D"][0]) for scan in (selective_scan, parallel_scan))
    print("  what input s (across) weighs in output t (down): LTI; S6; S6 with another input")
    heatmap(panels, 0.0, 1.0)
    check("S6: recurrence = tree still", (e := largest_difference(y, z)) < 1e-12, f"{e:.0e}")
    check("LTI: one kernel for all positions; S6: none", bent[0] < 1e-12 < 1e-6 < min(bent[1:]),
          "weights differ by {:.0e}, {:.2f}, {:.2f}".format(*bent))
    return bent

# 5. Selective copying -----------------------------------------------------------------------------
# Two data tokens lie in noise: tell the first, then the second. An LTI layer weighs a token by its
# age, and that is random. Both run bare, as in the paper's plain block: token, layer, logits.
KINDS, NOISE = range(4), 4               # tokens 5 and 6 ask: "which was first?", "second?"
def copying_sequences(n_steps):
    """Every sequence of the task -> [(tokens, the two data tokens in order)]."""
    noise = [NOISE] * n_steps
    return [([*noise[:i], x, *noise[i + 1:j], y, *noise[j + 1:], 5, 6], (x, y))
            for (i, j), x, y in product(combinations(range(n_steps), 2), KINDS, KINDS)]
def answer(w, samples, positive=softplus, rate=negative_exp, scan=selective_scan):
    """-> [(logits, data token)], two for each sample. Other than the defaults are bugs."""
    u, A, results = w["token"], decay_rates(w, rate), []
    kinds = list(zip(u, *select(u, w, positive)))    # no convolution: Δ, B, C depend on the token
    for tokens, data in samples:
        u, delta, B, C = zip(*(kinds[token] for token in tokens))
        results += zip(linear(scan(u, delta, A, B, C, w["D"][0])[-2:], w["logits"]), data)
    return results
def accuracy(w, samples, **bug):         # -> share of the data tokens told right, largest |logit|
    results = answer(w, samples, **bug)
    right = sum(logits[token] == max(logits) for logits, token in results)
    return right / len(results), max(abs(x) for logits, _ in results for x in logits)

def show_copying(rng, _):
    """Both layers learn on half of the sequences, are asked the others -> weights, accuracies."""
    seed, sequences, rows, accuracies = rng.random(), copying_sequences(8), [], {}
    rng.shuffle(sequences)
    seen, fresh, longer = sequences[::2], sequences[1::2], rng.sample(copying_sequences(16), 224)
    for name, paper in ("LTI", 0.183), ("S6", 0.970):    # Gu & Dao 2023, table 1: S4, S6, no gate
        start, data = random.Random(f"weights {seed}"), random.Random(f"data {seed}")    # for both
        w = s6_weights(start, 8, 4, name == "S6", logits=(4, 8))
        w["token"] = [[Value(start.gauss(0.0, 1.0)) for _ in range(8)] for _ in range(7)]
        def loss(_):
            losses = [cross_entropy(*result) for result in answer(w, data.choices(seen, k=6))]
            return dot(losses, [1.0 / len(losses)] * len(losses))
        weights = [value for matrix in w.values() for row in matrix for value in row]
        train(weights, loss, steps=400, rate=0.03)
        w = frozen(w)
        accuracies[name] = [accuracy(w, samples)[0] for samples in (fresh, longer)]
        rows.append([name, len(weights), *(f"{x:.1%}" for x in (*accuracies[name], paper))])
    table(["fresh: told right", "weights", "8 steps", "16 steps", "paper (longer task)"], *rows)
    delta = select([w["token"][token] for token in fresh[0][0]], w)[0]
    top, marks = max(map(max, delta)), " ".join("0123·??"[token] for token in fresh[0][0])
    print(f"\n  Δ of S6, up to {top:.2f}: channels down, tokens across, · noise\n   {marks}")
    heatmap(zip(*delta), -top / 3.0, top)
    lti, s6 = (right for right, _ in accuracies.values())
    check("fresh data: S6 ≥ 90 %, LTI ≤ 80 %", s6 >= 0.9 and lti <= 0.8, f"{s6:.1%}, {lti:.1%}")
    return {"weights": w, "fresh": fresh, "accuracies": accuracies}

# 6. Constant state --------------------------------------------------------------------------------
# Attention keeps a key and a value per token. The block keeps h and the convolution's last inputs.
def mamba_step_cost(d_model, d_inner, d_state, d_conv):
    """-> (multiply-adds per token, numbers kept per sequence) of a Mamba block."""
    work = 3 * d_model + d_conv + (d_inner + 2 * d_state) + (5 * d_state + 1)
    return d_inner * work, d_inner * (d_conv - 1 + d_state)
def attention_step(x, w, keys, values):
    query, key, value = (linear([x], w[name])[0] for name in ("query", "key", "value"))
    for kept, new in (keys, key), (values, value): kept.append(new)
    weights = softmax([dot(query, key) / sqrt(len(x)) for key in keys])
    return linear([[dot(weights, column) for column in zip(*values)]], w["mix"])

def show_constant_state(rng, _, n=128, d=8, d_inner=16):
    """A Mamba block and attention, token by token -> [(multiply-adds, bytes kept)] of each."""
    four = dict.fromkeys(("query", "key", "value", "mix"), (d, d))
    w = frozen(mamba_weights(rng, d, d_inner, 4, **four))
    xs, ys = [[rng.gauss(0.0, 1.0) for _ in range(d)] for _ in range(n)], []
    state, cache, mamba, attention = mamba_state(w, xs), ([], []), [], []
    for x in xs:
        for costs, kept in (mamba, state), (attention, cache):
            COUNT.clear()
            if kept is state: ys += mamba_block([x], w, state)
            else: attention_step(x, w, *cache)
            numbers = sum(len(row) for matrix in kept for row in matrix)
            costs.append((COUNT["multiply-adds"], 2 * numbers))          # of 16 bits
    work, numbers = mamba_step_cost(d, d_inner, 4, 4)
    growing = [(4 * d * d + 2 * d * t, 4 * d * t) for t in range(1, n + 1)]
    flat, rising = (list(enumerate((size for _, size in cost), 1)) for cost in (mamba, attention))
    cross = next(b for a, b in zip(flat, rising) if b[1] > a[1])
    plot("bytes kept over tokens read (both axes log)", {"Mamba": flat, "attention": rising,
         f"crossing: token {cross[0]}": [cross]}, True, True, height=8)
    check("token by token = all at once, bit for bit", ys == mamba_block(xs, w), f"{n} tokens")
    check("at every token multiply-adds and bytes kept = formula; Mamba: constant",
          mamba == [(work, 2 * numbers)] * n and attention == growing, f"{2 * numbers} bytes")
    return {"Mamba": mamba, "attention": attention}

# 7. Duality ---------------------------------------------------------------------------------------
# Mamba-2 has one A per head: the fading in response() is one factor L[t][s], and C[t]·B[s] remains.
# That is attention with C for queries, B for keys, Δu for values, mask L for softmax: more work,
# but in matrix products, which GPUs are built for. In chunks: attention in each, a state between.
def ssd(x, delta, A, B, C, chunk_size=None):
    """x: [seq_len][n_heads][head_dim], delta: [seq_len][n_heads], A: [n_heads], B, C:
    [seq_len][d_state] for all heads; floats -> y, like x, without D. Dao & Gu 2024, section 6.
    chunk_size None: one chunk, masked attention. ValueError if < 1 or if the shapes do not fit."""
    n, size = len(x), len(x) if chunk_size is None else chunk_size
    if not x or not B or size < 1: raise ValueError(f"{n} steps, B {len(B)}, chunk_size {size}")
    check_shapes(("delta", delta, n, len(A)), ("B", B, n, len(B[0])), ("C", C, n, len(B[0])),
                 *(("x", heads, len(A), len((x[0] or [[]])[0])) for heads in x))
    ys, states = [[] for _ in x], [[[0.0] * len(B[0]) for _ in x[0][0]] for _ in A]
    for start in range(0, n, size):
        steps = range(start, min(start + size, n))
        scores = [[dot(C[t], B[s]) for s in range(start, t + 1)] for t in steps]
        for i, a in enumerate(A):
            age = list(accumulate(a * delta[t][i] for t in steps))
            values = list(zip(*([delta[t][i] * v for v in x[t][i]] for t in steps)))
            for t, now, row in zip(steps, age, scores):
                masked = [exp(now - then) * score for then, score in zip(age, row)]
                ys[t].append([dot(masked, value[:len(masked)]) for value in values])
                if not start: continue
                ys[t][i] = [v + exp(now) * dot(C[t], h) for v, h in zip(ys[t][i], states[i])]
            if steps[-1] == n - 1: continue                  # nobody would read this state
            keys = [[exp(age[-1] - then) * b for b in B[t]] for t, then in zip(steps, age)]
            states[i] = [[exp(age[-1]) * old + dot(key, value) for old, key in zip(h, zip(*keys))]
                         for h, value in zip(states[i], values)]
    return ys

def show_duality(rng, _, n=64, N=8, a=-0.5):
    """One head of 8 channels as recurrence, and in chunks of all sizes -> their multiply-adds."""
    u, B, C = ([[rng.gauss(0.0, 1.0) for _ in range(8)] for _ in range(n)] for _ in range(3))
    delta, counts, error = [[rng.uniform(0.01, 0.5)] for _ in range(n)], {}, 0.0
    recurrence = selective_scan(u, [step * 8 for step in delta], [[a] * N] * 8, B, C, [0.0] * 8)
    for size in (1, 2, 4, 8, 16, 32, 64):
        COUNT.clear()
        y = ssd([[row] for row in u], delta, [a], B, C, size)
        counts[size] = COUNT["multiply-adds"]
        error = max(error, largest_difference([row for row, in y], recurrence))
    bars([(f"chunks of {size}", count) for size, count in counts.items()], " multiply-adds", 40)
    check("recurrence = masked attention = chunks", error < 1e-12, f"{error:.0e}")
    check("multiply-adds in chunks: counted = formula", all(
        count == (size + 1) * n // 2 * (N + 8) + 2 * (n - size) * 8 * N
        for size, count in counts.items()), f"{counts[1]:,} to {counts[n]:,}")
    return counts

# 8. The bugs people ship --------------------------------------------------------------------------
def show_bugs(rng, before):
    """Each bug in the trained S6: what it still tells right; then a convolution that sees ahead."""
    w, samples = (before["show_copying"][key] for key in ("weights", "fresh"))
    bugs = {"none": {}, "A positive": {"rate": lambda x: -negative_exp(x)},
            "Δ without softplus": {"positive": lambda x: x},
            "state never reset": {"scan": partial(selective_scan, state=zeros(8, 4, w["D"]))},
            "A by Euler": {"scan": partial(parallel_scan, method="euler")}}
    results, slopes = {name: accuracy(w, samples, **bug) for name, bug in bugs.items()}, []
    table(["trained S6, fresh sequences", "told right", "largest |logit|"],
          *([name, f"{right:.1%}", f"{logit:.2g}"] for name, (right, logit) in results.items()))
    mamba = mamba_weights(rng, 4, 8, 4)
    for ahead in (0, 3):
        xs = [[Value(rng.gauss(0.0, 1.0)) for _ in range(4)] for _ in range(8)]
        mamba_block(xs, mamba, ahead=ahead)[3][0].backward()
        slopes.append([sqrt(sum(v.grad ** 2 for v in x)) for x in xs])
    print("\n  gradient of output 4 at inputs 1 to 8, convolution padded left; right (the bug)")
    for row in slopes: print("  ", *(f"{slope:.3f}" for slope in row))
    right, wrong = results["none"][1], results["state never reset"][1]
    check("a state never reset changes the logits", right != wrong, f"{right:.1f}, {wrong:.1f}")
    right, wrong = max(slopes[0][4:]), min(slopes[1][4:7])
    check("later inputs seen only if padded right", 0 == right < wrong, f"{right}, {wrong:.0e}")
    return results | {"slopes": slopes}

# 9. The real world --------------------------------------------------------------------------------
# Mamba-2.8B, public config: layers, d_model, d_inner, d_state, d_conv. Its block has about
# 3 d_model d_inner weights, a transformer layer 12 d_model²: the same size is half the layers.
def show_real_world(*_, N=6):
    """State beside KV cache, where they cross; then a message that a small state cannot hold."""
    n_layers, d_model, d_inner, d_state, d_conv = 64, 2560, 5120, 16, 4
    n_attention = n_layers * 3 * d_inner // (12 * d_model)
    state = 2 * n_layers * mamba_step_cost(d_model, d_inner, d_state, d_conv)[1]     # 16 bits
    per_token = 2 * 2 * n_attention * d_model
    table(["tokens", "Mamba-2.8B: state", f"KV cache, {n_attention} layers as wide, 16 bits"], *(
        [n, f"{state / 1e6:.1f} MB", f"{per_token * n / 1e9:.2f} GB"]
        for n in (2_000, 32_000, 1_000_000)))
    print(f"  The cache outgrows the state at token {state // per_token + 1}.\n")
    # Recall of m tokens needs a state of order m. N + 1 inputs leave h = u[0] ā^N + ... + u[N], a
    # polynomial in ā: with the coefficients of (z - ā[0]) (z - ā[1]) ... for inputs, all h are 0.
    message, decays = [1.0], [exp(-0.15 * (n + 1)) for n in range(N)]
    for a in decays: message = [x - a * y for x, y in zip([*message, 0.0], [0.0, *message])]
    states = [associative_scan([(a, u) for u in message]) for a in decays]
    sizes = [max(map(abs, h)) for h in zip(*states)]
    table([f"{N} numbers of state read", *(f"{u:+.3f}" for u in message)],
          ["largest |h| after it", *(f"{size:.0e}" for size in sizes)])
    check(f"{N} numbers lose a message of {N + 1}", sizes[-1] < 1e-12, f"state {sizes[-1]:.0e}")
    return {"state": state, "per_token": per_token, "trace": sizes}

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
    """Run all sections -> the measurements, by name of the function that made them."""
    started, rng, results = begin(), random.Random(seed), {}
    for title, show in {
            "1. Autograd": show_autograd, "2. Continuous to discrete": show_discretization,
            "3. Three programs": show_programs, "4. Selection": show_selection,
            "5. Selective copying": show_copying, "6. Constant state": show_constant_state,
            "7. Duality": show_duality, "8. The bugs people ship": show_bugs,
            "9. The real world": show_real_world}.items():
        results[show.__name__] = section(title, show, rng, results)
    return finish(started, **results)

if __name__ == "__main__": run(main)
