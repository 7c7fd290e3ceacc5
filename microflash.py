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
from math import ceil, dist, exp, inf, isnan, log, sqrt
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
def zeros(n, d): return [[0.0] * d for _ in range(n)]
def transposed(rows): return list(zip(*rows))
def size(rows): return sum(map(len, rows))
def difference(a, b): return sum(map(dist, a, b))       # summed over the rows; NaN if there is one

def gradients(q, k, v, grad_out, causal=False):
    """Of Σ out · grad_out, by backward() -> (dq, dk, dv), the number of Values on the tape."""
    leaves = [[list(map(Value, row)) for row in rows] for rows in (q, k, v)]
    out = standard_attention(*leaves, causal)
    taped = len(TAPE)
    dot(sum(out, []), sum(grad_out, [])).backward()
    return [[[x.grad for x in row] for row in rows] for rows in leaves], taped

def show_autograd(rng, n=16, d=8):
    _, taped = gradients(*matrices(rng, (n, d), (n, d), (n, d), (n, d)))
    print(f"  Standard attention of {n} queries and keys leaves {taped:,} Values on the tape.")

# 2. Standard attention ----------------------------------------------------------------------------
# A query says what a position of the text looks for, a key what a position is found by, a value
# what it has to give: vectors of d numbers. The score of a query and a key is their dot product
# over √d. Softmax makes weights of a query's scores; out is the mean of the values, so weighted.
# A GPU computes on numbers in a small fast memory (SRAM, on the chip); the matrices lie in a large
# slow one (HBM). A kernel is a program that loads tiles, pieces of matrices, computes, and stores.
# All kernels below work through a FastMemory. Single numbers are in registers, for free.
class FastMemory:
    """Room for `capacity` numbers in tiles, which are lists of rows and may be changed in place.
    `moved` counts the numbers loaded and stored."""

    def __init__(self, capacity=inf): self.capacity, self.tiles, self.moved = capacity, [], 0

    def hold(self, rows):
        """Take rows in as a tile -> the tile; MemoryError if there is no room."""
        self.tiles.append(rows)
        used = sum(map(size, self.tiles))
        if used > self.capacity: raise MemoryError(f"{used:,} numbers do not fit {self.capacity:,}")
        return rows

    def load(self, block, *matrices, first=0):
        """Lend a loop's body the next `block` rows of each matrix; after it, evict all it took."""
        for i in range(first, len(matrices[0]), block):
            n_tiles = len(self.tiles)
            tiles = [self.hold([list(row) for row in rows[i:i + block]]) for rows in matrices]
            self.moved += sum(map(size, tiles))
            yield i, *tiles
            self.evict(n_tiles)

    def store(self, tile):
        self.moved += size(tile)
        return [list(row) for row in tile]

    def evict(self, n_kept=0):
        """Give up all but the oldest tiles, and empty them: no kernel can go on using one."""
        for tile in self.tiles[n_kept:]: tile.clear()
        del self.tiles[n_kept:]

def require_fit(like_q, like_k, block_q=1, block_k=1):
    """ValueError, with the numbers, unless the matrices fit each other and tiles have rows."""
    widths = {len(row) for rows in like_q + like_k for row in rows}
    for sizes in {len(rows) for rows in like_q}, {len(rows) for rows in like_k}, widths:
        if len(sizes) != 1 or 0 in sizes: raise ValueError(f"empty or unequal: {sorted(sizes)}")
    if block_q < 1 or block_k < 1: raise ValueError(f"a tile of {block_q} x {block_k} rows")

def keys_seen(n_q, n_k, causal):                 # by each query, counted from the first key
    return [max(0, n_k - n_q + i + 1) if causal else n_k for i in range(n_q)]

