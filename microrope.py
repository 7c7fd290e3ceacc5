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
  4. The rotation          wavelengths, identities, decay, and a head that looks k back
  5. Two layouts           which numbers form a pair, and how to convert the weights
  6. Longer contexts       linear, NTK-aware, YaRN, Llama 3.1: which pairs stay, which stretch
  7. The bugs people ship  the wrong layout, turned values, restarted positions, scaling twice
  8. The real world        base 10,000 against 500,000: pairs that never complete a turn
"""
import argparse, codecs, gc, os, random, sys, time
from collections import defaultdict
from itertools import accumulate
from math import ceil, cos, exp, floor, isclose, log, pi, sin, sqrt
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
def digits(vector): return " ".join(f"{x:+.4f}" for x in vector[:8])

def show_autograd(rng, n=16):
    """A score, the dot product of a query and a key, is one Value; its slope is the key."""
    query, key = list(map(Value, gaussian(rng, n))), gaussian(rng, n)
    dot(query, key).backward()
    print(f"  d score / d query[0] = {query[0].grad:+.9f}, key[0] = {key[0]:+.9f}")
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
def random_tokens(rng, n): return [gaussian(rng, D_MODEL) for _ in range(n)]

def random_head(rng):
    return {part: [gaussian(rng, D_MODEL, D_MODEL ** -0.5) for _ in range(HEAD_DIM)]
            for part in ("query", "key", "value")}

def project(weights, xs, positions, add=without, turn=without, turn_values=without):
    """xs [n][d_model] at positions [n] -> queries, keys, values, each [n][head_dim]."""
    inputs = list(map(add, xs, positions))
    queries = list(map(turn, linear(inputs, weights["query"]), positions))
    keys = list(map(turn, linear(inputs, weights["key"]), positions))
    values = list(map(turn_values, linear(inputs, weights["value"]), positions))
    return queries, keys, values

def attend(queries, keys, values):
    """Causal attention, [n][head_dim] each -> outputs [n][head_dim]: token i sees 0 to i."""
    outputs = []
    for i, query in enumerate(queries):
        weights = softmax([score(query, key) for key in keys[:i + 1]])
        outputs.append([dot(weights, column) for column in zip(*values[:i + 1])])
    return outputs

def show_head(rng, weights, n=12):
    """Shuffle all tokens but the last and look at the last output."""
    xs = random_tokens(rng, n)
    shuffled = rng.sample(xs[:-1], n - 1) + xs[-1:]
    last = attend(*project(weights, xs, range(n)))[-1]
    other = attend(*project(weights, shuffled, range(n)))[-1]
    table([f"the tokens before token {n}", "its output begins"],
          ["in order", digits(last)], ["shuffled", digits(other)])
    check("without positions, the order of the past is invisible", deviation(last, other) < 1e-12)

# 3. Three ways ------------------------------------------------------------------------------------
# How can a vector say where it stands? Think of clock hands: pairs of numbers, points that turn as
# the position grows, a radian per token in the first pair, slower in every next one. Sinusoids are
# the places of such hands, added to the token's vector. A learned table, added too, has a free
# vector for each position; here random ones. RoPE turns the pairs of query and key themselves.
def inverse_frequencies(head_dim, base=10000.0):
    """-> radians per token of each pair, base^(-2i / head_dim), [head_dim / 2]. Su et al. 2021,
    section 3.2.2. ValueError if head_dim is odd or below 2, or base not above 1."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd or below 2: RoPE turns pairs of numbers")
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
    n = len(frequencies)
    return apply_rope([1.0] * n + [0.0] * n, position, frequencies)

def rotary(frequencies, layout="half"):              # a `turn` for project(); below, an `add`
    return lambda vector, position: apply_rope(vector, position, frequencies, layout)
def added(vectors): return lambda x, position: [a + b for a, b in zip(x, vectors[position])]

def three_ways(rng, weights, frequencies, n=1004):
    """One token at positions 0 to n - 1 -> {way: (queries, keys, values)}"""
    xs = random_tokens(rng, 1) * n
    sinusoids = [sinusoid(position, frequencies) for position in range(n)]
    learned = [gaussian(rng, D_MODEL, sqrt(0.5)) for _ in range(n)]          # as long as sinusoids
    return {"sinusoids added": project(weights, xs, range(n), add=added(sinusoids)),
            "learned table added": project(weights, xs, range(n), add=added(learned)),
            "rotary": project(weights, xs, range(n), turn=rotary(frequencies))}

