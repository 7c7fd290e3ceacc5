"""FlashAttention computes exact attention and never writes the N x N matrix of scores to memory.

Attention compares N queries with N keys: N² scores, a softmax over each row, a weighted mean of the
values. On a GPU the time goes into moving those N² numbers to slow memory and back. The idea: take
tiles that fit into fast memory, fold each into a running softmax, forget it, and compute it again
for the gradient. You will see the same results and every number moved; not, in Python, the speed.

  Dao et al. 2022 (2205.14135) FlashAttention    Milakov & Gimelshein 2018 (1805.02867) softmax
  Dao 2023 (2307.08691) FlashAttention-2         Liu et al. 2023 (2310.01889) ring attention

  python microflash.py [--seed N]                needs only Python, takes about a second

  1. Autograd              the referee of all gradients here
  2. Standard attention    three kernels, and a meter on all that they move
  3. The online softmax    a running maximum and sum; no overflow at ±1000
  4. The tiled forward     any tiles, the same output; what a causal mask lets one skip
  5. A limit on memory     traffic over N, d and M, and where flash stops winning
  6. The backward pass     recompute, do not remember: O(N) numbers kept, not O(N²)
  7. Merging               partial results over any parts of the keys: split-K decoding, a ring
  8. The bugs people ship  no rescaling, a row that sees nothing, partial results averaged
  9. The real world        the paper's own figure by formula, and the score matrix at 128k
"""
import argparse, codecs, gc, os, random, sys, time
from collections import defaultdict
from functools import reduce
from math import ceil, exp, inf, isnan, log, sqrt
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

def matrices(rng, *shapes):
    return [[[rng.gauss(0.0, 1.0) for _ in range(d)] for _ in range(n)] for n, d in shapes]
def size(rows): return sum(map(len, rows))
def difference(a, b): return max(abs(x - y) for rows in zip(a, b) for x, y in zip(*rows))

def gradients(q, k, v, weights, causal=False):
    """Of Σ out ∘ weights, by backward() through standard attention -> (dq, dk, dv), the tape."""
    values = [[list(map(Value, row)) for row in rows] for rows in (q, k, v)]
    out, tape = standard_attention(*values, causal), TAPE.copy()
    dot(sum(out, []), sum(weights, [])).backward()
    return [[[x.grad for x in row] for row in rows] for rows in values], tape

def show_autograd(rng, n=16, d=8):
    """How much there is to remember, if the gradient is taken as every framework takes it."""
    _, tape = gradients(*matrices(rng, *[(n, d)] * 4))
    print(f"  Standard attention of {n} queries and keys leaves {len(tape):,} Values on the tape.")

# 2. Standard attention ----------------------------------------------------------------------------
# A GPU computes on numbers in a small fast memory (SRAM, on the chip); the tensors lie in a large
# slow one (HBM). A kernel is a program that loads tiles, computes, and stores. Every kernel below
# works through a FastMemory. Single numbers, and sums in progress, are in registers, for free.

class FastMemory:
    """At most `capacity` numbers, in tiles, lists of rows; an evicted tile is emptied, so that no
    kernel can go on using it. `moved` counts the numbers moved from and to slow memory."""
    def __init__(self, capacity=inf):
        self.capacity, self.used, self.peak, self.moved = capacity, 0, 0, 0
    def hold(self, rows, tile=()):
        """Rows computed here, as a new tile or over an old one -> it; MemoryError if too many."""
        used = self.used - size(tile) + size(rows)
        if used > self.capacity: raise MemoryError(f"{used} numbers do not fit {self.capacity}")
        tile = tile or []
        self.used, self.peak, tile[:] = used, max(self.peak, used), rows
        return tile
    def evict(self, *tiles): return [self.hold([], tile) for tile in tiles]
    def load(self, rows):
        self.moved += size(rows)
        return self.hold([list(row) for row in rows])
    def store(self, tile):
        """Write a tile to slow memory and evict it -> its rows there."""
        rows, self.moved = list(tile), self.moved + size(tile)
        self.evict(tile)
        return rows
    def stream(self, block, *arrays, start=0, stop=None):
        """Load `block` rows of each array, yield (first row, *tiles), evict; then the next."""
        for i in range(start, len(arrays[0]) if stop is None else stop, block):
            tiles = [self.load(rows[i:i + block]) for rows in arrays]
            yield i, *tiles
            self.evict(*tiles)