def score_tile(q_tile, k_tile, seen, j=0):
    """q kᵀ / √d. The keys are numbers j, j + 1, ...; from seen[r] on, they are -inf for row r."""
    scale, rows = len(q_tile[0]) ** -0.5, linear(q_tile, k_tile)
    return [[x * scale + (0.0 if n < end else -inf) for n, x in enumerate(row, j)]
            for row, end in zip(rows, seen)]

def add_product(tile, a, b):
    """tile [n][d] += aᵀ b, of a [m][n] and b [m][d]."""
    for row, product in zip(tile, linear(transposed(a), transposed(b))):
        row[:] = [x + y for x, y in zip(row, product)]

def standard_attention(q, k, v, causal=False, memory=None, block_q=None, block_k=None):
    """softmax(q kᵀ / √d) v, of Values or floats. q: [n_q][d], k and v: [n_k][d] -> out [n_q][d].
    Causal: the last query sees all keys, each one before it one fewer; out is 0 if it sees none.
    ValueError if empty, ragged or of unequal widths. Dao et al. 2022, algorithm 0."""
    if block_q is None: block_q, block_k = len(q), len(k)
    require_fit([q], [k, v], block_q, block_k)
    fast, seen = memory or FastMemory(), keys_seen(len(q), len(k), causal)
    scores, weights, out = [[] for _ in q], [], []
    for i, q_tile in fast.load(block_q, q):                  # the first kernel: S = q kᵀ / √d
        for j, k_tile in fast.load(block_k, k):
            tile = fast.hold(score_tile(q_tile, k_tile, seen[i:i + block_q], j))
            for row, piece in zip(scores[i:], fast.store(tile)): row += piece
    for _, tile in fast.load(1, scores):                     # the second: P = softmax(S)
        tile[0] = softmax(tile[0]) if max(floats(tile[0])) > -inf else [0.0] * len(k)
        weights += fast.store(tile)
    for i in range(0, len(q), block_q):                      # the third: out = P v
        columns = transposed(weights[i:i + block_q])
        tile = fast.hold(zeros(len(columns[0]), len(v[0])))
        for _, p_tile, v_tile in fast.load(block_k, columns, v): add_product(tile, p_tile, v_tile)
        out += fast.store(tile)
        fast.evict()
    return out

def show_standard(rng, n=40, d=8):
    memory = FastMemory()
    standard_attention(*matrices(rng, (n, d), (n, d), (n, d)), memory=memory)
    print(f"  The kernels move {memory.moved:,} numbers; q, k, v, out, {n} x {d}: {4 * n * d:,}.")

# 3. The online softmax ----------------------------------------------------------------------------
# A softmax needs the maximum of its row, so that exp cannot overflow, and the sum: two passes, it
# seems, before the first weight is known. But let top be the maximum of the part seen so far and
# total = Σ exp(score - top). When a later score moves top to top', the factor exp(top - top')
# corrects all earlier terms at once, and a sum of values weighted by them. So a score can be
# forgotten once it is seen. In the end out = weighted / total; and top + log(total) is the row's
# logsumexp, log Σ exp(score). Milakov & Gimelshein 2018, algorithm 3; with values, Dao et al. 2022.
def fold(state, scores, values):
    """Take m more keys into a running softmax -> its new state. scores: [m], values: [m][d].
    state: [top, total, *weighted], weighted [d] = Σ exp(score - top) · value; first -inf, zeros."""
    top, total, *weighted = state
    new_top = max(top, *scores)
    base = new_top if new_top > -inf else 0.0    # all hidden so far; and -inf - -inf would be NaN
    rescale = exp(top - base)
    p = [exp(score - base) for score in scores]
    weighted = [x * rescale + dot(p, column) for x, column in zip(weighted, zip(*values))]
    return [new_top, total * rescale + sum(p), *weighted]

def normalized(state):
    """-> [logsumexp, *out]: -inf and zeros if no key was seen."""
    top, total, *weighted = state
    if total == 0.0: return [-inf, *weighted]
    return [top + log(total), *(x / total for x in weighted)]

