"""A state space model reads with a memory of fixed size; selection decides what that memory keeps.

Attention keeps every token, so its cache and its work grow with the text. A state space model keeps
a state of fixed size, which fades while the input flows in: a token costs the same after ten or
after a million others. If it treats all tokens alike, it can also run as a convolution, at once,
but then it cannot tell data from noise. Mamba selects: a token is written down, or passed over.

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
from itertools import accumulate, combinations, product
from math import ceil, exp, expm1, log, log1p, log2, sqrt, tanh
from operator import add, mul

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
# One step is all that these models repeat: a number h of the memory fades, an input u is written
# into it, and h becomes e^(Δa) h + Δ b u. Δ is the time that passes, a < 0 the rate at which h
# fades, b how strongly u is written. As one node it has five inputs and five derivatives.
def state_update(h, delta, a, b, u):
    if type(u) is not Value: return exp(delta * a) * h + delta * u * b
    inputs = h, delta, a, b, u
    h, delta, a, b, u = h.data, delta.data, a.data, b.data, u.data
    decay, inflow = exp(delta * a), delta * u
    slopes = decay, a * decay * h + b * u, delta * decay * h, inflow, delta * b
    return Value(decay * h + inflow * b, inputs, slopes)

# A function of one number is one node as well: node(x, the function, its derivative).
def node(x, f, slope): return Value(f(x.data), (x,), (slope(x.data),)) if type(x) is Value else f(x)
def minus_exp(z): return -exp(z)
def sigmoid(z): return 0.5 + 0.5 * tanh(0.5 * z)             # 1 / (1 + e^-z), without overflow
def sigmoid_slope(z): return sigmoid(z) * sigmoid(-z)
def log_1p_exp(z): return max(z, 0.0) + log1p(exp(-abs(z)))  # log(1 + e^z), without overflow
def negative_exp(x): return node(x, minus_exp, minus_exp)
def softplus(x): return node(x, log_1p_exp, sigmoid)         # positive; near x where x is large
def silu(x): return x * node(x, sigmoid, sigmoid_slope)
def gap(a, b): return max(map(gap, a, b)) if isinstance(a, (list, tuple)) else abs(a - b)  # largest

def show_autograd(rng):
    h, delta, a, b, u = inputs = [Value(rng.uniform(-1.5, 1.5)) for _ in range(5)]
    y = -negative_exp(delta * a) * h + delta * b * u
    print(f"  e^(Δa) h + Δ b u: {len(TAPE)} nodes of one operation each, or one node")
    (y - state_update(*inputs)).backward()       # the derivatives of both, with opposite signs
    error = max(abs(x.grad) for x in inputs)
    check("one node has the derivatives of the graph it replaces", error < 1e-12, f"{error:.0e}")

# 2. Continuous to discrete ------------------------------------------------------------------------
# In continuous time the model is h' = A h + B u: memory fades at rate A while the input flows in.
# The letters are those of the papers, with these shapes from here on:
#   u  input, y  output  [seq_len][d_inner]  d_inner channels, each with a state of its own
#   h  state, A  decay   [d_inner][d_state]  A is negative: what is in h fades as e^(A t)
#   B  write, C  read    [seq_len][d_state]  u goes into h along B; y = C·h + D u, D [d_inner]
#   Δ  delta, step       [seq_len][d_inner]  the time that passes at a token
# A is diagonal: each number of h is a system of its own, in steps h = ā h + b̄ u. Euler: slope at
# the start of a step; bilinear: mean of both ends; zero-order hold (ZOH): exact for constant u.
METHODS = "euler", "bilinear", "zoh"
def discretize(a, b, delta, method):
    """h' = a h + b u over a step delta > 0 -> (ā, b̄) of h = ā h + b̄ u. ValueError otherwise.
    method: "euler", "bilinear" (Gu et al. 2021) or "zoh" (Gu & Dao 2023, equation 4)."""
    if not delta > 0.0 or method not in METHODS:
        raise ValueError(f"delta {delta} (positive?), method {method!r} (one of {METHODS}?)")
    z = delta * a
    if method == "euler": return 1.0 + z, delta * b
    if method == "bilinear": return (1.0 + z / 2.0) / (1.0 - z / 2.0), delta * b / (1.0 - z / 2.0)
    return exp(z), expm1(z) / a * b if z else delta * b

def recurrence(pairs):
    """[(a, b)] of h = a h + b, from h = 0 -> [h after each]: one step after the other."""
    h, hs = 0.0, []
    for a, b in pairs:
        h = a * h + b
        hs.append(h)
    COUNT["multiply-adds"] += len(pairs)
    COUNT["steps in a row"] += len(pairs)
    COUNT["numbers held"] += 1           # h; the input and the output are not counted
    return hs

def largest_error(method, delta):
    """Of h' = 1 - h, from h = 0 at t = 0 until t = 16, against the exact h = 1 - e^-t."""
    hs = recurrence([discretize(-1.0, 1.0, delta, method)] * round(16.0 / delta))
    return max(abs(h - 1.0 + exp(-k * delta)) for k, h in enumerate(hs, 1))