def show_maps(ways, n=12):
    """Scores of the first n positions with each other, the three ways side by side."""
    print(f"  scores: a query at m (down) with a key at n (across), 0 to {n - 1}; solid: high\n")
    print("   " + "".join(f"{way:<{2 * n + 4}}" for way in ways).rstrip())
    lines = [[] for _ in range(n)]
    for queries, keys, _ in ways.values():
        scores = [[score(query, key) for key in keys[:n]] for query in queries[:n]]
        low, high = min(map(min, scores)), max(map(max, scores))
        for line, row in zip(lines, scores):
            line += [0.2 + 0.8 * (x - low) / (high - low) for x in row]      # light to solid
            line += [0.0, 0.0]                                               # blank, between maps
    heatmap(lines, 0.0, 1.0)

def show_changes(ways, distance=3):
    """Move a query and the key 3 before it by s -> {way: change of their score, for all s}."""
    changes = {}
    for way, (queries, keys, _) in ways.items():
        scores = list(map(score, queries[distance:], keys))
        changes[way] = [abs(moved - scores[0]) for moved in scores[1:]]
    largest = list(map(max, changes.values()))
    print(f"\n  largest change of a score if both positions move, by 1 to {len(scores) - 1:,}")
    bars(list(zip(changes, largest)))
    check("rotary scores stay but for rounding", largest[2] < 1e-11, f"{largest[2]:.0e}")
    check("scores with added positions do not", min(largest[:2]) > 1e-5)
    return changes

# 4. The rotation ----------------------------------------------------------------------------------
# A fast pair tells neighbours apart, but soon comes round: its wavelength, the tokens of a full
# turn, is 2π / frequency, from 2π to nearly 2π base. Slow pairs tell far from near. Below, the
# matrix R(p) is what apply_rope multiplies by: it turns pair i by p times its frequency θ_i.
def show_wavelengths(head_dim=128, base=10000.0):
    wavelengths = [2 * pi / theta for theta in inverse_frequencies(head_dim, base)]
    plot(f"tokens of a full turn, over pairs; head_dim {head_dim}, base {base:,.0f} (y axis log)",
         {"wavelength": list(enumerate(wavelengths))}, log_y=True, height=7)

def show_rotation(rng, frequencies, n_trials=50):
    """Three identities on random vectors at random positions: the largest deviations."""
    relative = norm = gradient = 0.0
    for _ in range(n_trials):
        m, n = rng.sample(range(1000), 2)
        x, y = gaussian(rng, HEAD_DIM), gaussian(rng, HEAD_DIM)
        turned = apply_rope(x, m, frequencies)
        # Undoing a turn is turning back, so the transpose of R(m) is R(-m). The score of a query x
        # at m and a key y at n is then (R(m) x)ᵀ R(n) y = xᵀ R(n - m) y: the distance alone.
        exact = dot(x, apply_rope(y, n - m, frequencies))
        relative = max(relative, abs(dot(turned, apply_rope(y, n, frequencies)) - exact))
        # With y = x and n = m, the same line says that a turn keeps the length of a vector.
        norm = max(norm, abs(dot(turned, turned) / dot(x, x) - 1.0))
        # As a function of x, yᵀ R(m) x has the slope R(m)ᵀ y = R(-m) y: gradients are turned back.
        leaves = list(map(Value, x))
        dot(apply_rope(leaves, m, frequencies), y).backward()
        slope = [leaf.grad for leaf in leaves]
        gradient = max(gradient, deviation(slope, apply_rope(y, -m, frequencies)))
    check("R(m)^T R(n) = R(n - m)", relative < 1e-11, f"{relative:.0e}")
    check("a rotation keeps the norm", norm < 1e-11, f"{norm:.0e}")
    check("autograd: gradients are turned back", gradient < 1e-11, f"{gradient:.0e}")

# Does a score fade with distance? A pair (a, b) is also the complex number a + ib, which e^(iφ)
# turns by φ. With h_j = q_j times the conjugate of k_j, the score at distance m is the real part of
# Σ h_j e^(i m θ_j), whose absolute value is the envelope. Summed by parts, it is at most Σ |S_j|
# times max |h_(j+1) - h_j|, h after the last being 0 and S_j the sum of the first j e^(i m θ).
def decay(query, key, distance, frequencies):
    """In layout "half" -> (envelope of the unscaled score, its bound by Su et al. 2021, 3.4.3)."""
    n = len(frequencies)
    h = [complex(a, b) * complex(c, -d) for a, b, c, d in zip(query, query[n:], key, key[n:])]
    turns = [complex(cos(distance * theta), sin(distance * theta)) for theta in frequencies]
    envelope = abs(sum(map(mul, h, turns)))
    largest_step = max(abs(after - before) for before, after in zip(h, h[1:] + [0.0]))
    return envelope, largest_step * sum(map(abs, accumulate(turns)))