def show_online_softmax(rng):
    scores = [rng.gauss(0.0, 1.0) for _ in range(3)] + [1000.0, 998.5, -1000.0, 1000.5]
    values = [rng.gauss(0.0, 1.0) for _ in scores]
    rows, top, total, weighted = [], -inf, 0.0, 0.0
    for j, (score, value) in enumerate(zip(scores, values)):
        last = top
        top, total, weighted = fold([top, total, weighted], [score], [[value]])
        truth = dot(softmax(scores[:j + 1]), values[:j + 1])
        rows.append([score, value, top, exp(last - top), total, weighted, weighted / total, truth])
    print("  a key a line: score and value, the state after it, its out, and the out of a softmax")
    table(["score", "value", "top", "rescale by", "total", "weighted", "out", "of a softmax"],
          *([f"{x:.3f}" for x in row] for row in rows))
    error = sum(abs(out - truth) for *_, out, truth in rows)
    check("the state after every key is the softmax so far", error < 1e-12, f"{error:.0e}")

# 4. The tiled forward -----------------------------------------------------------------------------
# Queries outside, keys inside, as in FlashAttention-2: a tile of queries and its states stay while
# all keys and values stream past. (The first paper had keys outside, and so moved the output once
# per tile of keys.) A causal mask ends the stream at the last key that the tile's last query sees.
def flash_attention(q, k, v, block_q, block_k, causal=False, memory=None, fold=fold):
    """As standard_attention(), of floats -> (out [n_q][d], logsumexp [n_q] of each row of scores).
    -inf for a row that sees no key. ValueError also for a block below 1. Dao 2023, algorithm 1."""
    require_fit([q], [k, v], block_q, block_k)
    fast, seen, results = memory or FastMemory(), keys_seen(len(q), len(k), causal), []
    for i, q_tile in fast.load(block_q, q):
        states = fast.hold([[-inf, 0.0] + [0.0] * len(row) for row in q_tile])
        ends = seen[i:i + block_q]
        for j, k_tile, v_tile in fast.load(block_k, k[:ends[-1]], v[:ends[-1]]):
            COUNT["tile", i, j] += 1
            scores = fast.hold(score_tile(q_tile, k_tile, ends, j))
            for r, row in enumerate(scores): states[r] = fold(states[r], row, v_tile)
        results += fast.store([normalized(state) for state in states])
    return [row[1:] for row in results], [row[0] for row in results]

def show_tiled_forward(rng, d=8):
    rows, errors = [], []
    for n_q, n_k, block_q, block_k, causal in (11, 27, 3, 5, False), (30, 35, 4, 3, True):
        q, k, v = matrices(rng, (n_q, d), (n_k, d), (n_k, d))
        COUNT.clear()
        out, lse = flash_attention(q, k, v, block_q, block_k, causal)
        tiles = [[COUNT["tile", i, j] for j in range(0, n_k, block_k)]
                 for i in range(0, n_q, block_q)]
        scores = score_tile(q, k, keys_seen(n_q, n_k, causal))
        truth = [cross_entropy(row, 0) + row[0] for row in scores]     # logsumexp - row[0] + row[0]
        errors.append(difference([*out, lse], [*standard_attention(q, k, v, causal), truth]))
        rows.append([f"{n_q} x {n_k}", f"{block_q} x {block_k}", "yes" if causal else "no",
                     size(tiles), size(tiles) - sum(map(sum, tiles)), f"{errors[-1]:.0e}"])
    table(["queries x keys", "tile", "causal", "tiles", "skipped", "error"], *rows)
    print("\n  the tiles of the last, queries down and keys across: █ computed, ░ skipped")
    heatmap(tiles, -1 / 3, 1)            # with this low end, 0 gets the lightest shade
    check("tiled = standard: out and logsumexp", sum(errors) < 1e-12, f"{sum(errors):.0e}")