def shapes(q, k, v, *like_q, block_q=1, block_k=1):
    """-> (n_q, n_k, d). like_q: what else has a row for each query. ValueError if they misfit."""
    widths = sorted({len(row) for rows in (q, k, v, *like_q) for row in rows})
    if not q or not k or 0 in widths: raise ValueError(f"empty: {len(q)} x {len(k)} of {widths}")
    if len(widths) > 1: raise ValueError(f"rows of {widths} numbers: all need the same width")
    for a, b in (k, v), *((q, rows) for rows in like_q):
        if len(a) != len(b): raise ValueError(f"{len(a)} rows and {len(b)}, but each needs its own")
    if min(block_q, block_k) < 1: raise ValueError(f"a tile of {block_q} x {block_k} rows")
    return len(q), len(k), widths[0]

def score_tile(q, k, offset=inf):
    """q kᵀ / √d. Row r sees columns up to r + offset: causal masks. The others get -inf."""
    scale = len(q[0]) ** -0.5
    return [[x * scale + (0.0 if c <= r + offset else -inf) for c, x in enumerate(row)]
            for r, row in enumerate(linear(q, k))]

def add_product(rows, weights, values):
    """rows [n][d] + weights [n][m] · values [m][d]."""
    return [[x + y for x, y in zip(*pair)]
            for pair in zip(rows, linear(weights, list(zip(*values))))]

def standard_attention(q, k, v, causal=False, memory=None, block_q=None, block_k=None):
    """softmax(q kᵀ / √d) v, of Values or floats. q: [n_q][d], k and v: [n_k][d] -> out [n_q][d].

    Causal: the last query sees all keys, each one before it one fewer; out is 0 if it sees none.
    ValueError if empty, ragged or of unequal widths. Dao et al. 2022, algorithm 0."""
    block_q, block_k = block_q or len(q), block_k or len(k)
    n_q, n_k, d = shapes(q, k, v, block_q=block_q, block_k=block_k)
    fast, ahead, scores, weights, out = memory or FastMemory(), n_k - n_q, [], [], []
    for i, q_tile in fast.stream(block_q, q):                              # S = q kᵀ / √d
        parts = [fast.store(fast.hold(score_tile(q_tile, k_tile, i - j + ahead if causal else inf)))
                 for j, k_tile in fast.stream(block_k, k)]
        scores += [sum(row, []) for row in zip(*parts)]
    for _, row in fast.stream(1, scores):                                  # P = softmax(S)
        p = softmax(row[0]) if max(floats(row[0])) > -inf else [0.0] * n_k
        weights += fast.store(fast.hold([p], row))
    for i in range(0, n_q, block_q):                                       # out = P v
        tile = fast.hold([[0.0] * d for _ in q[i:i + block_q]])
        for j, v_tile in fast.stream(block_k, v):
            p_tile = fast.load([row[j:j + block_k] for row in weights[i:i + block_q]])
            fast.hold(add_product(tile, p_tile, v_tile), tile)
            fast.evict(p_tile)
        out += fast.store(tile)
    return out

def standard_traffic(n_q, n_k, d, block_q):      # S, P: out and in; k, v: for each tile of queries
    return 4 * n_q * n_k + 2 * n_q * d + 2 * ceil(n_q / block_q) * n_k * d