def show_decay(rng, head_dim=128):
    """A key like the query -> [(distance, envelope of their score, bound)]."""
    x, frequencies = gaussian(rng, head_dim), inverse_frequencies(head_dim)
    curve = [(m, *decay(x, x, m, frequencies)) for m in range(1, 3001)]
    print()
    plot("score of a query with a key like it, before scaling, over distance (both axes log)",
         {"the paper's bound": [(m, bound) for m, _, bound in curve],
          "envelope of the score": [(m, envelope) for m, envelope, _ in curve]},
         log_x=True, log_y=True, height=8)
    loose = sum(bound > dot(x, x) for _, _, bound in curve)
    print(f"  The bound is above the score at distance 0 at {loose:,} of {len(curve):,} distances.")
    check("|score| ≤ envelope ≤ the paper's bound, at every distance of the chart", all(
        abs(dot(apply_rope(x, m, frequencies), x)) <= envelope + 1e-9 <= bound + 2e-9
        for m, envelope, bound in curve))
    return curve

# A head that attends k tokens back: with a constant key u = (1, ..., 1, 0, ..., 0) and the query
# R(-k) u, the score is Σ cos((m - n - k) θ_i), largest where n = m - k, for any m. A learned table
# that came to hold the sinusoids, R(p) u, does the same if a projection turns them by -k, up to its
# last row. A position after that has no vector; here it gets the last, as when an index is clamped.
def show_look_back(frequencies, k=5, n_rows=500, positions=(10, 250, 499, 500, 750, 999)):
    """-> {way: {position: weight on the token k back}}"""
    def weight_back(query, keys):
        return softmax([25.0 * dot(query, key) for key in keys])[-1 - k]     # 25: to be sharp
    places = [sinusoid(position, frequencies) for position in range(1000)]
    rows = [places[min(position, n_rows - 1)] for position in range(1000)]
    constant = sinusoid(-k, frequencies)
    rotary_head, table_head = {}, {}
    for m in positions:
        rotary_head[m] = weight_back(apply_rope(constant, m, frequencies), places[:m + 1])
        table_head[m] = weight_back(apply_rope(rows[m], -k, frequencies), rows[:m + 1])
    print(f"\n  weight on the token {k} back, over position; the learned table has {n_rows} rows\n")
    table(["position", *rotary_head], ["rotary", *(f"{x:.4f}" for x in rotary_head.values())],
          ["learned table", *(f"{x:.4f}" for x in table_head.values())])
    check(f"the rotary head looks {k} back wherever it stands", min(rotary_head.values()) > 0.99)
    check("the table's does so up to its last row, not after", all(
        x > 0.99 if m < n_rows else x < 0.01 for m, x in table_head.items()))
    return {"rotary": rotary_head, "learned table": table_head}

# 5. Two layouts -----------------------------------------------------------------------------------
# Which numbers form a pair does not matter, as long as it is always the same: a dot product is a
# sum, and a sum has no order. Meta's Llama and GPT-J pair neighbours. GPT-NeoX and transformers
# pair i with i + head_dim / 2: one cut instead of many. To convert, reorder the rows of the query
# and key matrices (nothing turns the values) in every head: even rows first, then the odd ones.
def permute_rows(weight, n_heads):
    """Rows of a query or key matrix [n_heads * head_dim][any] for layout "interleaved" -> for
    layout "half". ValueError if the rows are not n_heads heads of an even head_dim."""
    head_dim = len(weight) // n_heads if n_heads > 0 else 0
    if head_dim < 2 or head_dim % 2 or head_dim * n_heads != len(weight):
        raise ValueError(f"{len(weight)} rows are not {n_heads} heads of an even head_dim")
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return [weight[start + i] for start in range(0, len(weight), head_dim) for i in order]