# 5. A limit on memory -----------------------------------------------------------------------------
# Flash moves q, out and logsumexp once, k and v once for every tile of queries. So tiles should be
# tall: q and states take block_q (2d + 2) numbers, scores block_q · block_k, keys and values
# 2 block_k d. With M >> d numbers of fast memory that is block_q = M / 2d, and 4N²d²/M are moved:
# Θ(N²d²/M), which no exact method beats for every M (Dao et al. 2022, proposition 3). Standard
# attention moves N² scores four times, in tiles twice as tall: cheaper for M below about d².
def flash_block(m, d, block_k): return (m - 2 * block_k * d) // (2 * d + 2 + block_k)
def flash_traffic(n_q, n_k, d, block_q):
    return 2 * n_q * d + n_q + 2 * ceil(n_q / block_q) * n_k * d
def standard_block(m, d, block_k): return (m - block_k * d) // (d + block_k)
def standard_traffic(n_q, n_k, d, block_q):
    return 2 * n_q * d + 4 * n_q * n_k + 2 * ceil(n_q / block_q) * n_k * d
METHODS = {"standard": (standard_attention, standard_block, standard_traffic),
           "flash": (flash_attention, flash_block, flash_traffic)}

def show_limit(rng, block_k=2):
    """Both methods in M numbers of fast memory, counted and by formula -> rows, crossing."""
    rows = []
    for n, d, m in ((48, 16, 512), (96, 16, 512), (48, 32, 512), (48, 16, 256), (48, 16, 1024)):
        inputs = matrices(rng, (n, d), (n, d), (n, d))
        row = [f"{n}", d, m]
        for attention, block, traffic in METHODS.values():
            block_q, memory = min(n, block(m, d, block_k)), FastMemory(m)
            attention(*inputs, memory=memory, block_q=block_q, block_k=block_k)
            row += [block_q, memory.moved, traffic(n, n, d, block_q)]
        rows.append([*row, f"{row[4] / row[7]:.2f}"])
    print(f"  numbers moved, with M numbers of fast memory; tiles {block_k} wide, as tall as fits")
    table("N d M tall standard formula tall flash formula standard/flash".split(), *rows)
    check("moved in tiles as tall as fits: counted = formula, for both",
          all(row[4] == row[5] and row[7] == row[8] for row in rows))
    refusal = ""
    try: flash_attention(*inputs, block_q + 1, block_k, memory=FastMemory(m))
    except MemoryError as error: refusal = str(error)
    print(f"  One query more in a tile of the last: {refusal}.\n")
    check("a tile one query taller is refused", refusal)
    return {"rows": rows, "crossing": show_crossing(block_k)}