def show_discretization():
    steps = [2.0 ** k for k in range(2, -7, -1)]
    errors = {method: [largest_error(method, delta) for delta in steps] for method in METHODS}
    zoh = max(errors.pop("zoh"))         # rounding: no place on a logarithmic axis
    curves = {method: list(zip(steps, found)) for method, found in errors.items()}
    plot("h' = 1 - h: largest error over step Δ (both axes log)", curves, True, True, height=8)
    orders = [log2(found[-2] / found[-1]) for found in errors.values()]
    check("Euler converges with order 1, bilinear with order 2; ZOH is exact", zoh < 1e-12 and
          gap(orders, [1, 2]) < 0.1, f"{orders[0]:.2f}, {orders[1]:.2f}, {zoh:.0e}")
    explodes = [(method, delta) for method in METHODS for delta in steps
                if abs(discretize(-1.0, 1.0, delta, method)[0]) > 1.0]
    check("|ā| > 1 by Euler if Δ|a| > 2, by bilinear and ZOH never", explodes == [("euler", 4.0)])
    return orders

# 3. Three programs --------------------------------------------------------------------------------
# With the same Δ, B and C at every step, ā and b̄ are constant, and the model is called linear and
# time-invariant (LTI). Three programs can run it, here for one number h. A step is a pair, ā and
# b̄ u. recurrence() takes one after the other. The convolution knows the weight of b̄ u[s] in h[t]:
# ā^(t - s), which depends on its age t - s alone. The weights of all ages are the kernel.
def convolution(pairs):
    """recurrence() if a is the same in all pairs. Production: FFT, L log L work instead of L²/2."""
    kernel = [pairs[0][0] ** age for age in range(len(pairs))]
    latest_first = [b for _, b in reversed(pairs)]
    COUNT["numbers held"] += len(kernel)
    COUNT["steps in a row"] += 1         # no h waits for another
    COUNT["multiply-adds"] += len(kernel)
    return [dot(kernel[:t], latest_first[-t:]) for t in range(1, len(pairs) + 1)]

# The tree: step (a1, b1), then (a2, b2), is one step, h = a2 (a1 h + b1) + b2. Neighbours combine,
# all at the same time, then the results: log2 L levels up, and as many down. Blelloch 1990.
def combine(first, then):
    COUNT["multiply-adds"] += 2
    return then[0] * first[0], then[0] * first[1] + then[1]

def sweep(pairs):
    """A power of two of pairs -> (for each, all those before it as one pair; all as one pair)."""
    COUNT["numbers held"] += 2 * len(pairs)
    if len(pairs) == 1: return [(1.0, 0.0)], pairs[0]        # (1, 0) leaves h as it is
    COUNT["steps in a row"] += 2
    lefts, rights = pairs[::2], pairs[1::2]
    before_both, total = sweep(list(map(combine, lefts, rights)))        # up
    before_right = map(combine, before_both, lefts)                      # down
    return [pair for two in zip(before_both, before_right) for pair in two], total

def associative_scan(pairs):
    """recurrence() as a tree; Values or floats. ValueError if there are no pairs."""
    if not pairs: raise ValueError("0 pairs: there is nothing to scan")
    size = 1 << (len(pairs) - 1).bit_length()                # the next power of two
    before, total = sweep([*pairs, *[(1.0, 0.0)] * (size - len(pairs))])
    return [h for _, h in [*before, total][1:len(pairs) + 1]]

