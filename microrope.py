"""RoPE turns queries and keys by their position, so that a score depends on their distance alone.

Attention finds a token by a dot product of two vectors, and nothing in it knows where they stand.
One can add a vector that stands for the position. Rotary position embedding (RoPE) instead turns
the query and the key, pair of numbers by pair, by angles in proportion to their positions. A dot
product sees only the angle between two vectors: the positions cancel, their distance remains.

  Vaswani et al. 2017 (1706.03762) sinusoids        Su et al. 2021 (2104.09864) RoPE
  Chen et al. 2023 (2306.15595) interpolation       Peng et al. 2023 (2309.00071) YaRN

  python microrope.py [--seed N]                    needs only Python, takes about a second

  1. Autograd              the referee of the gradients
  2. An attention head     without positions it cannot tell one order from another
  3. Three ways            sinusoids added, a learned table added, a rotation
  4. The rotation          pairs, wavelengths, identities, decay, and a head that looks k back
  5. Two layouts           which numbers form a pair, and how to convert the weights
  6. Longer contexts       linear, NTK-aware, YaRN, Llama 3.1: which pairs stay, which stretch
  7. The bugs people ship  the wrong layout, turned values, restarted positions, scaling twice
  8. The real world        base 10,000 against 500,000: pairs that never complete a turn
"""
import argparse, codecs, gc, os, random, sys, time
from cmath import rect
from collections import defaultdict
from itertools import accumulate
from math import ceil, cos, exp, floor, log, pi, sin, sqrt
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

def gaussian(rng, n, spread=1.0): return [rng.gauss(0.0, spread) for _ in range(n)]
def deviation(a, b): return max(abs(x - y) for x, y in zip(a, b))

def show_autograd(rng, n=16):
    """A score, the dot product of a query and a key, is one Value; its slope is the key."""
    query, key = list(map(Value, gaussian(rng, n))), gaussian(rng, n)
    dot(query, key).backward()
    print(f"  d score / d query[0] = {query[0].grad:+.9f}, key[0] = {key[0]:+.9f}.")
    check("the gradient of a score by the query is the key", [x.grad for x in query] == key)

# 2. An attention head -----------------------------------------------------------------------------
# Three matrices make of a token's vector a query (what it looks for), a key (what it is found by)
# and a value (what it has to give). The score of a query with a key is their dot product over the
# root of head_dim. softmax makes weights of the scores with all tokens so far; the output is the
# mean of their values. A way to tell positions enters before the matrices, as add(x, position), or
# after them, as turn(vector, position) on queries and keys. The default tells nothing.
D_MODEL = HEAD_DIM = 16

def without(vector, position): return vector
def score(query, key): return dot(query, key) * len(key) ** -0.5

def random_head(rng):
    return {part: [gaussian(rng, D_MODEL, D_MODEL ** -0.5) for _ in range(HEAD_DIM)]
            for part in ("query", "key", "value")}

def project(weights, xs, positions, add=without, turn=without, turn_values=without):
    """xs [n][d_model] at positions [n] -> queries, keys, values, each [n][head_dim]."""
    inputs = [add(x, position) for x, position in zip(xs, positions)]
    return [[change(vector, position) for vector, position
             in zip(linear(inputs, weights[part]), positions)]
            for part, change in (("query", turn), ("key", turn), ("value", turn_values))]

def attend(queries, keys, values):
    """Causal attention, [n][head_dim] each -> outputs [n][head_dim]: i sees 0 to i of the cache."""
    weights = [softmax([score(q, key) for key in keys[:i + 1]]) for i, q in enumerate(queries)]
    return [[dot(row, column) for column in zip(*values[:len(row)])] for row in weights]

def show_head(rng, weights, n=12):
    """Shuffle all tokens but the last and look at the last output."""
    xs = [gaussian(rng, D_MODEL) for _ in range(n)]
    shuffled = rng.sample(xs[:-1], n - 1) + xs[-1:]
    last, other = (attend(*project(weights, order, range(n)))[-1] for order in (xs, shuffled))
    print(f"  The output at token {n}, with the tokens before it in order and shuffled:")
    for output in last, other: print("   ", *(f"{x:+.6f}" for x in output[:8]), "...")
    check("without positions, the order of the past is invisible", deviation(last, other) < 1e-12)