def show_crossing(block_k, n=1024, d=64):
    """The formulas over M at the size of GPT-2 -> the M above which flash moves fewer numbers."""
    sizes, curves = [round(1024 * 2 ** (i / 32)) for i in range(225)], {}
    for method, (_, block, traffic) in METHODS.items():
        blocks = [min(n, block(m, d, block_k)) for m in sizes]
        curves[method] = [(m, traffic(n, n, d, rows) / 1e6) for m, rows in zip(sizes, blocks)]
    crossing = max(m for (m, a), (_, b) in zip(curves["standard"], curves["flash"]) if a <= b)
    curves["4N²d²/M"] = [(m, 4 * n * n * d * d / m / 1e6) for m in sizes]
    plot(f"millions moved over M (both log), by formula, N = {n:,}, d = {d}", curves, True, True)
    print(f"  Above M = {crossing:,}, {crossing / d ** 2:.2f} d², flash moves fewer.")
    return crossing

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
    require_fit([q, out, grad_out], [k, v], block_q, block_k)
    if len(logsumexp) != len(q): raise ValueError(f"{len(q)} queries, {len(logsumexp)} logsumexp")
    fast, seen = memory or FastMemory(), keys_seen(len(q), len(k), causal)
    d, lses, row_sums = len(q[0]), transposed([logsumexp]), []
    dq, dk, dv = zeros(len(q), d), [], []
    for _, g, out_tile in fast.load(block_q, grad_out, out):
        row_sums += fast.store([[dot(*rows)] for rows in zip(g, out_tile)])              # D
    for j, k_tile, v_tile in fast.load(block_k, k, v):
        dk_tile, dv_tile = fast.hold(zeros(len(k_tile), d)), fast.hold(zeros(len(k_tile), d))
        first = sum(end <= j for end in seen) // block_q * block_q    # the tiles before see no key
        for i, q_tile, g, lse_tile, sum_tile, dq_tile in fast.load(
                block_q, q, grad_out, lses, row_sums, dq, first=first):
            p = fast.hold(score_tile(q_tile, k_tile, seen[i:i + block_q], j))            # S
            for row, [lse] in zip(p, lse_tile):
                row[:] = [exp(x - lse) if x > -inf else 0.0 for x in row]                # P
            add_product(dv_tile, p, g)                                                   # dv
            ds = fast.hold(linear(g, v_tile))                                            # dP
            for row, weights, [row_sum] in zip(ds, p, sum_tile):
                row[:] = [x * (y - row_sum) / sqrt(d) for x, y in zip(weights, row)]     # dS / √d
            add_product(dq_tile, transposed(ds), k_tile)                                 # dq
            add_product(dk_tile, ds, q_tile)                                             # dk
            dq[i:i + block_q] = fast.store(dq_tile)
        dk += fast.store(dk_tile)
        dv += fast.store(dv_tile)
    return dq, dk, dv

def backward_block(m, d, block_q): return (m - block_q * (3 * d + 2)) // (4 * d + 2 * block_q)
def backward_traffic(n_q, n_k, d, block_k):
    return 2 * n_q * d + n_q + 4 * n_k * d + ceil(n_k / block_k) * (4 * n_q * d + 2 * n_q)

def show_backward(rng, d=8, block=4):
    """Gradients and numbers kept against backward() through standard attention -> the rows."""
    rows, errors, exact = [], [], True
    for n, causal in (8, False), (16, False), (32, False), (32, True):
        q, k, v, grad_out = matrices(rng, (n, d), (n, d), (n, d), (n, d))
        truth, taped = gradients(q, k, v, grad_out, causal)
        out, lse = flash_attention(q, k, v, block, block, causal)
        memory = FastMemory()
        found = flash_attention_backward(q, k, v, out, lse, grad_out, block, block, causal, memory)
        errors.append(sum(map(difference, found, truth)))
        counted = [taped, size([*q, *k, *v, *out, lse]), memory.moved]
        formulas = [4 * n * n + 2 * n * d, 4 * n * d + n, backward_traffic(n, n, d, block)]
        exact = exact and (causal or counted == formulas)
        rows.append([f"{n}", "yes" if causal else "no", *counted, f"{errors[-1]:.0e}"])
    print("  numbers kept for the backward pass, on the tape and by flash; then moved by flash's")
    table(["N", "causal", "on tape", "by flash", "moved", "error"], *rows)
    check("dq, dk, dv = those of backward()", sum(errors) < 1e-12, f"{sum(errors):.0e}")
    check("tape 4N² + 2Nd, kept 4Nd + N, moved: counted = formula", exact)
    return rows

# 7. Merging ---------------------------------------------------------------------------------------
# Attention over a part of the keys is like one key, of score logsumexp and value out, and to merge
# is to fold, in any order. So one query's keys can be split among processors (Flash-Decoding), or
# sent round a ring of devices that each keep their queries (ring attention).
def merge_partials(out_a, lse_a, out_b, lse_b):
    """Attention over keys A and over keys B -> over both: (out [n][d], logsumexp [n]).
    ValueError if the parts differ in shape. Milakov & Gimelshein 2018, section 3.1."""
    require_fit([out_a, out_b], [out_a])
    parts = zip(out_a, lse_a, out_b, lse_b, strict=True)
    rows = [normalized(fold([x, 1.0, *a], [y], [b])) for a, x, b, y in parts]
    return [row[1:] for row in rows], [row[0] for row in rows]