def show_layouts(rng, weights, frequencies, n=12):
    """One head in either layout: the same scores from other vectors."""
    for layout in "interleaved", "half": print(f"  pairs of 8, {layout:<12}", *pairs(8, layout))
    print()
    xs = random_tokens(rng, n)
    converted = weights | {part: permute_rows(weights[part], 1) for part in ("query", "key")}
    old, old_keys, _ = project(weights, xs, range(n), turn=rotary(frequencies, "interleaved"))
    new, new_keys, _ = project(converted, xs, range(n), turn=rotary(frequencies, "half"))
    scores = [score(query, key) for query in old for key in old_keys]
    same = [score(query, key) for query in new for key in new_keys]
    table(["layout", "the turned query at 3 begins", "its score with key 0"],
          ["interleaved", digits(old[3]), f"{scores[3 * n]:+.9f}"],
          ["half", digits(new[3]), f"{same[3 * n]:+.9f}"])
    permuted = [permute_rows(vector, 1) for vector in old + old_keys]
    check("permuted rows: the same turned numbers in another order, bit for bit; same scores",
          permuted == new + new_keys and deviation(scores, same) < 1e-12)

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
def turns_in(context, frequencies): return [context * x / (2 * pi) for x in frequencies]
def pair_that_makes(turns, context, head_dim, base):         # turns = context base^(-2i/d) / 2π
    return head_dim / 2 * log(context / (2 * pi * turns)) / log(base)

def scale_linear(frequencies, factor):
    """[head_dim / 2], all divided by factor (ValueError if not positive). Chen et al. 2023."""
    return stretched(frequencies, factor, [0.0] * len(frequencies))

def scale_ntk(head_dim, base, factor):
    """-> [head_dim / 2] of a larger base, times factor^(d/(d-2)): the first pair stays, the last,
    base^(-(d-2)/d), is divided by factor. Peng et al. 2023, section 3.1. ValueError as in
    inverse_frequencies(), and if head_dim is below 4 or factor not positive."""
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
    first = floor(pair_that_makes(beta_fast, original_context, head_dim, base))
    last = ceil(pair_that_makes(beta_slow, original_context, head_dim, base))
    low, high = max(first, 0), min(last, head_dim - 1)       # as the authors round and clamp
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
    turns = turns_in(original_context, frequencies)
    keep = [ramp(turn, low_freq_factor, high_freq_factor) for turn in turns]
    return stretched(frequencies, factor, keep)

def show_longer_contexts(head_dim=128, base=500000.0, context=8192, factor=8.0):
    """Llama 3.1's numbers in all methods -> {method: how many times slower each pair turns}."""
    plain = inverse_frequencies(head_dim, base)
    turns = turns_in(context, plain)
    methods = {"unscaled": plain, "linear": scale_linear(plain, factor),
               "NTK-aware": scale_ntk(head_dim, base, factor),
               "YaRN": scale_yarn(head_dim, base, factor, context)[0],
               "Llama 3.1": scale_llama3(plain, factor, original_context=context)}
    slower = {method: [old / new for old, new in zip(plain, scaled)]
              for method, scaled in methods.items()}
    rows = []
    for i in [*range(0, len(plain), 8), len(plain) - 1]:
        times = [f"{column[i]:.2f}" for column in slower.values()]
        rows.append([str(i), f"{context / turns[i]:,.0f}", f"{turns[i]:,.3f}", *times])
    slow = [turn < 1.0 for turn in turns].index(True)        # from here on, less than a turn
    stay = [sum(isclose(x, 1.0) for x in column) for column in slower.values()]
    new = [sum(not isclose(x, factor) for x in column[slow:]) for column in slower.values()]
    print(f"  times slower that pairs turn; base {base:,.0f}, {context:,} tokens x {factor:g}\n")
    table(["pair", "wavelength", f"turns in {context:,}", *slower], *rows,
          ["pairs that stay", "", "", *stay], ["pairs with new angles", "", "", *new])
    print(f"  New angles: under a turn in {context:,} tokens, further in {factor * context:,.0f}.")
    check("NTK-aware: the first pair stays, the last is divided",
          isclose(slower["NTK-aware"][0], 1.0) and isclose(slower["NTK-aware"][-1], factor))
    for method, most in ("YaRN", 32.0), ("Llama 3.1", 4.0):
        fast = [isclose(x, 1.0) for x, turn in zip(slower[method], turns) if turn > most]
        divided = [isclose(x, factor) for x in slower[method][slow:]]
        check(f"{method}: pairs over {most:g} turns stay, those under 1 are divided",
              all(fast) and all(divided))
    return slower