def show_standard(rng, n=40, d=8):
    """What the three kernels move with fast memory to spare."""
    standard_attention(*matrices(rng, *[(n, d)] * 3), memory=(memory := FastMemory()))
    bars([("q, k, v, out", 4 * n * d), (f"{n} x {n} scores", n * n), ("moved", memory.moved)])

# 3. The online softmax ----------------------------------------------------------------------------
# A softmax needs the maximum of its row, so that exp cannot overflow, and the sum: two passes, it
# seems, before the first weight is known. But let top be the maximum of the part seen so far and
# total = Σ exp(score - top). When a later score moves top to top', the factor exp(top - top')
# corrects all earlier terms at once, and a sum of values weighted by them. So a score can be
# forgotten once it is seen. Milakov & Gimelshein 2018, algorithm 3; with values, Dao et al. 2022.
def fold(state, scores, columns):
    """Take m more keys into a running softmax -> its new state. columns: [d][m], their values.
    state: [top, total, *mixed], mixed [d] = Σ exp(score - top) · value; at first -inf and zeros."""
    top, total, *mixed = state
    new_top = max(top, *scores)
    base = new_top if new_top > -inf else 0.0    # all hidden so far; and -inf - -inf would be NaN
    rescale, p = exp(top - base), [exp(score - base) for score in scores]
    mixed = [x * rescale + dot(p, column) for x, column in zip(mixed, columns)]
    return [new_top, total * rescale + sum(p), *mixed]

def normalized(state):
    """-> [logsumexp, *out]: -inf and zeros if no key was seen."""
    top, total, *mixed = state
    return [top + log(total), *(x / total for x in mixed)] if total else [-inf] + [0.0] * len(mixed)

def online(scores, values, block, fold=fold):
    """One row -> its states, after each tile of `block` keys."""
    states = [[-inf, 0.0] + [0.0] * len(values[0])]
    for j in range(0, len(scores), block):
        states.append(fold(states[-1], scores[j:j + block], list(zip(*values[j:j + block]))))
    return states[1:]

def show_online_softmax(rng):
    """One row, one key at a time; scores that exp cannot take."""
    scores = [rng.gauss(0.0, 1.0) for _ in range(3)] + [1000.0, 998.5, -1000.0, 1000.5]
    values, rows = matrices(rng, (len(scores), 1))[0], []
    for j, (top, total, mixed) in enumerate(online(scores, values, 1)):
        truth = dot(softmax(scores[:j + 1]), sum(values[:j + 1], []))
        before = rows[-1][1] if rows else -inf
        rows.append([scores[j], top, exp(before - top), total, mixed, mixed / total, truth])
    table(["score", "top", "rescale by", "total", "mixed", "out", "softmax of all so far"],
          *([f"{x:.3f}" for x in row] for row in rows))
    error = max(abs(out - truth) for *_, out, truth in rows)
    check("the state after every key is the softmax so far", error < 1e-12, f"{error:.0e}")

# 4. The tiled forward -----------------------------------------------------------------------------
# Queries outside, keys inside, as in FlashAttention-2: a tile of queries and its states stay while
# all keys and values stream past. (The first paper had keys outside, and so moved the output once
# per tile of keys.) A causal mask ends the stream at the last key that the tile's last query sees.
def flash_attention(q, k, v, block_q, block_k, causal=False, memory=None, fold=fold):
    """As standard_attention(), of floats -> (out [n_q][d], logsumexp [n_q] of each row of scores).

    -inf for a row that sees no key. ValueError also for a block below 1. Dao 2023, algorithm 1."""
    n_q, n_k, d = shapes(q, k, v, block_q=block_q, block_k=block_k)
    fast, ahead, results = memory or FastMemory(), n_k - n_q, []
    for i, q_tile in fast.stream(block_q, q):
        states = fast.hold([[-inf, 0.0] + [0.0] * d for _ in q_tile])
        seen = min(n_k, max(0, i + len(q_tile) + ahead)) if causal else n_k
        for j, k_tile, v_tile in fast.stream(block_k, k, v, stop=seen):
            COUNT["tile", i, j] += 1
            scores = fast.hold(score_tile(q_tile, k_tile, i - j + ahead if causal else inf))
            columns = list(zip(*v_tile))
            fast.hold([fold(*row, columns) for row in zip(states, scores)], states)
            fast.evict(scores)
        results += fast.store(fast.hold(list(map(normalized, states)), states))
    return [out for _, *out in results], [logsumexp for logsumexp, *_ in results]