def show_merging(rng, n=64, d=8, block=4):
    """Two queries, their keys split among workers; in each of the orders of a ring."""
    q, k, v = matrices(rng, (2, d), (n, d), (n, d))
    out, lse = flash_attention(q, k, v, 2, block)
    rows, errors = [], []
    for workers in (1, 2, 5, 16):
        COUNT.clear()
        parts = [flash_attention(q, k[i::workers], v[i::workers], 2, block) for i in range(workers)]
        longest = sum(key[0] == "tile" for key in COUNT)     # each part counts its tiles from 0
        for i in range(workers):                 # in a ring, every device begins with its own part
            merged = parts[i]
            for part in parts[i + 1:] + parts[:i]: merged = merge_partials(*merged, *part)
            errors.append(difference([*merged[0], merged[1]], [*out, lse]))
        rows.append([f"{workers}", longest, f"{max(errors[-workers:]):.0e}"])
    table([f"workers for {n} keys", f"tiles of {block} one after another", "error"], *rows)
    check("any parts of the keys, merged: the whole", sum(errors) < 1e-12, f"{sum(errors):.0e}")

# 8. The bugs people ship --------------------------------------------------------------------------
# Three mistakes where parts of a softmax are put together. None of them raises an error.
def fold_without_rescaling(state, scores, values):
    """Bug: when the maximum moves, what was summed up before stays as it is."""
    return fold([max(state[0], *scores), *state[1:]], scores, values)

def fold_without_guard(state, scores, values):
    """Bug: the maximum is subtracted even if it is -inf, because all keys so far are hidden."""
    if max(state[0], *scores) > -inf: return fold(state, scores, values)
    return [-inf, *(x * exp(-inf - -inf) for x in state[1:])]

def merge_by_mean(out_a, lse_a, out_b, lse_b):
    """Bug: the outputs of two parts are averaged, however much of the softmax lies in each."""
    return merge_partials(out_a, [0.0] * len(lse_a), out_b, [0.0] * len(lse_b))

def no_rescaling(rng, n=16, d=8):
    """If the scores rise, every key moves the maximum. (If they fall, nothing goes wrong.)"""
    q, k, v = matrices(rng, (1, d), (n, d), (n, d))
    keys, values = zip(*sorted(zip(k, v), key=lambda pair: dot(q[0], pair[0])))
    truth = standard_attention(q, k, v)
    mean = [[sum(column) / n for column in zip(*v)]]
    right, _ = flash_attention(q, keys, values, 1, 1)
    wrong, _ = flash_attention(q, keys, values, 1, 1, fold=fold_without_rescaling)
    check("no rescaling, scores that rise: a mean without weights", difference(wrong, mean) < 1e-12)
    return [["no rescaling", "error of out if scores rise", f"{difference(right, truth):.0e}",
             f"{difference(wrong, truth):.0e}"]]

def no_guard(rng, d=8):
    """2 of 6 queries see no key; zeros are the convention for them, here and in PyTorch."""
    q, k, v, grad_out = matrices(rng, (6, d), (4, d), (4, d), (6, d))
    nans = []
    for f in fold, fold_without_guard:
        out, lse = flash_attention(q, k, v, 4, 4, True, fold=f)
        _, dk, _ = flash_attention_backward(q, k, v, out, lse, grad_out, 4, 4, True)
        nans += [sum(map(isnan, sum(x, []))) for x in (out, dk)]
    check("no guard: NaN in rows that see no key, and in all of dk", nans == [0, 0, 2 * d, 4 * d])
    return [["no guard", f"NaN in out, 6 x {d}", nans[0], nans[2]],
            ["no guard", f"NaN in dk, 4 x {d}", nans[1], nans[3]]]