# 7. The bugs people ship --------------------------------------------------------------------------
# Nothing crashes and all shapes fit. The first token sees only itself, at position 0, where every
# turn is none: it comes out right, and so a test with one token passes.
def show_wrong_layout(rng, weights, frequencies, n=100):
    """Weights for "interleaved" run as "half" -> {position: error of a score with key 0}."""
    queries, keys, _ = project(weights, random_tokens(rng, n), range(n))
    interleaved, half = rotary(frequencies, "interleaved"), rotary(frequencies, "half")
    errors = {}
    for position in (0, 1, 2, 4, 16, 256, 4096):
        right = [score(interleaved(query, position), key) for query, key in zip(queries, keys)]
        wrong = [score(half(query, position), key) for query, key in zip(queries, keys)]
        errors[position] = sum(abs(a - b) for a, b in zip(right, wrong)) / sum(map(abs, right))
    print("  weights of the other layout: mean error of a score with key 0, over the mean |score|")
    bars([(f"query at {position:,}", error) for position, error in errors.items()])
    return errors

def show_bugs(rng, weights, frequencies, n=24, prompt=12, factor=8.0):
    """Each bug in a head whose frequencies are divided by factor -> {bug: errors of outputs}."""
    xs = random_tokens(rng, n)
    slow = scale_linear(frequencies, factor)
    def outputs(positions, turn, turn_values=without):
        return attend(*project(weights, xs, positions, turn=turn, turn_values=turn_values))
    restarted = [*range(prompt), *range(n - prompt)]         # although the prompt is in the cache
    divided = [position / factor for position in range(n)]
    runs = {"none: positions divided instead": outputs(divided, rotary(frequencies)),
            "positions divided, too": outputs(divided, rotary(slow)),
            "weights of the other layout": outputs(range(n), rotary(slow, "interleaved")),
            "values turned, too": outputs(range(n), rotary(slow), turn_values=rotary(slow)),
            f"restart at 0 after {prompt} tokens": outputs(restarted, rotary(slow))}
    truth = outputs(range(n), rotary(slow))
    size = max(abs(x) for output in truth for x in output)
    results, rows = {}, []
    for bug, wrong in runs.items():
        errors = [deviation(a, b) / size for a, b in zip(truth, wrong)]
        first = next((token for token, error in enumerate(errors, 1) if error > 0.0), "-")
        rows.append([bug, first, f"{errors[1]:.4f}", f"{max(errors):.4f}"])
        results[bug] = errors
    print(f"\n  frequencies divided by {factor:g}; errors over the largest number in the outputs\n")
    table(["bug", "first wrong token", "error at token 2", "largest error"], *rows)
    none, *wrong = results.values()
    check("dividing the positions = dividing the frequencies, bit for bit", max(none) == 0.0)
    check("every bug: the first token exact, bit for bit, then wrong",
          all(errors[0] == 0.0 < max(errors) for errors in wrong))
    return results

# 8. The real world --------------------------------------------------------------------------------
# A pair that completes a turn within the context shows the same angle at several distances; one
# that never does tells far from near without doubt. Public config files: base and context.
MODELS = {"Llama-2-7B": (10000.0, 4096), "Llama-3-8B": (500000.0, 8192)}
LONG = 131072                            # what Llama 3.1 reaches, with its scaling

def show_real_world(head_dim=128):
    """Slowest pairs against contexts -> {(model, context): pairs that complete no turn}."""
    rows = []
    for model, (base, trained) in MODELS.items():
        frequencies = inverse_frequencies(head_dim, base)
        longest = 2 * pi / frequencies[-1]
        for context in (trained, LONG):
            turnless = sum(turn < 1.0 for turn in turns_in(context, frequencies))
            formula = head_dim // 2 - 1 - floor(pair_that_makes(1.0, context, head_dim, base))
            rows.append([model, f"{base:,.0f}", context, f"{longest:,.0f}",
                         f"{longest / context:.2f}", turnless, max(formula, 0)])
    table(["model", "base", "context", "longest wavelength", "over context",
           f"of {head_dim // 2} pairs, no turn", "formula"], *rows)
    check("pairs without a full turn: counted = formula", all(row[-2] == row[-1] for row in rows))
    return {(row[0], row[2]): row[-2] for row in rows}

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
    ways = three_ways(rng, weights, frequencies)
    section("3. Three ways", show_maps, ways)
    results["changes"] = show_changes(ways)
    section("4. The rotation", show_wavelengths)
    show_rotation(rng, frequencies)
    results["decay"] = show_decay(rng)
    results["look_back"] = show_look_back(frequencies)
    section("5. Two layouts", show_layouts, rng, weights, frequencies)
    results["slower"] = section("6. Longer contexts", show_longer_contexts)
    setup = rng, weights, frequencies
    results["drift"] = section("7. The bugs people ship", show_wrong_layout, *setup)
    results["bugs"] = show_bugs(*setup)
    results["turnless"] = section("8. The real world", show_real_world)
    return finish(started, **results)

if __name__ == "__main__": run(main)