def show_programs(rng, n=250):
    pairs = [discretize(-1.0, rng.gauss(0.0, 1.0), 0.1, "zoh") for _ in range(n)]    # (ā, b̄ u)
    columns, outputs, counted = ("steps in a row", "multiply-adds", "numbers held"), [], {}
    for program in recurrence, convolution, associative_scan:
        COUNT.clear()
        outputs.append(program(pairs))
        counted[program.__name__] = [COUNT[column] for column in columns]
    table([f"LTI, {n} inputs", *columns], *([name, *row] for name, row in counted.items()))
    levels = ceil(log2(n))
    formulas = {"recurrence": [n, n, 1], "convolution": [1, n + n * (n + 1) // 2, n],
                "associative_scan": [2 * levels, 4 * (2 ** levels - 1), 4 * 2 ** levels - 2]}
    error = gap(outputs, outputs[:1] * 3)
    check("recurrence, convolution and tree: the same output", error < 1e-12, f"{error:.0e}")
    check("what each program took: counted = formula", counted == formulas)
    return counted

# 4. Selection -------------------------------------------------------------------------------------
# S6, the layer in Mamba, makes Δ, B and C from the token: Δ near 0 leaves the state alone, a large
# Δ lets it fade and writes the token. The price: no kernel, no convolution. The tree still works.
# ā is taken by ZOH, b̄ by Euler: B, which is learned, makes up for the difference.
def check_shapes(**matrices):
    for name, (matrix, n, m) in matrices.items():
        if n * m == 0 or [len(row) for row in matrix] != [m] * n:
            raise ValueError(f"{name} is {len(matrix)} x {set(map(len, matrix))}, not {n} x {m}")

def zeros(n, m, kind=float): return [[kind(0.0)] * m for _ in range(n)]
def gauss(rng, n, m, std=1.0): return [[rng.gauss(0.0, std) for _ in range(m)] for _ in range(n)]
def trainable(w): return {name: [list(map(Value, row)) for row in m] for name, m in w.items()}
def frozen(w): return {name: list(map(floats, matrix)) for name, matrix in w.items()}

def selective_scan(u, delta, A, B, C, D, state=None, update=state_update):
    """u, delta: [seq_len][d_inner], A: [d_inner][d_state], B, C: [seq_len][d_state], D: [d_inner]
    -> y [seq_len][d_inner], Values or floats. Gu & Dao 2023, algorithm 2: A by ZOH, B by Euler.
    state [d_inner][d_state]: where to go on from, updated in place. ValueError if shapes misfit."""
    n, d_inner, d_state = len(u), len(A), len(A[0]) if A else 0
    check_shapes(u=(u, n, d_inner), delta=(delta, n, d_inner), A=(A, d_inner, d_state),
                 B=(B, n, d_state), C=(C, n, d_state), D=([D], 1, d_inner),
                 state=(A if state is None else state, d_inner, d_state))
    state, ys = state or zeros(d_inner, d_state, type(u[0][0])), []
    for u_t, delta_t, B_t, C_t in zip(u, delta, B, C):
        for i, (x, step) in enumerate(zip(u_t, delta_t)):
            state[i] = [update(h, step, a, b, x) for h, a, b in zip(state[i], A[i], B_t)]
        ys.append([dot([*h, x], [*C_t, d]) for h, x, d in zip(state, u_t, D)])       # C·h + D u
    COUNT["multiply-adds"] += 4 * n * d_inner * d_state
    return ys

def s6_weights(rng, d_inner, d_state, **shapes):
    """Matrices by name, also of given `shapes`. A = -e^A_log and Δ begin as a spread of scales."""
    shapes |= {"W_delta": (d_inner, d_inner), "W_B": (d_state, d_inner), "W_C": (d_state, d_inner)}
    w = {name: gauss(rng, n, m, std=m ** -0.5) for name, (n, m) in shapes.items()}
    w["A_log"] = [[log(n + 1.0) for n in range(d_state)] for _ in range(d_inner)]
    w["delta_bias"] = [[log(expm1(0.1 ** rng.random())) for _ in range(d_inner)]]
    w["D"] = [[1.0] * d_inner]
    return w

def decay_rates(w, rate=negative_exp): return [list(map(rate, row)) for row in w["A_log"]]

def select(u, w, positive=softplus):
    """u [seq_len][d_inner] -> delta, B, C of every step. W_delta is of low rank in production."""
    delta = [[positive(x + bias) for x, bias in zip(row, w["delta_bias"][0])]
             for row in linear(u, w["W_delta"])]
    return delta, linear(u, w["W_B"]), linear(u, w["W_C"])

# The Mamba block: S6 between a convolution, by which a token sees the few before it, and a gate.
def mamba_weights(rng, d_model, d_inner, d_state, d_conv=4):
    return s6_weights(rng, d_inner, d_state, project=(2 * d_inner, d_model), conv=(d_inner, d_conv),
                      conv_bias=(1, d_inner), out=(d_model, d_inner))

def mamba_block(xs, w, state=None, ahead=0):
    """xs [seq_len][d_model] -> [seq_len][d_model]. Gu & Dao 2023, section 3.4. state: [], then what
    the block keeps of the text. ahead: how far the convolution looks ahead; a bug, any but 0."""
    d_inner, d_state, d_conv = len(w["A_log"]), len(w["A_log"][0]), len(w["conv"][0])
    n, kind, state = len(xs), type(xs[0][0]), [] if state is None else state
    if not state: state += zeros(d_conv - 1, d_inner, kind), zeros(d_inner, d_state, kind)
    window, h = state                                # the convolution's last inputs, and h
    projected = linear(xs, w["project"])
    window += [row[:d_inner] for row in projected[ahead:]] + zeros(ahead, d_inner, kind)
    convolved = [map(dot, zip(*window[t:t + d_conv]), w["conv"]) for t in range(n)]
    u = [[silu(x + bias) for x, bias in zip(row, w["conv_bias"][0])] for row in convolved]
    del window[:n]
    delta, B, C = select(u, w)
    ys = selective_scan(u, delta, decay_rates(w), B, C, w["D"][0], h)
    gates = [list(map(silu, row[d_inner:])) for row in projected]
    gated = [list(map(mul, y, gate)) for y, gate in zip(ys, gates)]
    return linear(gated, w["out"])

def show_selection(rng, n=8):
    w, u, differences = s6_weights(rng, 4, 1), gauss(rng, n, 4), []
    a, impulses = decay_rates(w)[0], [[float(s == t) for s in range(n)] for t in range(n)]
    print("  what input s (across) weighs in output t (down)")
    for name, seen in ("LTI", [[1.0] * 4] * n), ("S6", u):
        delta, B, C = select(seen, w)
        steps = [row[:1] * n for row in delta]       # n channels like the first, an impulse each
        weights = selective_scan(impulses, steps, [a] * n, B, C, [0.0] * n)
        largest = max(abs(x) for row in weights for x in row)
        print(f"   {name}")
        heatmap([[abs(x) for x in row] for row in weights], 0.0, largest)
        earlier, later = [row[:-1] for row in weights[:-1]], [row[1:] for row in weights[1:]]
        differences.append(gap(earlier, later) / largest)
    lti, s6 = differences
    check("LTI has one kernel, S6 has none", lti < 1e-12 and s6 > 1e-6, f"{lti:.0e}, {s6:.2f}")
    pairs = [(exp(step[0] * a[0]), step[0] * b[0] * x[0]) for step, b, x in zip(delta, B, u)]
    by_tree = [c[0] * h for c, h in zip(C, associative_scan(pairs))]
    error = gap(by_tree, [dot(row, [x[0] for x in u]) for row in weights])
    check("S6: recurrence = tree still", error < 1e-12, f"{error:.0e}")
    return differences

# 5. Selective copying -----------------------------------------------------------------------------
# Two data tokens, 0 to 3, lie in noise, 4; at the end, 5 asks for the first and 6 for the second.
# An LTI layer weighs a token by its age, and that is random. It and S6 run bare, like S4, which is
# LTI, and S6 in table 1 of Gu & Dao 2023: token, layer, logits. They are the same layer; for LTI,
# selection is off: it makes Δ, B and C from a row of ones, whatever the token is.
def copying_sequences(n_steps):
    """Every sequence of the task, as (tokens, the two data tokens in order)."""
    for (i, j), first, second in product(combinations(range(n_steps), 2), range(4), range(4)):
        tokens = [4] * n_steps + [5, 6]
        tokens[i], tokens[j] = first, second
        yield tokens, (first, second)

def answer(w, samples, selective=True, positive=softplus, rate=negative_exp, **bug):
    """-> [(logits, data token)], two for each sample. `selective` apart, options are bugs."""
    u, A, results = w["token"], decay_rates(w, rate), []         # u: of the seven kinds of token
    delta, B, C = select(u if selective else [[1.0] * len(u[0])] * len(u), w, positive)
    for tokens, data in samples:
        def of(rows): return [rows[token] for token in tokens]
        ys = selective_scan(of(u), of(delta), A, of(B), of(C), w["D"][0], **bug)
        results += zip(linear(ys[-2:], w["logits"]), data)
    return results

def accuracy(*arguments, **options):
    """-> (share of the data tokens told right, largest |logit|)"""
    results = answer(*arguments, **options)
    right = sum(logits[token] == max(logits) for logits, token in results)
    return right / len(results), max(abs(x) for logits, _ in results for x in logits)

def learn(w, batches, selective):
    """Train the layer w, a batch of samples a step -> its weights, as floats."""
    def loss(step):
        losses = [cross_entropy(*result) for result in answer(w, batches[step], selective)]
        return dot(losses, [1.0 / len(losses)] * len(losses))
    train([x for matrix in w.values() for row in matrix for x in row], loss, len(batches), 0.03)
    return frozen(w)

def show_copying(rng):
    sequences, rows, accuracies = list(copying_sequences(8)), [], {}
    rng.shuffle(sequences)
    seen, fresh = sequences[::2], sequences[1::2]
    longer = rng.sample(list(copying_sequences(16)), len(fresh))
    start = s6_weights(rng, 8, 4, token=(7, 8), logits=(4, 8))
    batches = [rng.choices(seen, k=6) for _ in range(400)]
    for name, selective, paper in ("LTI", False, 0.183), ("S6", True, 0.970):
        w = learn(trainable(start), batches, selective)
        accuracies[name] = [accuracy(w, samples, selective)[0] for samples in (fresh, longer)]
        rows.append([name, *(f"{share:.1%}" for share in (*accuracies[name], paper))])
    table(["fresh sequences: told right", "8 steps", "16 steps", "paper (longer task)"], *rows)
    lti, s6 = accuracies["LTI"][0], accuracies["S6"][0]
    check("fresh data: S6 ≥ 90 %, LTI ≤ 80 %", s6 >= 0.9 and lti <= 0.8, f"{s6:.1%}, {lti:.1%}")
    delta, _, _ = select([w["token"][token] for token in fresh[0][0]], w)
    largest = max(map(max, delta))
    print(f"\n  Δ of S6, solid {largest:.2f}: channels down, tokens across, · noise, ? questions")
    print("  ", " ".join("0123·??"[token] for token in fresh[0][0]))
    heatmap(zip(*delta), -largest / 3.0, largest)
    return w, fresh, accuracies

# 6. Constant state --------------------------------------------------------------------------------
# Attention keeps a key and a value per token, and looks at all of them again for the next. The
# Mamba block keeps h and the last inputs of its convolution, however long the text is.
def mamba_step_cost(d_model, d_inner, d_state, d_conv):
    """-> (multiply-adds per token, bytes kept of a text, 16 bits a number) of a Mamba block."""
    work = 3 * d_model + d_conv + (d_inner + 2 * d_state) + (5 * d_state + 1)
    return d_inner * work, 2 * d_inner * (d_conv - 1 + d_state)

def attention_step(query, key, value, keys, values):
    keys.append(key)
    values.append(value)
    weights = softmax([dot(query, key) / sqrt(len(query)) for key in keys])
    return [dot(weights, column) for column in zip(*values)]

def show_constant_state(rng, n=128, d=8, d_inner=16):
    w, xs, ys = mamba_weights(rng, d, d_inner, 4), gauss(rng, n, d), []
    state, cache, mamba, attention = [], ([], []), [], []
    def cost(kept): return COUNT.pop("multiply-adds"), 2 * sum(len(row) for m in kept for row in m)
    COUNT.clear()                        # and pop() takes the count back to 0
    for x in xs:
        ys += mamba_block([x], w, state)
        mamba.append(cost(state))
        attention_step(x, x, x, *cache)          # without projections: their cost does not grow
        attention.append(cost(cache))
    flat, rising = ([(t, size) for t, (_, size) in enumerate(c, 1)] for c in (mamba, attention))
    crossing = next(point for point in rising if point[1] > flat[0][1])
    curves = {"Mamba": flat, "attention": rising, f"crossing: token {crossing[0]}": [crossing]}
    plot("bytes kept over tokens read (both axes log)", curves, True, True, height=8)
    check("token by token = all at once, bit for bit", ys == mamba_block(xs, w), f"{n} tokens")
    growing = [(2 * d * t, 4 * d * t) for t in range(1, n + 1)]
    check("multiply-adds and bytes kept = formula, at every token; Mamba: constant",
          mamba == [mamba_step_cost(d, d_inner, 4, 4)] * n and attention == growing)
    return mamba, attention

# 7. Duality ---------------------------------------------------------------------------------------
# y[t] is the sum of C[t]·e^(A (Δ[s+1] + ... + Δ[t])) Δ[s] B[s] u[s] over s <= t. With one A per
# head, as in Mamba-2, the fading is one factor L[t][s], and C[t]·B[s] remains: attention with C for
# queries, B for keys, Δu for values, mask L for softmax. It is more work, but in matrix products,
# which GPUs are built for. In chunks: attention in each, a state between.
def ssd_head(x, delta, a, B, C, size):
    """ssd of one head: x [seq_len][head_dim], delta [seq_len], a number a -> y, like x."""
    ys, state = [], zeros(len(x[0]), len(B[0]))
    for start in range(0, len(x), size):
        chunk = range(start, min(start + size, len(x)))
        fade = dict(zip(chunk, accumulate(a * delta[t] for t in chunk)))     # left at t: e^fade[t]
        values = list(zip(*([delta[s] * v for v in x[s]] for s in chunk)))   # [head_dim][chunk]
        for t in chunk:
            weights = [exp(fade[t] - fade[s]) * dot(C[t], B[s]) for s in range(start, t + 1)]
            inside = [dot(weights, value[:len(weights)]) for value in values]    # attention
            before = [exp(fade[t]) * dot(C[t], h) if start > 0 else 0.0 for h in state]
            ys.append(list(map(add, inside, before)))
        if t + 1 < len(x):               # the state for the next chunk
            keys = list(zip(*([exp(fade[t] - fade[s]) * b for b in B[s]] for s in chunk)))
            state = [[exp(fade[t]) * old + dot(key, value) for old, key in zip(h, keys)]
                     for h, value in zip(state, values)]
    return ys

def ssd(x, delta, A, B, C, chunk_size=None):
    """x: [seq_len][n_heads][head_dim], delta: [seq_len][n_heads], A: [n_heads], B, C:
    [seq_len][d_state] for all heads; floats -> y, like x, without D. Dao & Gu 2024, section 6.
    chunk_size None: one chunk, masked attention. ValueError if < 1 or if the shapes do not fit."""
    n, size = len(x), len(x) if chunk_size is None else chunk_size
    if not x or not B or size < 1: raise ValueError(f"{n} steps, B {len(B)}, chunk_size {size}")
    check_shapes(delta=(delta, n, len(A)), B=(B, n, len(B[0])), C=(C, n, len(B[0])))
    for heads in x: check_shapes(x=(heads, len(A), len((x[0] or [[]])[0])))
    heads = [ssd_head(*head, B, C, size) for head in zip(zip(*x), zip(*delta), A)]
    return list(map(list, zip(*heads)))  # [n_heads][seq_len] -> [seq_len][n_heads]

def show_duality(rng, n=64, N=8, a=-0.5):
    u, B, C = (gauss(rng, n, N) for _ in range(3))
    delta, counted, error = [[rng.uniform(0.01, 0.5)] for _ in range(n)], {}, 0.0
    expected = selective_scan(u, [step * N for step in delta], [[a] * N] * N, B, C, [0.0] * N)
    for size in (1, 2, 4, 8, 16, 32, 64):
        COUNT.clear()
        y = ssd([[row] for row in u], delta, [a], B, C, size)
        counted[size] = COUNT["multiply-adds"]
        error = max(error, gap([row[0] for row in y], expected))
    bars([(f"chunks of {size}", count) for size, count in counted.items()], " multiply-adds", 40)
    check("recurrence = masked attention = chunks", error < 1e-12, f"{error:.0e}")
    check("multiply-adds in chunks: counted = formula", all(
        count == (size + 1) * n * N + 2 * (n - size) * N * N for size, count in counted.items()))
    return counted

# 8. The bugs people ship --------------------------------------------------------------------------
# None of them raises an error. The first four are committed in the S6 that was just trained.
def show_bugs(rng, w, samples):
    def by_euler(h, delta, a, b, u): return (1.0 + delta * a) * h + delta * b * u
    bugs = {"none": {}, "A positive": {"rate": exp}, "Δ without softplus": {"positive": float},
            "state never reset": {"state": zeros(8, 4)}, "A by Euler": {"update": by_euler}}
    results = {name: accuracy(w, samples, **bug) for name, bug in bugs.items()}
    table(["bug in the trained S6", "fresh: told right", "largest |logit|"],
          *([name, f"{right:.1%}", f"{logit:.2g}"] for name, (right, logit) in results.items()))
    check("a state never reset changes the logits", results["none"] != results["state never reset"])
    print("\n  gradient of output 4 at inputs 1 to 8, convolution padded left; right (the bug)")
    block, slopes = trainable(mamba_weights(rng, 4, 8, 4)), []
    for ahead in (0, 3):
        xs = [list(map(Value, row)) for row in gauss(rng, 8, 4)]
        mamba_block(xs, block, ahead=ahead)[3][0].backward()
        slopes.append([sqrt(sum(x.grad ** 2 for x in row)) for row in xs])
        print("  ", *(f"{slope:.3f}" for slope in slopes[-1]))
    check("later inputs seen only if padded right", max(slopes[0][4:]) == 0.0 < min(slopes[1][4:7]))
    return results | {"slopes": slopes}

# 9. The real world --------------------------------------------------------------------------------
# Mamba-2.8B, public config. Its block has about 3 d_model d_inner weights, a transformer layer
# 12 d_model²: of the same size, it has half the layers. The price of a constant state: 8 bits end
# in one of 2^8 ways, whatever they have read. Recall of m tokens needs a state of order m.
def show_real_world(n_layers=64, d_model=2560, d_inner=5120, d_state=16, d_conv=4):
    n_attention = n_layers * 3 * d_inner // (12 * d_model)
    state = n_layers * mamba_step_cost(d_model, d_inner, d_state, d_conv)[1]
    per_token = 2 * 2 * n_attention * d_model
    table(["tokens", "Mamba-2.8B: state", f"KV cache, {n_attention} layers as wide, 16 bits"], *(
        [n, f"{state / 1e6:.1f} MB", f"{per_token * n / 1e9:.2f} GB"]
        for n in (2_000, 32_000, 1_000_000)))
    print(f"  The cache outgrows the state at token {state // per_token + 1}.\n")
    told_apart = {}
    for m in (4, 8, 12):
        messages = product([(0.5, 0.0), (0.5, 1.0)], repeat=m)   # m bits b, of h = h / 2 + b
        told_apart[2 ** m] = len({int(128.0 * recurrence(pairs)[-1]) for pairs in messages})
    table(["messages", "different states of 8 bits after them"], *told_apart.items())
    check("a state of 8 bits tells at most 2^8 messages apart", max(told_apart.values()) == 256)
    return state, per_token, told_apart

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
    section("1. Autograd", show_autograd, rng)
    orders = section("2. Continuous to discrete", show_discretization)
    programs = section("3. Three programs", show_programs, rng)
    kernels = section("4. Selection", show_selection, rng)
    w, fresh, accuracies = section("5. Selective copying", show_copying, rng)
    costs = section("6. Constant state", show_constant_state, rng)
    chunks = section("7. Duality", show_duality, rng)
    bugs = section("8. The bugs people ship", show_bugs, rng, w, fresh)
    sizes = section("9. The real world", show_real_world)
    return finish(started, orders=orders, programs=programs, kernels=kernels, fresh=fresh,
                  accuracies=accuracies, costs=costs, chunks=chunks, bugs=bugs, sizes=sizes)

if __name__ == "__main__": run(main)