def mean_of_parts(rng, n=16, d=8):
    """A part of 2 keys counts as much as a part of 14."""
    q, k, v = matrices(rng, (1, d), (n, d), (n, d))
    truth, lse = flash_attention(q, k, v, 1, 4)
    a, lse_a = flash_attention(q, k[:2], v[:2], 1, 4)
    b, lse_b = flash_attention(q, k[2:], v[2:], 1, 4)
    right = difference(merge_partials(a, lse_a, b, lse_b)[0], truth)
    wrong = difference(merge_by_mean(a, lse_a, b, lse_b)[0], truth)
    share = exp(lse_a[0] - lse[0])
    check("the mean is off by |share - 1/2| times the difference of the parts",
          abs(wrong - abs(share - 0.5) * difference(a, b)) < 1e-12)
    return [["mean of parts", f"error of out, {share:.0%} of the softmax in one",
             f"{right:.0e}", f"{wrong:.0e}"]]

def show_bugs(rng):
    rows = no_rescaling(rng) + no_guard(rng) + mean_of_parts(rng)
    table(["bug", "measured", "correct", "with the bug"], *rows)
    return rows

# 9. The real world --------------------------------------------------------------------------------
# Figure 2 of Dao et al. 2022: attention of GPT-2 medium, forward and backward, on an A100. Assumed:
# 16-bit numbers, a multiprocessor's SRAM to a head, the largest tile past which flash can stream
# tiles of d rows, as in algorithm 1. Standard attention: N x N matrices moved forward as in section
# 2, backward for dv 1, dP 1, dS 3, dq 1, dk 1 (and N x d 8); mask and dropout 2 each, both ways.
FIGURE_2 = 1024, 64, 16 * 64, 192 * 1024, 40.3, 4.4      # N, d, heads x batch, bytes of SRAM; GB
LLAMA_31_8B = 131072, 32, 8, 128                         # context, heads, KV heads, head_dim

def show_real_world(bytes_each=2):
    """The paper's figure by the formulas verified above; the score matrix at 128k -> GB moved."""
    n, d, heads, sram, paper_standard, paper_flash = FIGURE_2
    flash = flash_traffic(n, n, d, flash_block(sram // bytes_each, d, d))
    flash += backward_traffic(n, n, d, backward_block(sram // bytes_each, d, d))
    standard = standard_traffic(n, n, d, n) + (7 + 8) * n * n + 8 * n * d
    flash, standard = (x * heads * bytes_each / 1e9 for x in (flash, standard))
    table([f"GB moved, GPT-2 medium, {heads:,} heads", "formula", "paper"],
          ["standard, each step a kernel", f"{standard:.1f}", paper_standard],
          ["flash", f"{flash:.1f}", paper_flash],
          ["standard / flash", f"{standard / flash:.1f}", f"{paper_standard / paper_flash:.1f}"])
    n, n_heads, n_kv_heads, head_dim = LLAMA_31_8B
    head = n * n * bytes_each / 1e9
    kept = n * (2 * (n_heads + n_kv_heads) * head_dim + n_heads) * bytes_each / 1e9
    print(f"\n  Llama-3.1-8B at {n:,} tokens, a layer: {n_heads} score matrices of {head:.1f} GB; "
          f"flash keeps {kept:.1f} GB.")
    return {"standard": standard, "flash": flash}

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
    section("2. Standard attention", show_standard, rng)
    section("3. The online softmax", show_online_softmax, rng)
    section("4. The tiled forward", show_tiled_forward, rng)
    limit = section("5. A limit on memory", show_limit, rng)
    backward = section("6. The backward pass", show_backward, rng)
    section("7. Merging", show_merging, rng)
    bugs = section("8. The bugs people ship", show_bugs, rng)
    gigabytes = section("9. The real world", show_real_world)
    return finish(started, limit=limit, backward=backward, bugs=bugs, real_world=gigabytes)

if __name__ == "__main__": run(main)