def show_tiled_forward(rng, d=8):
    """Shapes, tiles and masks against standard attention; the tiles that are computed."""
    rows, errors = [], []
    for n_q, n_k, block_q, block_k, causal in ((32, 32, 32, 32, False), (11, 27, 3, 5, False),
            (11, 27, 3, 5, True), (32, 32, 8, 2, True), (32, 32, 4, 4, True)):
        q, k, v = matrices(rng, (n_q, d), (n_k, d), (n_k, d))
        COUNT.clear()
        out, logsumexp = flash_attention(q, k, v, block_q, block_k, causal)
        grid = [["·█"[COUNT["tile", i, j]] for j in range(0, n_k, block_k)]
                for i in range(0, n_q, block_q)]
        truth = [[cross_entropy(row, 0) + row[0]]
                 for row in score_tile(q, k, n_k - n_q if causal else inf)]
        errors.append(max(difference(out, standard_attention(q, k, v, causal)),
                          difference(zip(logsumexp), truth)))
        rows.append([f"{n_q} x {n_k}", f"{block_q} x {block_k}", "yes" if causal else "no",
                     *(sum(row.count(x) for row in grid) for x in "█·"), f"{errors[-1]:.0e}"])
    table(["queries x keys", "tile", "causal", "tiles computed", "skipped", "error"], *rows)
    print("\n  the tiles of the last: █ computed, · skipped")
    for row in grid: print("   ", "".join(2 * x for x in row))
    check("tiled = standard: out and logsumexp", max(errors) < 1e-12, f"{max(errors):.0e}")

# 5. A limit on memory -----------------------------------------------------------------------------
# Flash moves q, out and logsumexp once, k and v once for every tile of queries. So tiles should be
# tall: q and states take block_q (2d + 2) numbers, scores block_q · block_k, keys and values
# 2 block_k d. With M >> d numbers of fast memory that is block_q = M / 2d, and 4N²d²/M are moved:
# Θ(N²d²/M), which no exact method beats for every M (Dao et al. 2022, proposition 3). Standard
# attention moves N² scores four times, in tiles twice as tall: cheaper for M below about d².
def flash_traffic(n_q, n_k, d, block_q):
    return 2 * n_q * d + n_q + 2 * ceil(n_q / block_q) * n_k * d

def flash_footprint(block_q, block_k, d): return block_q * (2 * d + 2 + block_k) + 2 * block_k * d
def standard_footprint(block_q, block_k, d): return block_q * (d + block_k) + block_k * d
METHODS = {"standard": (standard_attention, standard_footprint, standard_traffic),
           "flash": (flash_attention, flash_footprint, flash_traffic)}

def largest_block(footprint, capacity, *sizes):
    """The largest first argument of a footprint, linear in it, that stays within the capacity."""
    fixed = footprint(0, *sizes)
    return (capacity - fixed) // (footprint(1, *sizes) - fixed)