# 3. Three ways ------------------------------------------------------------------------------------
# Think of the hands of a clock: pairs of numbers, points that turn as the position grows, a radian
# per token in the first pair and slower in every next one. Sinusoids are the places of such hands,
# added to the token's vector. RoPE turns the query and the key themselves. A learned table has a
# free vector for every position up to its length: here random ones, as before any training.
def inverse_frequencies(head_dim, base=10000.0):
    """-> radians per token of each pair, base^(-2i / head_dim), [head_dim / 2].

    ValueError if head_dim is odd or below 2, or base not above 1. Su et al. 2021, section 3.2.2."""
    if head_dim < 2 or head_dim % 2: raise ValueError(
        f"head_dim {head_dim} is odd or below 2: RoPE turns pairs of numbers")
    if not base > 1.0: raise ValueError(f"base {base} is not above 1: no pair would turn slower")
    return [base ** (-i / head_dim) for i in range(0, head_dim, 2)]

def pairs(head_dim, layout):
    """The indices that form each pair: neighbours, or the same place in either half."""
    if layout == "interleaved": return [(i, i + 1) for i in range(0, head_dim, 2)]
    if layout == "half": return [(i, i + head_dim // 2) for i in range(head_dim // 2)]
    raise ValueError(f"layout {layout!r} is neither 'half' nor 'interleaved'")

def apply_rope(vector, position, frequencies, layout="half"):
    """vector [head_dim], Values or floats, with each pair turned by position * frequency -> same.

    position: in tokens, any number; frequencies: radians per token [head_dim / 2]; layout: "half"
    or "interleaved". ValueError if lengths or layout do not fit. Su et al. 2021, equation 34."""
    if not frequencies or len(vector) != 2 * len(frequencies):
        raise ValueError(f"{len(frequencies)} frequencies do not turn {len(vector)} numbers")
    turned = list(vector)                # production code looks cosines and sines up in a table
    for (i, j), frequency in zip(pairs(len(vector), layout), frequencies):
        c, s = cos(position * frequency), sin(position * frequency)
        turned[i] = vector[i] * c - vector[j] * s
        turned[j] = vector[i] * s + vector[j] * c
    return turned

def sinusoid(position, frequencies):
    """What Vaswani et al. 2017, section 3.5, add (sines last here): a constant vector, turned."""
    ones = [1.0] * len(frequencies)
    return apply_rope(ones + [0.0] * len(ones), position, frequencies)

def rotary(frequencies, layout="half"):              # a `turn` for project(); below, an `add`
    return lambda vector, position: apply_rope(vector, position, frequencies, layout)
def added(vectors): return lambda x, position: [a + b for a, b in zip(x, vectors(position))]

def show_three_ways(rng, weights, frequencies, n=12, furthest=1000):
    """One token everywhere: its scores with itself over positions -> {way: change by shift}."""
    x, size = gaussian(rng, D_MODEL), furthest + n
    learned = [gaussian(rng, D_MODEL, sqrt(0.5)) for _ in range(size)]
    ways = {"sinusoids added": {"add": added(lambda position: sinusoid(position, frequencies))},
            "learned table added": {"add": added(learned.__getitem__)},
            "rotary": {"turn": rotary(frequencies)}}
    maps, changes, curves, gap = [], {}, {}, [0.0, 0.0]
    for name, way in ways.items():
        q, k, _ = project(weights, [x] * size, range(size), **way)
        square = [[score(query, key) for key in k[:n]] for query in q[:n]]
        low, high = min(map(min, square)), max(map(max, square))
        maps.append([[0.2 + 0.8 * (y - low) / (high - low) for y in row] for row in square])
        changes[name] = change = [max(abs(score(q[i + s], k[j + s]) - square[i][j]) for i, j in
                                      ((0, 0), (3, 0), (0, 3))) for s in range(1, furthest + 1)]
        # The worst of ten: a chart has few columns, and a single change may be 0, without a log.
        curves[name] = [(s, max(1e-17, *change[s - 1:s + 9])) for s in range(1, furthest, 10)]
    print(f"  score of a fixed query at m (down) with a fixed key at n (across), 0 to {n - 1}\n")
    print("   ", "".join(f"{name:<{2 * n + 4}}" for name in ways).rstrip())
    heatmap([a + gap + b + gap + c for a, b, c in zip(*maps)], 0.0, 1.0)
    print()
    plot("change of a score when both positions move by s, over s (y axis log)", curves,
         log_y=True, height=8)
    # p θ is rounded: cos(p θ) is off by p ε / 2 at most. Two such angles make a score, two scores
    # a change, so 2 p ε; twice that leaves room for the sums. q and k are the rotary ones here.
    *others, rotated = changes.values()
    bound = 4 * size * sys.float_info.epsilon * sqrt(dot(q[0], q[0]) * dot(k[0], k[0]) / HEAD_DIM)
    check(f"rotary scores stay under any shift up to {furthest:,}, but for rounding",
          max(rotated) <= bound, f"{max(rotated):.0e}, bound {bound:.0e}")
    check("scores with added positions do not", min(map(max, others)) > 1e6 * bound,
          " and ".join(f"{max(other):.1f}" for other in others))
    return changes

# 4. The rotation ----------------------------------------------------------------------------------
# R(p) is the matrix that apply_rope multiplies by. Undoing a turn is turning back, so its transpose
# is R(-p), and the score of a turned query and key is (R(m) q)ᵀ R(n) k = qᵀ R(n - m) k. The same
# transpose takes gradients back: d (gᵀ R(m) x) / d x = R(m)ᵀ g = R(-m) g.
# A pair (a, b) is also the complex number a + ib, which e^(i angle) turns. With h_i = q_i times the
# conjugate of k_i, the score is the real part of Σ h_i e^(i (m-n) θ_i), whose absolute value is the
# envelope. Su et al. 2021, section 3.4.3, bound it by max |h_(i+1) - h_i| (0 after the last) times
# Σ |S_j| with the partial sums S_j = Σ_{i<j} e^(i (m-n) θ_i): summation by parts.
def decay(query, key, distance, frequencies):
    """-> (envelope of the score before scaling, the paper's bound on it); layout "half"."""
    n = len(frequencies)
    h = [complex(a, b) * complex(c, -d) for a, b, c, d in zip(query, query[n:], key, key[n:])]
    turns = [rect(1.0, distance * frequency) for frequency in frequencies]
    steps = max(abs(b - a) for a, b in zip(h, h[1:] + [0.0]))
    return abs(sum(map(mul, h, turns))), steps * sum(map(abs, accumulate(turns)))

def show_rotation(rng, frequencies):
    """RᵀR, norms and gradients of random vectors at random positions: the largest deviations."""
    relative, norm, gradient = [], [], []
    for _ in range(50):
        (m, n), (x, y) = rng.sample(range(1000), 2), [gaussian(rng, HEAD_DIM) for _ in "xy"]
        turned, leaves = apply_rope(x, m, frequencies), list(map(Value, x))
        back = dot(x, apply_rope(y, n - m, frequencies))
        relative.append(abs(dot(turned, apply_rope(y, n, frequencies)) - back))
        norm.append(abs(dot(turned, turned) / dot(x, x) - 1.0))
        dot(apply_rope(leaves, m, frequencies), y).backward()
        gradient.append(deviation([x.grad for x in leaves], apply_rope(y, -m, frequencies)))
    for claim, errors in (("R(m)^T R(n) = R(n - m)", relative),
                          ("a rotation keeps the norm", norm),
                          ("autograd: backwards through a rotation is the inverse", gradient)):
        check(claim, max(errors) < 1e-11, f"{max(errors):.0e}")

def show_decay(rng, frequencies, head_dim=128):
    """Wavelengths; then score and bound over distance -> [(distance, envelope, bound)]."""
    plot(f"tokens for a full turn, the wavelength, over pairs, head_dim {head_dim} (y axis log)",
         {f"base {base:,}": [(i, 2 * pi / frequency) for i, frequency
                             in enumerate(inverse_frequencies(head_dim, base))]
          for base in (500_000, 10_000)}, log_y=True, height=7)
    query, key = gaussian(rng, HEAD_DIM), gaussian(rng, HEAD_DIM)
    check("|score| ≤ envelope ≤ the paper's bound, at every distance below 1,000", all(
        abs(dot(apply_rope(query, m, frequencies), key)) <= envelope + 1e-9 <= bound + 2e-9
        for m in range(1000) for envelope, bound in [decay(query, key, m, frequencies)]))
    same, many = gaussian(rng, head_dim), inverse_frequencies(head_dim)
    distances = sorted({round(10 ** (i / 20)) for i in range(81)})
    curve = [(m, *decay(same, same, m, many)) for m in distances]
    print()
    plot("a key like the query, over distance, before scaling (both axes log)",
         {"the paper's bound": [(m, bound) for m, _, bound in curve],
          "sum of |h|, a bound without any turn": [(m, dot(same, same)) for m, _, _ in curve],
          "envelope of the score": [(m, envelope) for m, envelope, _ in curve]}, True, True, 80, 9)
    below = sum(bound < dot(same, same) for _, _, bound in curve)
    print(f"  The paper's bound is below the sum of |h| at {below} of {len(curve)} distances.\n")
    return curve

# A head that attends k tokens back: with a constant key u = (1, ..., 1, 0, ..., 0) and the query
# R(-k) u, the score is Σ cos((m - n - k) θ_i), largest where n = m - k, for any m. Sinusoids are
# R(p) u: a projection that turns them by -k does the same, if they are all it sees. So does a
# learned table that came to hold the sinusoids, up to its last row. A position after that has no
# vector; here it gets the last one, as when an index is clamped.
def show_look_back(frequencies, k=5, n=1000, n_rows=500, sharpness=25.0):
    """-> {way: (least weight on the token k back inside the table, least beyond, most beyond)}"""
    places = [sinusoid(p, frequencies) for p in range(n)]
    clamped = places[:n_rows] + places[n_rows - 1:n_rows] * (n - n_rows)
    def back(vectors): return [apply_rope(vector, -k, frequencies) for vector in vectors]
    def turned(vector): return [apply_rope(vector, p, frequencies) for p in range(n)]
    ways = {"rotary": (turned(back(places)[0]), turned(places[0])),
            "sinusoids alone": (back(places), places), "learned table": (back(clamped), clamped)}
    results = {}
    for name, (queries, keys) in ways.items():
        def weight(m):
            return softmax([sharpness * dot(queries[m], key) for key in keys[:m + 1]])[-1 - k]
        inside, beyond = map(weight, range(k, n_rows, 15)), list(map(weight, range(n_rows, n, 15)))
        results[name] = min(inside), min(beyond), max(beyond)
    table([f"weight on the token {k} back", f"least below {n_rows}", "least beyond", "most beyond"],
          *([name, *(f"{x:.4f}" for x in row)] for name, row in results.items()))
    inside, _, beyond = results["learned table"]
    check(f"the rotary head looks {k} back at every position", min(results["rotary"]) > 0.99)
    check("the table's does so up to its last row, never after", inside > 0.99 > 0.01 > beyond)
    return results

# 5. Two layouts -----------------------------------------------------------------------------------
# Which numbers form a pair does not matter, as long as it is always the same: a dot product is a
# sum, and a sum has no order. Meta's Llama and GPT-J pair neighbours. GPT-NeoX and transformers
# pair i with i + head_dim / 2: one cut instead of many. To convert, reorder the rows of the query
# and key matrices (nothing turns the values) in every head: even rows first, then the odd ones.
def permute_rows(weight, n_heads):
    """Rows of a query or key matrix for layout "interleaved" -> for layout "half".

    weight: [n_heads * head_dim][any]. ValueError if the rows are not n_heads even heads."""
    head_dim = len(weight) // n_heads if n_heads > 0 else 0
    if head_dim < 2 or head_dim % 2 or head_dim * n_heads != len(weight):
        raise ValueError(f"{len(weight)} rows are not {n_heads} heads of an even head_dim")
    order = [i for half in zip(*pairs(head_dim, "interleaved")) for i in half]
    return [weight[start + i] for start in range(0, len(weight), head_dim) for i in order]

def show_layouts(rng, weights, frequencies, n=12):
    """Which of 8 numbers pair up; then a head and its conversion."""
    for layout in "interleaved", "half": print(f"  {layout:<12}", *pairs(8, layout))
    print("  permute_rows", *permute_rows(list(range(8)), 1), end="\n\n")
    xs, rows, runs = [gaussian(rng, D_MODEL) for _ in range(n)], [], []
    converted = weights | {part: permute_rows(weights[part], 1) for part in ("query", "key")}
    for layout, head in ("interleaved", weights), ("half", converted):
        q, k, _ = project(head, xs, range(n), turn=rotary(frequencies, layout))
        runs.append((q + k, [score(query, key) for query in q for key in k]))
        rows.append([layout, " ".join(f"{x:+.4f}" for x in q[3][:6]), f"{score(q[3], k[0]):+.9f}"])
    table(["layout", "the turned query at 3 begins", "its score with key 0"], *rows)
    (old, scores), (new, same) = runs
    check("permuted rows: the same turned numbers in another order, bit for bit; same scores",
          [permute_rows(x, 1) for x in old] == new and deviation(scores, same) < 1e-12)

# 6. Longer contexts -------------------------------------------------------------------------------
# In training, a pair makes context / wavelength turns. Fast pairs see all angles; a slow one, with
# less than a turn, sees only a part, and beyond the context come angles that the model never met.
# Dividing its frequency by `factor` brings factor x context back into the known part, and moves
# neighbours closer together, which the fast pairs have to tell apart.
def stretched(frequencies, factor, keep):
    """keep[i] = 1 leaves frequency i as it is, 0 divides it by factor, in between is a blend."""
    if not frequencies: raise ValueError("0 frequencies: nothing to scale")
    if not factor > 0.0: raise ValueError(f"factor {factor} is not positive: time would run back")
    return [share * frequency + (1.0 - share) * frequency / factor
            for frequency, share in zip(frequencies, keep)]

def ramp(x, low, high): return min(max((x - low) / (high - low), 0.0), 1.0)

def scale_linear(frequencies, factor):
    """[head_dim / 2], all divided by factor (ValueError if not positive). Chen et al. 2023."""
    return stretched(frequencies, factor, [0.0] * len(frequencies))

def scale_ntk(head_dim, base, factor):
    """-> [head_dim / 2] of a larger base: the first pair stays, the last is divided by factor.

    base^(-(d-2)/d) falls by factor if base grows by factor^(d/(d-2)). Peng et al. 2023, section
    3.1. ValueError as inverse_frequencies(), or if head_dim is below 4."""
    if head_dim < 4: raise ValueError(f"head_dim {head_dim}: the last pair would be the first")
    if not factor > 0.0: raise ValueError(f"factor {factor} is not positive: time would run back")
    return inverse_frequencies(head_dim, base * factor ** (head_dim / (head_dim - 2)))

def scale_yarn(head_dim, base, factor, original_context, beta_fast=32.0, beta_slow=1.0):
    """-> (frequencies [head_dim / 2], attention_factor: what to multiply queries and keys by).

    Over beta_fast turns in original_context tokens: as it was; under beta_slow: divided by factor;
    between, linear in the index of the pair. The attention factor sharpens a softmax that more keys
    make flatter. Peng et al. 2023, sections 3.2 and 3.4. ValueError for a ramp that is none."""
    frequencies = inverse_frequencies(head_dim, base)
    if not (original_context > 0 and 0.0 < beta_slow <= beta_fast):
        raise ValueError(f"original_context {original_context}, beta_fast {beta_fast}, beta_slow "
                         f"{beta_slow}: all must be positive and beta_fast the larger")
    # turns = context base^(-2i/d) / 2π, solved for i, and rounded outwards as the authors do
    first, last = (head_dim / 2 * log(original_context / (2 * pi * turns)) / log(base)
                   for turns in (beta_fast, beta_slow))
    low, high = max(floor(first), 0), min(ceil(last), head_dim - 1)
    if low > high: raise ValueError(f"no ramp within base {base}, {original_context} tokens")
    keep = [1.0 - ramp(i, low, max(high, low + 0.001)) for i in range(len(frequencies))]
    return stretched(frequencies, factor, keep), 0.1 * log(max(factor, 1.0)) + 1.0

def scale_llama3(frequencies, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_context=8192):
    """As Llama 3.1 has it: YaRN's idea, but linear in the turns themselves -> [head_dim / 2].

    high_freq_factor turns in original_context tokens and more: as it was; low_freq_factor and less:
    divided by factor. ValueError if a number is not positive or low not below high."""
    if not (original_context > 0 and 0.0 < low_freq_factor < high_freq_factor):
        raise ValueError(f"original_context {original_context}, low_freq_factor {low_freq_factor}, "
                         f"high_freq_factor {high_freq_factor}: need 0 < low < high, context > 0")
    return stretched(frequencies, factor, [
        ramp(original_context * frequency / (2 * pi), low_freq_factor, high_freq_factor)
        for frequency in frequencies])

def show_longer_contexts(head_dim=128, base=500000.0, context=8192, factor=8.0):
    """Llama 3.1's numbers in all methods -> {method: how many times slower each pair turns}."""
    plain = inverse_frequencies(head_dim, base)
    turns = [context * frequency / (2 * pi) for frequency in plain]
    yarn, attention_factor = scale_yarn(head_dim, base, factor, context)
    scaled = {"unscaled": plain, "linear": scale_linear(plain, factor),
              "NTK-aware": scale_ntk(head_dim, base, factor), "YaRN": yarn,
              "Llama 3.1": scale_llama3(plain, factor, original_context=context)}
    slower = {name: [x / y for x, y in zip(plain, fresh)] for name, fresh in scaled.items()}
    print(f"  times slower that pairs turn; base {base:,.0f}, {context:,} tokens x {factor:g}\n")
    stays, full = ({name: [abs(x - y) < 1e-9 for x in times] for name, times in slower.items()}
                   for y in (1.0, factor))
    table(["pair", "wavelength", f"turns in {context:,}", *slower],
          *([str(i), f"{2 * pi / plain[i]:,.0f}", f"{turns[i]:,.3f}",
             *(f"{times[i]:.2f}" for times in slower.values())]
            for i in [*range(0, len(plain), 8), len(plain) - 1]),
          ["pairs that stay", "", "", *map(sum, stays.values())],
          [f"pairs {factor:g} times slower", "", "", *map(sum, full.values())],
          ["that meet new angles", "", f"by {factor * context:,.0f}", *(sum(
              t < 1.0 and not x for t, x in zip(turns, known)) for known in full.values())])
    print(f"  YaRN also multiplies all scores by {attention_factor ** 2:.3f}.")
    check("linear: dividing the frequencies = dividing the positions, bit for bit", all(
        sinusoid(p, scaled["linear"]) == sinusoid(p / factor, plain)
        for p in range(0, 8 * context, 4999)))
    check("NTK-aware: the first pair stays, the last is divided",
          stays["NTK-aware"][0] and full["NTK-aware"][-1])
    check("pairs over 32 turns (YaRN) or 4 (Llama 3.1) stay, those under 1 are divided", all(
        (t <= most or stay) and (t >= 1.0 or divided)
        for name, most in (("YaRN", 32.0), ("Llama 3.1", 4.0))
        for t, stay, divided in zip(turns, stays[name], full[name])))
    return slower

# 7. The bugs people ship --------------------------------------------------------------------------
# Each is a wrong `positions` or `turn`: nothing crashes, all shapes fit. The first token sees only
# itself, at position 0, where every turn is none. So it comes out right.
def show_wrong_layout(rng, weights, frequencies, n=100):
    """Weights for "interleaved" run as "half" -> {position: mean error of a score with key 0}."""
    queries, keys, _ = project(weights, [gaussian(rng, D_MODEL) for _ in range(n)], range(n))
    errors = {}
    for position in (0, 1, 2, 4, 16, 256, 4096):
        right, wrong = ([score(apply_rope(q, position, frequencies, layout), k)
                         for q, k in zip(queries, keys)] for layout in ("interleaved", "half"))
        errors[position] = sum(abs(a - b) for a, b in zip(right, wrong)) / sum(map(abs, right))
    print("  weights of the other layout: mean error of a score with key 0, over the mean score")
    bars([(f"query at {position:,}", error) for position, error in errors.items()])
    return errors

def show_bugs(rng, weights, frequencies, n=24, prompt=12, factor=8.0, far=1000):
    """Each bug beside the correct run -> {bug: (error of every output, change when all move)}."""
    xs, turn = [gaussian(rng, D_MODEL) for _ in range(n)], rotary(frequencies)
    slow, other = rotary(scale_linear(frequencies, factor)), rotary(frequencies, "interleaved")
    def straight(start): return range(start, start + n)
    def restarted(start): return [*range(start, start + prompt), *range(n - prompt)]
    def twice(vector, position): return slow(vector, position / factor)
    def outputs(positions, **ways): return attend(*project(weights, xs, positions, **ways))
    bugs = {"none": (turn, straight, {"turn": turn}),
            "weights of the other layout": (other, straight, {"turn": turn}),
            "values turned too": (turn, straight, {"turn": turn, "turn_values": turn}),
            f"restart at 0 after {prompt} tokens": (turn, restarted, {"turn": turn}),
            "position and frequency scaled": (slow, straight, {"turn": twice})}
    rows, results = [], {}
    for bug, (right, positions, ways) in bugs.items():
        truth = outputs(straight(0), turn=right)
        wrong, moved = (outputs(positions(start), **ways) for start in (0, far))
        size = max(abs(x) for row in truth for x in row)
        error, change = ([x / size for x in map(deviation, run, wrong)] for run in (truth, moved))
        results[bug] = error, max(change)
        first = next((i + 1 for i, x in enumerate(error) if x > 0.0), "-")
        rows.append([bug, first, f"{error[1]:.4f}", f"{max(error):.4f}", f"{max(change):.0e}"])
    print()
    table(["output error over largest output", "first wrong token", "token 2", "largest",
           f"change if all move by {far:,}"], *rows)
    none, layout, values, restart, scaling = results.values()
    check("every bug: the first token exact, bit for bit, then wrong", max(none[0]) == 0.0 and all(
        error[0] == 0.0 < max(error) for error, _ in (layout, values, restart, scaling)))
    check("moving all positions betrays turned values and restarts, not the other two",
          max(none[1], layout[1], scaling[1]) < 1e-11 and min(values[1], restart[1]) > 1e-6)
    return results

# 8. The real world --------------------------------------------------------------------------------
# A pair that completes a turn within the context shows the same angle at several distances; one
# that never does tells far from near without doubt. Pair i completes none if 2π base^(2i/d) exceeds
# the context: if i > d/2 ln(context / 2π) / ln base. Public config files: base, head_dim, context.
MODELS = {"Llama-2-7B": (10000.0, 128, 4096), "Llama-3-8B": (500000.0, 128, 8192)}
LONG = 131072                            # what Llama 3.1 reaches, with its scaling

def show_real_world():
    """Slowest pairs against contexts -> {(model, context): pairs that complete no turn}."""
    rows, counts, formulas = [], {}, {}
    for run in [(model, context) for model in MODELS for context in (MODELS[model][2], LONG)]:
        base, head_dim, _ = MODELS[run[0]]
        wavelengths = [2 * pi / frequency for frequency in inverse_frequencies(head_dim, base)]
        counts[run] = sum(wavelength > run[1] for wavelength in wavelengths)
        last = floor(head_dim / 2 * log(run[1] / (2 * pi)) / log(base))  # pair that completes one
        formulas[run] = max(0, head_dim // 2 - 1 - last)
        rows.append([run[0], f"{base:,.0f}", run[1], f"{wavelengths[-1]:,.0f}",
                     f"{wavelengths[-1] / run[1]:.2f}", counts[run], formulas[run]])
    table(["model", "base", "context", "longest wavelength", "over context",
           "of 64 pairs, no turn", "formula"], *rows)
    check("pairs without a full turn: counted = formula", counts == formulas)
    return counts

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
    started, rng, results = begin(), random.Random(seed), {}
    weights, frequencies = random_head(rng), inverse_frequencies(HEAD_DIM)
    section("1. Autograd", show_autograd, rng)
    section("2. An attention head", show_head, rng, weights)
    results["changes"] = section("3. Three ways", show_three_ways, rng, weights, frequencies)
    section("4. The rotation", show_rotation, rng, frequencies)
    results["decay"] = show_decay(rng, frequencies)
    results["look_back"] = show_look_back(frequencies)
    section("5. Two layouts", show_layouts, rng, weights, frequencies)
    results["slower"] = section("6. Longer contexts", show_longer_contexts)
    results["drift"] = section("7. The bugs people ship", show_wrong_layout, rng, weights,
                               frequencies)
    results["bugs"] = show_bugs(rng, weights, frequencies)
    results["turnless"] = section("8. The real world", show_real_world)
    return finish(started, **results)

if __name__ == "__main__": run(main)