def show_limit(rng, block_k=2):
    """Both methods in M numbers of fast memory; the formulas at the size of GPT-2 -> results."""
    rows, exact = [], True
    for n, d, m in ((24, 16, 512), (48, 16, 512), (72, 16, 512), (48, 8, 512), (48, 32, 512),
                    (48, 16, 128), (48, 16, 256), (48, 16, 1024)):
        inputs, row = matrices(rng, *[(n, d)] * 3), []
        for attention, footprint, traffic in METHODS.values():
            block_q, memory = min(n, largest_block(footprint, m, block_k, d)), FastMemory(m)
            attention(*inputs, memory=memory, block_q=block_q, block_k=block_k)
            row += [block_q, memory.moved, traffic(n, n, d, block_q)]
            exact &= (memory.moved, memory.peak) == (row[-1], footprint(block_q, block_k, d))
        rows.append([f"{n}", d, m, *row, f"{row[1] / row[4]:.2f}", 4 * n * n * d * d // m])
    print(f"  numbers moved, with M numbers of fast memory; tiles {block_k} wide, as tall as fits")
    table(["N", "d", "M", "tall", "standard", "formula", "tall", "flash", "formula",
           "standard / flash", "4N²d²/M"], *rows)
    check("moved, and the peak of fast memory: counted = formula, for both", exact)
    try: refusal = flash_attention(*inputs, block_q + 1, block_k, memory=memory) and ""
    except MemoryError as error: refusal = str(error)
    check("a tile one query taller is refused", refusal)
    print(f"  One query more in a tile of the last: {refusal}.\n")
    n, d, curves, sizes = 1024, 64, {}, [round(1024 * 2 ** (i / 32)) for i in range(225)]
    for name, (_, footprint, traffic) in METHODS.items():
        blocks = [min(n, largest_block(footprint, m, block_k, d)) for m in sizes]
        curves[name] = [(m / 1e3, traffic(n, n, d, x) / 1e6) for m, x in zip(sizes, blocks)]
    crossing = max(m for m, (_, a), (_, b) in zip(sizes, *curves.values()) if a <= b)
    curves["4N²d²/M"] = [(m / 1e3, 4 * n * n * d * d / m / 1e6) for m in sizes]
    plot(f"N = {n:,}, d = {d}, formulas: millions moved over M / 1000 (log)", curves, True, True)
    print(f"  Above M = {crossing:,}, {crossing / d ** 2:.2f} d², flash moves fewer.")
    return {"rows": rows, "crossing": crossing}

# 6. The backward pass -----------------------------------------------------------------------------
# With S = q kᵀ / √d, P = softmax(S), out = P v and g = d loss / d out, the chain rule gives
#     dv = Pᵀ g     dP = g vᵀ     dS = P ∘ (dP - D)     dq = dS k / √d     dk = dSᵀ q / √d
# D is Σ_j P_ij dP_ij, and that equals Σ g ∘ out over the d columns of row i (Dao et al. 2022,
# appendix B.2): no N x N matrix. P is exp(S - logsumexp), so any tile of it can be computed again.
# Keys are outside: dk and dv stay, dq comes and goes. (A GPU adds to dq by atomic operations.)
def flash_attention_backward(q, k, v, out, logsumexp, grad_out, block_q, block_k, causal=False,
                             memory=None):
    """What flash_attention() took and gave, d loss / d out [n_q][d] -> (dq, dk, dv), like q, k, v.

    ValueError as there, and if out, logsumexp, grad_out are not n_q rows. Dao 2023, algorithm 2."""
    n_q, n_k, d = shapes(q, k, v, out, grad_out, block_q=block_q, block_k=block_k)
    if len(logsumexp) != n_q: raise ValueError(f"{n_q} queries, but {len(logsumexp)} logsumexp")
    fast, ahead, scale = memory or FastMemory(), n_k - n_q, d ** -0.5
    delta, dq, dk, dv = [], [[0.0] * d for _ in q], [], []
    for _, *tiles in fast.stream(block_q, out, grad_out):
        delta += fast.store(fast.hold([[dot(*pair)] for pair in zip(*tiles)]))
    for j, k_tile, v_tile in fast.stream(block_k, k, v):
        dk_tile, dv_tile = (fast.hold([[0.0] * d for _ in k_tile]) for _ in "kv")
        first = max(0, j - ahead) // block_q * block_q if causal else 0
        for i, q_tile, g, dq_tile, lse, terms in fast.stream(
                block_q, q, grad_out, dq, list(zip(logsumexp)), delta, start=first):
            scores = score_tile(q_tile, k_tile, i - j + ahead if causal else inf)
            p = fast.hold([[exp(x - shift) if x > -inf else 0.0 for x in row]
                           for row, (shift,) in zip(scores, lse)])
            ds = fast.hold([[x * (y - term) * scale for x, y in zip(*pair)]
                            for *pair, (term,) in zip(p, linear(g, v_tile), terms)])
            fast.hold(add_product(dv_tile, list(zip(*p)), g), dv_tile)
            fast.hold(add_product(dk_tile, list(zip(*ds)), q_tile), dk_tile)
            dq[i:i + block_q] = fast.store(fast.hold(add_product(dq_tile, ds, k_tile), dq_tile))
            fast.evict(p, ds)
        dk += fast.store(dk_tile)
        dv += fast.store(dv_tile)
    return dq, dk, dv

def backward_traffic(n_q, n_k, d, block_k):
    return 2 * n_q * d + n_q + 4 * n_k * d + ceil(n_k / block_k) * (4 * n_q * d + 2 * n_q)

def backward_footprint(block_k, block_q, d):
    return 4 * block_k * d + block_q * (3 * d + 2) + 2 * block_q * block_k

def show_backward(rng, d=8, block=4):
    """Gradients and numbers kept against backward() through standard attention -> the rows."""
    rows, errors, exact = [], [], True
    for n, causal in (8, False), (16, False), (32, False), (32, True):
        *inputs, grad_out = matrices(rng, *[(n, d)] * 4)
        truth, tape = gradients(*inputs, grad_out, causal)
        saved, memory = (*inputs, *flash_attention(*inputs, block, block, causal)), FastMemory()
        COUNT.clear()
        grads = flash_attention_backward(*saved, grad_out, block, block, causal, memory)
        errors.append(max(map(difference, grads, truth)))
        counted = (len(tape), sum(map(size, saved[:4])) + len(saved[4]), COUNT["multiply-adds"],
                   memory.moved, memory.peak)
        exact = exact and (causal or counted == (
            4 * n * n + 2 * n * d, 4 * n * d + n, 5 * n * n * d + n * d,
            backward_traffic(n, n, d, block), backward_footprint(block, block, d)))
        rows.append([f"{n}", "yes" if causal else "no", *counted, f"{errors[-1]:.0e}"])
    table(["N", "causal", "on tape", "kept", "multiply-adds", "moved", "peak", "error"], *rows)
    check("dq, dk, dv = those of backward()", max(errors) < 1e-12, f"{max(errors):.0e}")
    check("tape 4N² + 2Nd, kept 4Nd + N, 5N²d + Nd multiply-adds, moved, peak: counted", exact)
    return rows

# 7. Merging ---------------------------------------------------------------------------------------
# Attention over a part of the keys is like one key, of score logsumexp and value out, and to merge
# is to fold, in any order. So one query's keys can be split among processors (Flash-Decoding), or
# sent round a ring of devices that each keep their queries (ring attention).
def merge_partials(out_a, lse_a, out_b, lse_b):
    """Attention over keys A and over keys B -> over both: (out [n][d], logsumexp [n]).
    ValueError if the parts differ in shape. Milakov & Gimelshein 2018, section 3.1."""
    shapes(out_a, out_b, out_b, out_b)
    if {len(lse_a), len(lse_b)} != {len(out_a)}: raise ValueError(f"{len(lse_a)}, {len(lse_b)} lse")
    rows = [normalized(fold([x, 1.0, *a], [y], list(zip(b))))
            for a, x, b, y in zip(out_a, lse_a, out_b, lse_b)]
    return [out for _, *out in rows], [logsumexp for logsumexp, *_ in rows]

def show_merging(rng, n=64, d=8, block=4):
    """Two queries, their keys split among workers; in each of the orders of a ring."""
    (q, k, v), rows, errors = matrices(rng, (2, d), (n, d), (n, d)), [], []
    keys, (whole, lse) = rng.sample(range(n), n), flash_attention(q, k, v, 2, block)
    def merge(a, b): return merge_partials(*a, *b)
    for workers in (1, 2, 5, 16):
        COUNT.clear()
        parts = [flash_attention(q, *([x[j] for j in keys[i::workers]] for x in (k, v)), 2, block)
                 for i in range(workers)]
        tiles = sum(key[0] == "tile" for key in COUNT)       # of the longest part: all start at 0
        rings = [reduce(merge, parts[i:] + parts[:i]) for i in range(workers)]
        errors.append(max(difference([*a, b], [*whole, lse]) for a, b in rings))
        rows.append([f"{workers}", tiles, f"{errors[-1]:.0e}"])
    table([f"workers for {n} keys", f"tiles of {block} one after another", "error"], *rows)
    check("any parts of the keys, merged: the whole", max(errors) < 1e-12, f"{max(errors):.0e}")

# 8. The bugs people ship --------------------------------------------------------------------------
def fold_without_rescaling(state, scores, columns):
    """Bug: when the maximum moves, what was summed up before stays as it is."""
    top, *sums = state
    return fold([max(top, *scores), *sums], scores, columns)

def fold_without_guard(state, scores, columns):
    """Bug: the maximum is subtracted even if it is -inf, because all keys so far are hidden."""
    if (top := max(state[0], *scores)) > -inf: return fold(state, scores, columns)
    return [top, *(x * exp(state[0] - top) for x in state[1:])]

def merge_by_mean(out_a, lse_a, out_b, lse_b):
    """Bug: the outputs of two parts are averaged, however much of the softmax lies in each."""
    return merge_partials(out_a, [0.0] * len(lse_a), out_b, [0.0] * len(lse_b))

def show_bugs(rng, d=8, n=16, block=4):
    """Each bug beside the correct version -> rows of bug, what is measured, correct, with bug."""
    values, (scores,), rows, off = *matrices(rng, (n, d), (1, n)), [], []
    for order, row in ("fall", sorted(scores)[::-1]), ("rise", sorted(scores)):
        truth = [[dot(softmax(row), column) for column in zip(*values)]]
        states = (online(row, values, 1, f)[-1] for f in (fold, fold_without_rescaling))
        outs = [[normalized(state)[1:]] for state in states]
        rows.append(["no rescaling", f"error of out if scores {order}",
                     *(f"{difference(out, truth):.0e}" for out in outs)])
        mean = [[sum(column) / n for column in zip(*values)]]
        off.append(difference(outs[1], truth if order == "fall" else mean))
    check("no rescaling: right if scores fall, a plain mean if they rise", max(off) < 1e-12)
    # 2 of these 6 queries see no key. Zeros are the convention for them, here and in PyTorch.
    q, k, v, grad_out = matrices(rng, (6, d), (4, d), (4, d), (6, d))
    nans = []
    for f in fold, fold_without_guard:
        out, lse = flash_attention(q, k, v, block, block, True, fold=f)
        _, dk, _ = flash_attention_backward(q, k, v, out, lse, grad_out, block, block, True)
        padded = normalized(online([-inf] * block + scores[block:], values, block, f)[-1])
        nans.append([sum(map(isnan, sum(x, []))) for x in (out, dk, [padded])])
    names = "out, 6 x 8", "dk, 4 x 8", "a row padded on the left, 9"
    rows += [["no guard", f"NaN in {name}", *pair] for name, *pair in zip(names, *nans)]
    check("no guard: NaN in rows that see no key, and in all of dk; with it none",
          nans == [[0, 0, 0], [2 * d, 4 * d, 1 + d]])
    q, k, v = matrices(rng, (1, d), (n, d), (n, d))
    a, b = (flash_attention(q, k[x], v[x], 1, block) for x in (slice(2), slice(2, n)))
    (right, lse), truth = merge_partials(*a, *b), standard_attention(q, k, v)
    gaps = [difference(x, truth) for x in (right, merge_by_mean(*a, *b)[0])]
    share = exp(a[1][0] - lse[0])
    rows.append(["mean of parts", f"error of out, {share:.0%} of the softmax in one",
                 *(f"{x:.0e}" for x in gaps)])
    check("the mean is off by |share - 1/2| times the difference of the parts",
          abs(gaps[1] - abs(share - 0.5) * difference(a[0], b[0])) < 1e-12)
    table(["bug", "measured", "correct", "with the bug"], *rows)
    return rows

# 9. The real world --------------------------------------------------------------------------------
# Figure 2 of Dao et al. 2022: attention of GPT-2 medium, forward and backward, on an A100. Assumed:
# 16-bit numbers, a multiprocessor's SRAM to a head, the largest tile past which flash can stream
# tiles of d rows, as in algorithm 1. Standard attention: N x N matrices moved forward as in section
# 2, backward for dv 1, dP 1, dS 3, dq 1, dk 1; mask and dropout 2 each, both ways, if not fused.
FIGURE_2, GB_STANDARD, GB_FLASH = (1024, 64, 16 * 64), 40.3, 4.4     # N, d, 16 heads x batch 64
SRAM, LLAMA_31_8B = 192 * 1024, (131072, 32, 8, 128)    # bytes; context, heads, KV heads, head_dim

def show_real_world(_, bytes_each=2):
    """The paper's figure by the formulas verified above; the score matrix at 128k -> GB moved."""
    (n, d, heads), m = FIGURE_2, SRAM // bytes_each
    block_q, block_k = (largest_block(f, m, d, d) for f in (flash_footprint, backward_footprint))
    fused = standard_traffic(n, n, d, n) + (1 + 1 + 3 + 1 + 1) * n * n + 8 * n * d
    flash = flash_traffic(n, n, d, block_q) + backward_traffic(n, n, d, block_k)
    fused, apart, flash = (heads * bytes_each * x / 1e9 for x in (fused, fused + 8 * n * n, flash))
    table([f"GB moved, GPT-2 medium, {heads:,} heads", "formula", "paper"],
          ["standard, mask and dropout fused", f"{fused:.1f}", "-"],
          ["standard, each a kernel", f"{apart:.1f}", GB_STANDARD],
          ["flash", f"{flash:.1f}", GB_FLASH],
          ["standard / flash", f"{apart / flash:.1f}", f"{GB_STANDARD / GB_FLASH:.1f}"])
    n, n_heads, n_kv_heads, head_dim = LLAMA_31_8B
    kept = n * (2 * (n_heads + n_kv_heads) * head_dim + n_heads)
    one, layer, kept = (f"{bytes_each * x / 1e9:,.1f} GB" for x in (n * n, n_heads * n * n, kept))
    print(f"\n  Llama-3.1-8B, {n:,} tokens, a layer: scores {layer}, {one} a head; kept {kept}.")
    return {"standard, fused": fused, "standard": apart, "flash": flash}

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
    """Run all sections -> the measurements, under the section's name."""
    started, rng, results = begin(), random.Random(seed), {}
    for title, show in {
            "1. Autograd": show_autograd, "2. Standard attention": show_standard,
            "3. The online softmax": show_online_softmax,
            "4. The tiled forward": show_tiled_forward, "5. A limit on memory": show_limit,
            "6. The backward pass": show_backward, "7. Merging": show_merging,
            "8. The bugs people ship": show_bugs, "9. The real world": show_real_world}.items():
        results[show.__name__.removeprefix("show_")] = section(title, show, rng)
    return finish(started, **results)

if __name__ == "__main__": run(main)
