"""The variants of attention differ in what they remember: all keys and values, fewer, or a digest.

Every position compares its query with the keys of the earlier ones and mixes their values to match.
A model that writes keeps all keys and values (the KV cache), which at long contexts outgrow its
weights. Each variant saves there and pays elsewhere; all are made here from one multi-head layer.

  Vaswani et al. 2017 (1706.03762) multi-head     Shazeer 2019 (1911.02150) multi-query, MQA
  Ainslie et al. 2023 (2305.13245) grouped, GQA   Jiang et al. 2023 (2310.06825) sliding window
  DeepSeek-AI 2024 (2405.04434) latent, MLA       Su et al. 2021 (2104.09864) rotary positions

  python microattention.py [--seed N]             needs only Python, takes a second

  1. Autograd              the referee: derivatives of everything, in fifty lines
  2. A single head         a soft look-up; its weights are its derivatives
  3. Multi-head attention  the arithmetic of one wide head, and a pattern for each head
  4. Multi-query (MQA)     one key/value head for all; each query head pulls at it
  5. Grouped-query (GQA)   one for each group; which head should stand for the group?
  6. Sliding window        how far back a stack of layers sees, measured by gradients
  7. Latent (MLA)          cache a compressed vector, and never decompress it
  8. Side by side          weights, arithmetic, cache and error of all of them
  9. The bugs people ship  no scale, a late mask, the wrong repeat, a window off by one
  10. The real world       the caches of real models, by the formula just verified
"""
import argparse, codecs, gc, os, random, sys, time
from collections import defaultdict
from copy import copy
from math import cos, exp, hypot, log, sin, sqrt
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

def vectors(rng, *shape):
    """An array of that shape, of independent Gaussians with variance 1."""
    return [vectors(rng, *shape[1:]) for _ in range(shape[0])] if shape else rng.gauss(0.0, 1.0)

def leaves(array): return list(map(leaves, array)) if type(array) is list else Value(array)
def gradient(values): return hypot(*(x.grad for x in values))
def mean(rows): return [sum(column) / len(rows) for column in zip(*rows)]

def show_autograd(layer, xs, rng, h=1e-5):
    """A derivative through a softmax by backward(), and by two evaluations."""
    def f(x): return softmax([x, x * x, 1.0 - x])[0]
    x = Value(rng.gauss(0.0, 1.0))
    f(x).backward()
    slope = (f(x.data + h) - f(x.data - h)) / (2.0 * h)
    print(f"  softmax(x, x², 1 - x): {x.grad:+.9f} by backward(), {slope:+.9f} by differences")
    check("backward() gives the slope of the function", abs(x.grad - slope) < 1e-8)

# 2. A single head ---------------------------------------------------------------------------------
# A look-up in a dictionary, made soft: a position states a query, every position offers a key, and
# the softmax of their dot products says how much of each value to take. Products of d numbers of
# variance 1 add up to variance d, hence 1/√d. Causal: no position sees a later one.
def repeat_heads(heads, n):
    """Each head n times in a row (torch: repeat_interleave): [a, b] -> [a, a, b, b]."""
    return [head for head in heads for _ in range(n)]

def patterns(queries, keys, causal=True, window=None, scale=None):
    """-> [n_heads][n_queries] of (range of keys seen, their weights); for the last queries."""
    scale, found = scale or len(queries[0][0]) ** -0.5, []
    for head, k in zip(queries, repeat_heads(keys, len(queries) // len(keys))):
        rows = []
        for position, query in enumerate(head, len(k) - len(head)):
            stop, q = position + 1 if causal else len(k), [x * scale for x in query]
            seen = range(max(0, stop - window) if window else 0, stop)
            rows.append((seen, softmax([dot(q, k[j]) for j in seen])))
            COUNT["scores"] += len(seen)
        found.append(rows)
    return found

def mix(heads, values):
    """The values seen, in proportion to their weights -> [n_heads][n_queries][value width]."""
    return [[[dot(weights, column) for column in zip(*v[seen.start:seen.stop])]
             for seen, weights in rows]
            for rows, v in zip(heads, repeat_heads(values, len(heads) // len(values)))]

def attention(queries, keys, values, causal=True, window=None):
    """Softmax attention. Vaswani et al. 2017, equation 1; shared heads as in Ainslie et al. 2023.
    queries [n_heads][seq_len][head_dim], keys and values [n_kv_heads][seq_len][head_dim], Values or
    floats -> [n_heads][seq_len][head_dim]; values and output may have another width. Query head h
    uses kv head h // (n_heads / n_kv_heads). causal: position i sees 0..i; window: i-window+1..i.
    ValueError: empty, ragged or unequal shapes; a window < 1 or without causal."""
    shapes = [{(len(heads), len(head), len(vector)) for head in heads for vector in head or [()]}
              for heads in (queries, keys, values)]
    if not all(len(shape) == 1 and 0 not in min(shape) for shape in shapes): raise ValueError(
        f"empty or ragged: (heads, length, width) of queries, keys, values: {shapes}")
    (n_heads, *size), (n_kv_heads, *kv_size), value_shape = (min(shape) for shape in shapes)
    if n_heads % n_kv_heads: raise ValueError(f"{n_heads} heads: not a multiple of {n_kv_heads}")
    if size != kv_size or (n_kv_heads, size[0]) != value_shape[:2]: raise ValueError(
        f"(heads, length, width) of queries, keys, values do not fit: {shapes}")
    if window is not None and not (isinstance(window, int) and window >= 1 and causal):
        raise ValueError(f"window {window}, causal {causal}: must be an integer >= 1, and causal")
    return mix(patterns(queries, keys, causal, window), values)

def show_single_head(layer, xs, rng, n=6, i=4):
    """One position looks things up: the derivatives of what it gets, by what each position has."""
    q, k, v = vectors(rng, 3, 1, n, 8)
    weights, values = patterns(q, k)[0][i][1] + [0.0] * (n - i - 1), leaves(v)
    attention(q, k, values)[0][i][0].backward()
    slopes = [value[0].grad for value in values[0]]
    print(f"  d output / d value by autograd, output of position {i}, values of:")
    bars([(f"position {j}, query · key {dot(q[0][i], k[0][j]):+.2f}", slopes[j]) for j in range(n)])
    check("d output / d value = weight of the value; 0 for the future", slopes == weights)

# 3. Multi-head attention --------------------------------------------------------------------------
# One softmax makes one choice, so a layer has n_heads heads: as many patterns, for the arithmetic
# of one. A head knows no order: the last rope_dim numbers of queries and keys are rotated in
# proportion to their position (RoPE), as in GPT-J; section 7 needs the others as they are.
def cut(sequence, n):
    """-> the n equal parts of a sequence."""
    size = len(sequence) // n
    return [sequence[start:start + size] for start in range(0, n * size, size)]

def rotate(vector, position, rope_dim, base=10000.0):
    """The last rope_dim numbers of a vector turned in pairs of neighbours. Su et al. 2021."""
    still = len(vector) - rope_dim
    turned = vector[:still]
    for i in range(0, rope_dim, 2):
        angle, pair = position * base ** (-i / rope_dim), vector[still + i:still + i + 2]
        turned += [dot(pair, [cos(angle), -sin(angle)]), dot(pair, [sin(angle), cos(angle)])]
    return turned

def project(xs, weight, n_heads, position=0, rope_dim=0):
    """xs [n][d_model] -> [n_heads][n][head_dim], rotated, the first of them at `position`."""
    rows = [[rotate(head, position + i, rope_dim) for head in cut(row, n_heads)]
            for i, row in enumerate(linear(xs, weight))]
    return list(map(list, zip(*rows)))

def kv_bytes_per_token(n_layers, n_kv_heads, key_dim, value_dim, bytes_per_number=2):
    """What one token adds to the cache: a key and a value per layer and kv head."""
    return n_layers * n_kv_heads * (key_dim + value_dim) * bytes_per_number

class Layer:
    """Attention over d_model numbers a position: MHA, GQA, MQA, each with a window or without.
    weights: "query", "key", "value" [heads head_dim][d_model], "out" [d_model][n_heads head_dim]; a
    cache is a list of (key, value), one pair for each position, over all kv heads."""
    def __init__(self, n_heads, n_kv_heads, rope_dim, weights, window=None):
        self.n_heads, self.n_kv_heads, self.rope_dim = n_heads, n_kv_heads, rope_dim
        self.weights, self.window, self.head_dim = weights, window, len(weights["query"]) // n_heads
    def run(self, xs, cache, position=0):
        """The next positions of a sequence: xs [n][d_model] -> [n][d_model]; the cache grows."""
        queries = project(xs, self.weights["query"], self.n_heads, position, self.rope_dim)
        cache += zip(*self.remember(xs, position))
        COUNT["cached"] += sum(len(vector) for entry in cache[-len(xs):] for vector in entry)
        mixed = self.look(queries, *zip(*cache))
        if self.window: del cache[:-self.window]         # no later position will see more
        return linear([sum(heads, []) for heads in zip(*mixed)], self.weights["out"])
    def remember(self, xs, position):
        """What to cache of xs -> two lists [n] of vectors: the keys, and the values."""
        keys = project(xs, self.weights["key"], self.n_kv_heads, position, self.rope_dim)
        return [sum(heads, []) for heads in zip(*keys)], linear(xs, self.weights["value"])
    def look(self, queries, *cached):
        """queries [n_heads][n][head_dim], all that is cached -> [n_heads][n][width]."""
        keys, values = (list(zip(*(cut(row, self.n_kv_heads) for row in rows))) for rows in cached)
        return mix(patterns(queries, keys, window=self.window), values)
    # The formulas. pair_cost(): to score a (query, key) pair and to mix its value.
    def kv_bytes(self): return kv_bytes_per_token(1, self.n_kv_heads, self.head_dim, self.head_dim)
    def pair_cost(self): return 2 * self.head_dim
    def n_weights(self): return sum(len(rows) * len(rows[0]) for rows in self.weights.values())
    def n_scores(self, n, past=0):
        return self.n_heads * sum(min(self.window or i, i) for i in range(past + 1, past + n + 1))
    def multiply_adds(self, n, past=0):
        """Of n positions after `past` others: all weights, 4 for a rotated pair, the scores."""
        rotations = 2 * self.rope_dim * (self.n_heads + self.n_kv_heads)
        return n * (self.n_weights() + rotations) + self.n_scores(n, past) * self.pair_cost()

def random_layer(rng, d_model=32, n_heads=8, window=None):
    """MHA whose queries, keys and values have variance 1 if its inputs have."""
    def matrix(n): return [[x / sqrt(n) for x in row] for row in vectors(rng, n, n)]
    weights = {name: matrix(d_model) for name in ("query", "key", "value", "out")}
    return Layer(n_heads, n_heads, d_model // n_heads // 4 * 2, weights, window)

def changed(layer, **attributes):
    """A copy of the layer that differs in these attributes."""
    twin = copy(layer)
    vars(twin).update(attributes)
    return twin

def distance(rows, reference):
    """|rows - reference| / |reference|, over all numbers of two matrices."""
    differences = (x - y for a, b in zip(rows, reference) for x, y in zip(a, b))
    return hypot(*differences) / hypot(*sum(reference, []))

def show_multi_head(layer, xs, rng):
    """Patterns of four heads: a row for each query, a column for each key that it sees."""
    queries, keys = (project(xs, layer.weights[name], layer.n_heads, 0, layer.rope_dim)
                     for name in ("query", "key"))
    columns = [[f"head {h}"] + ["".join(2 * "░▒▓█"[min(3, int(8 * w))] for w in weights)
                                for _, weights in rows]
               for h, rows in enumerate(patterns(queries, keys)[:4])]
    for row in zip(*columns):
        print("  " + "".join(f"{cell:<{2 * len(xs) + 3}}" for cell in row).rstrip())
    print("  Rows are queries, columns keys; weights up to 1/8 ░, 1/4 ▒, 3/8 ▓, 1 █")

# 4. Multi-query (MQA) -----------------------------------------------------------------------------
# To write one token, a model reads its whole cache. Shazeer's remedy: many query heads, but one key
# head and one value head for all, a cache n_heads times smaller. By the chain rule the gradient of
# a shared head is the sum of what every query head asks of it.
def show_mqa(layer, xs, rng, n=6):
    """What each query head asks of a key head that all share, and what the key head gets."""
    (q, k, v), gradients = (vectors(rng, heads, 8, 4) for heads in (n, 1, 1)), []
    for copies in 1, n:                      # one kv head for all, and a copy for each query head
        kv = [leaves(repeat_heads(heads, copies)) for heads in (k, v)]
        outputs = sum(sum(attention(q, *kv), []), [])
        dot(outputs, outputs).backward()     # a loss, for want of a task: Σ output²
        gradients.append([[x.grad for x in sum(head, [])] for heads in kv for head in heads])
    shared, own = gradients
    print("  size of the gradient in the keys: from each query head, and of the shared key head")
    bars([(f"head {h}", hypot(*own[h])) for h in range(n)] + [("shared", hypot(*shared[0]))])
    error = distance(shared, [[sum(column) for column in zip(*part)] for part in cut(own, 2)])
    check("gradient of a shared kv head = sum over its query heads", error < 1e-12, f"{error:.0e}")

# 5. Grouped-query (GQA) ---------------------------------------------------------------------------
# A kv head for each group of query heads: between MHA and MQA. Trained MHA models are converted, a
# group's new head being the mean of its old ones, and trained for a little longer. Why the mean?
# It is nearest to all of them: with w = mean + e_i, Σ|w_i - x|² = Σ|e_i|² + n |mean - x|².
def share_heads(layer, n_kv_heads, pool=True):
    """MHA to GQA or MQA: a group's kv head is their mean, or the first. Ainslie et al. 2023."""
    def merged(weight):
        groups = cut(cut(weight, layer.n_heads), n_kv_heads)
        return [mean(rows) if pool else rows[0] for group in groups for rows in zip(*group)]
    weights = layer.weights | {name: merged(layer.weights[name]) for name in ("key", "value")}
    return changed(layer, n_kv_heads=n_kv_heads, weights=weights)

def show_gqa(layer, xs, rng, n_layers=24):
    """The identities; random layers with merged heads -> [(error by mean, by first of group)]."""
    same, errors = share_heads(layer, layer.n_heads).run(xs, []) == layer.run(xs, []), []
    for heads in 1, 2, 4:
        q, k, v = (vectors(rng, n, 8, 4) for n in (8, heads, heads))
        copies = ([x[h * heads // 8] for h in range(8)] for x in (k, v))   # one per query head
        same &= attention(q, *copies) == attention(q, k, v) == attention(q, k, v, window=8)
    check("MQA, GQA = MHA with kv heads repeated; GQA with all = MHA; window of all = none", same)
    for _ in range(n_layers):
        small, inputs = random_layer(rng, 16, 4), vectors(rng, 6, 16)
        reference = small.run(inputs, [])
        errors.append([distance(share_heads(small, 2, pool).run(inputs, []), reference)
                       for pool in (True, False)])
    print(f"  output error of {n_layers} random layers with 4 kv heads merged to 2")
    bars(list(zip(("mean of each group", "first of each group"), mean(errors))))
    print(f"  The mean is nearer in {sum(a < b for a, b in errors)} of {n_layers} layers.")
    return errors

# 6. Sliding window --------------------------------------------------------------------------------
# A position sees the last `window` positions, itself included, so the cache stops growing. The past
# is not lost at once: what a layer below saw is in its outputs, and L layers reach back over
# L (window - 1) + 1 positions. How much arrives from that far is another question: last column.
def reach(layers, xs):
    """Size of d (last output) / d (input j). Norms and MLPs would add nothing: no mixing there."""
    inputs = rows = leaves(xs)
    for layer in layers:
        rows = [[x + y for x, y in zip(*pair)] for pair in zip(rows, layer.run(rows, []))]
    dot(rows[-1], [1.0] * len(rows[-1])).backward()
    return list(map(gradient, inputs))

def show_window(layer, xs, rng, window=4, depth=4):
    """The reach of a stack of layers; decoding with a cache that forgets -> the reaches."""
    stack, inputs = [random_layer(rng, 8, 2, window) for _ in range(depth)], vectors(rng, 18, 8)
    rows, exact = [], True
    for n in range(1, depth + 1):
        sizes, formula = reach(stack[:n], inputs), n * (window - 1) + 1
        seen = "".join("·█"[size > 0.0] for size in sizes)
        exact &= seen.lstrip("·") == "█" * formula
        rows.append([f"{n}", seen, seen.count("█"), formula, f"{sizes[-formula] / sizes[-1]:.4f}"])
    table(["layers", "inputs with a gradient", "reach", "formula", "oldest / newest"], *rows)
    check("L window layers see exactly the last L (window - 1) + 1 positions", exact)
    short, cache = changed(layer, window=window), []
    check(f"decoding with a cache of {window} positions = all at once, bit for bit",
          [short.run([x], cache, i)[0] for i, x in enumerate(xs)] == short.run(xs, []))
    return [row[2] for row in rows]

# 7. Latent (MLA) ----------------------------------------------------------------------------------
# Cache neither keys nor values but c = down x, of `rank` numbers, from which every head's key U c
# and value V c are projected up. And these need not ever be computed: since
#   q · (U c) = (Uᵀ q) · c     and     Σ weight_j V c_j = V Σ weight_j c_j,
# the up-projections move to the query and to the output ("absorbed"), and attention runs on the
# cache: MQA with one wide kv head whose value is a part of its key. RoPE would rotate between q and
# U, so it gets numbers of its own ("decoupled"): some of each query, and one rotated key for all
# heads, cached beside c. (DeepSeek also compresses the queries, and normalises c.)
class MLA(Layer):
    """Multi-head latent attention. DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.
    weights: "query", "out" as ever, "down" [rank][d_model], "rope" [rope_dim][d_model], "up_key"
    [n_heads (head_dim - rope_dim)][rank], "up_value" [n_heads value_dim][rank]."""
    absorbed = True
    def remember(self, xs, position):
        (rope,) = project(xs, self.weights["rope"], 1, position, self.rope_dim)
        return linear(xs, self.weights["down"]), rope
    def look(self, queries, latents, ropes):
        n, up_key, up_value = self.n_heads, self.weights["up_key"], self.weights["up_value"]
        def with_ropes(rows): return [row + rope for row, rope in zip(rows, ropes)]
        if not self.absorbed:
            keys = [with_ropes(head) for head in project(latents, up_key, n)]
            return mix(patterns(queries, keys), project(latents, up_value, n))
        still, wide = self.head_dim - self.rope_dim, []
        for head, up in zip(queries, cut(up_key, n)):
            asked = linear([query[:still] for query in head], list(zip(*up)))
            wide.append([a + query[still:] for a, query in zip(asked, head)])
        found = patterns(wide, [with_ropes(latents)], scale=self.head_dim ** -0.5)
        return [linear(head, up) for head, up in zip(mix(found, [latents]), cut(up_value, n))]
    def rank(self): return len(self.weights["down"])
    def kv_bytes(self): return kv_bytes_per_token(1, 1, self.rank() + self.rope_dim, 0)
    def pair_cost(self):
        if self.absorbed: return 2 * self.rank() + self.rope_dim
        return self.head_dim + len(self.weights["up_value"]) // self.n_heads
    def multiply_adds(self, n, past=0):
        ups = self.rank() * (len(self.weights["up_key"]) + len(self.weights["up_value"]))
        return super().multiply_adds(n, past) + (0 if self.absorbed else past * ups)

def main_directions(matrix, rank):
    """Orthonormal rows, the longest remainder first: QR with pivoting. (The SVD loses less.)"""
    basis = []
    for _ in range(rank):
        longest = max(matrix, key=lambda row: hypot(*row))
        basis.append([x / hypot(*longest) for x in longest])
        matrix = [[x - dot(row, basis[-1]) * b for x, b in zip(row, basis[-1])] for row in matrix]
    return basis

def to_mla(layer, rank):
    """MHA to MLA: one rotated key, the heads' mean; the rest projected on `rank` directions."""
    still, w = layer.head_dim - layer.rope_dim, layer.weights
    heads = cut(w["key"], layer.n_heads)
    keys, rope = [row for head in heads for row in head[:still]], [head[still:] for head in heads]
    down = main_directions(keys + w["value"], rank)
    return MLA(layer.n_heads, 1, layer.rope_dim, {
        "query": w["query"], "down": down, "rope": list(map(mean, zip(*rope))), "out": w["out"],
        "up_key": linear(keys, down), "up_value": linear(w["value"], down)})

def show_mla(layer, xs, rng, rank=16):
    """Both ways to compute MLA; what a decoding step costs -> {way: [(cached, multiply-adds)]}."""
    latent, curves, equal = to_mla(layer, rank), {}, True
    naive = changed(latent, absorbed=False)
    error = distance(naive.run(xs, []), latent.run(xs, []))
    check("MLA absorbed = decompressed", error < 1e-10, f"{error:.0e}")
    for name, kind in ("MHA", layer), ("MLA decompressed", naive), ("MLA absorbed", latent):
        for n in range(1, 130, 16):
            cache = list(zip(*kind.remember(vectors(rng, n, len(xs[0])), 0)))
            COUNT.clear()
            kind.run(xs[:1], cache, n)
            curves.setdefault(name, []).append((n, COUNT["multiply-adds"]))
            equal &= COUNT["multiply-adds"] == kind.multiply_adds(1, n)
    plot("multiply-adds of the next token (log), counted, over positions in the cache", curves,
         log_y=True, height=9)
    check("multiply-adds of a decoding step counted = formula, MHA and MLA", equal)
    return curves

# 8. Side by side ----------------------------------------------------------------------------------
# All are made from one MHA layer, untrained. Its heads have nothing in common: a hard case.
def show_variants(layer, xs, rng, window=4, rank=16):
    """The table of all variants -> its rows."""
    reference, n, rows, equal = layer.run(xs, []), len(xs), [], True
    latent, short = to_mla(layer, rank), changed(layer, window=window)
    for name, kind in {"one wide head": Layer(1, 1, layer.rope_dim, layer.weights), "MHA": layer,
                       **{f"GQA, {n} kv heads": share_heads(layer, n) for n in (4, 2)},
                       "MQA": share_heads(layer, 1), f"window {window}": short,
                       f"MLA, rank {rank}": latent,
                       "MLA decompressed": changed(latent, absorbed=False)}.items():
        cache = []
        COUNT.clear()
        error = distance(kind.run(xs, cache), reference)
        pairs = [COUNT["multiply-adds"], kind.multiply_adds(n), 2 * COUNT["cached"] // n,
                 kind.kv_bytes(), COUNT["scores"], kind.n_scores(n)]
        equal &= pairs[::2] == pairs[1::2]
        rows.append([name, kind.n_weights(), *pairs[:5], len(cache), error])
    table([f"{n} positions", "weights", "multiply-adds", "formula", "KV B/token", "formula",
           "scores", "kept", "error"], *([*row[:-1], f"{row[-1]:.2f}"] for row in rows))
    check("multiply-adds, KV bytes and scores counted = formulas, all variants", equal)
    return rows

# 9. The bugs people ship --------------------------------------------------------------------------
def future_gradient(rng, late_mask, n=8, i=4):
    """Size of d output i / d later keys and values: a late mask leaves them in the denominator."""
    q, keys, values = vectors(rng, 1, n, 4), *leaves(vectors(rng, 2, 1, n, 4))
    weights = patterns(q, keys, causal=not late_mask)[0][i][1][:i + 1]
    dot(mix([[(range(i + 1), weights)]], values)[0][0], [1.0] * 4).backward()
    return hypot(*(gradient(row) for row in keys[0][i + 1:] + values[0][i + 1:]))

def show_bugs(layer, xs, rng, window=4, n=40):
    """Each mistake beside the correct version, by the symptom that gives it away."""
    sharp, wrong, sharper = {}, {}, True
    for d in 4, 16, 64, 256:
        runs = []
        for products in linear(vectors(rng, n, d), vectors(rng, 32, d)):
            run = []
            for scale in d ** -0.5, 1.0:
                scores = leaves([x * scale for x in products])
                weights = softmax(scores)
                dot(weights, vectors(rng, 32)).backward()
                run += [-sum(p * log(p) for p in floats(weights) if p), gradient(scores)]
            runs.append(run)
        sharper, sharp[d] = sharper and all(run[2] <= run[0] + 1e-9 for run in runs), mean(runs)
    table(["without 1/√head_dim", "right: entropy", "gradient", "wrong: entropy", "gradient"],
          *([f"head_dim {d}", *(f"{x:.3f}" for x in row)] for d, row in sharp.items()))
    check("without the scale, every softmax is sharper", sharper)       # d entropy / d scale <= 0
    leaks = [future_gradient(rng, late) for late in (False, True)]
    check("no gradient from the future; with a late mask, there is", leaks[0] == 0.0 < leaks[1])
    for heads in 1, 2, 4, 8:
        q, k, v = (vectors(rng, n, 8, 4) for n in (8, heads, heads))
        right, bug = attention(q, k, v), attention(q, k * (8 // heads), v * (8 // heads))
        wrong[heads] = distance(sum(bug, []), sum(right, []))
    check("repeat for repeat_interleave: wrong in GQA, right in MQA and MHA",
          wrong[1] == wrong[8] == 0.0 < min(wrong[2], wrong[4]))
    right, bug = (changed(layer, window=w).run(xs, []) for w in (window, window + 1))
    differs = [i for i, (a, b) in enumerate(zip(right, bug)) if a != b]
    check("a window one too wide: wrong once it is full", differs == list(range(window, len(xs))))
    print()
    table(["mistake", "symptom", "right", "wrong"],
          ["mask after the softmax", "gradient from the future", *(f"{x:.3f}" for x in leaks)],
          *(["repeat for repeat_interleave", f"output error, {heads} kv heads for 8", "0.000",
             f"{error:.3f}"] for heads, error in wrong.items()),
          [f"window {window + 1} for {window}", "first position that differs", "none", differs[0]])
    return {"sharpness": sharp, "leaks": leaks, "repeat": wrong, "differs": differs}

# 10. The real world -------------------------------------------------------------------------------
# Public config files: layers, (kv heads, width of a key, of a value) as cached, the same if every
# query head had its own, window, weights. MLA's one kv head is 512 + 64 wide, its value within.
MODELS = {"GPT-3 (MHA)": (96, (96, 128, 128), (96, 128, 128), None, 175e9),
          "Llama-2-7B (MHA)": (32, (32, 128, 128), (32, 128, 128), None, 6.74e9),
          "Llama-2-70B (GQA)": (80, (8, 128, 128), (64, 128, 128), None, 69e9),
          "Mistral-7B (GQA)": (32, (8, 128, 128), (32, 128, 128), 4096, 7.24e9),
          "Falcon-7B (MQA)": (32, (1, 64, 64), (71, 64, 64), None, 7e9),
          "DeepSeek-V3 (MLA)": (61, (1, 512 + 64, 0), (128, 128 + 64, 128), None, 671e9)}

def show_real_world(layer, xs, rng, memory=80e9):
    """Caches in 16 bits as if every model ran at these contexts -> the table."""
    rows = []
    for name, (n_layers, cached, full, window, weights) in MODELS.items():
        size, mha = (kv_bytes_per_token(n_layers, *shape) for shape in (cached, full))
        caches = [size * min(context, window or context) for context in (131072, 4096)]
        users = [int((memory - 2 * weights) // cache) if 2 * weights < memory else "no room"
                 for cache in caches]
        rows.append([name, f"{size / 1024:,.1f} KiB", f"{mha / size:.0f}x",
                     f"{caches[0] / 1e9:.2f} GB", f"{2 * weights / 1e9:,.0f} GB", *users])
    table(["KV cache in 16 bits", "per token", "as MHA", "at 128k", "weights",
           f"on {memory / 1e9:.0f} GB: users of 128k", "of 4k"], *rows)
    return rows

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
    """Run all sections -> the measurements, under the names of the functions that show them."""
    started, rng, results = begin(), random.Random(seed), {}
    layer, xs = random_layer(rng), vectors(rng, 10, 32)
    shows = {"1. Autograd": show_autograd, "2. A single head": show_single_head,
             "3. Multi-head attention": show_multi_head, "4. Multi-query (MQA)": show_mqa,
             "5. Grouped-query (GQA)": show_gqa, "6. Sliding window": show_window,
             "7. Latent (MLA)": show_mla, "8. Side by side": show_variants,
             "9. The bugs people ship": show_bugs, "10. The real world": show_real_world}
    for title, show in shows.items():
        results[show.__name__.removeprefix("show_")] = section(title, show, layer, xs, rng)
    return finish(started, **results)

if __name__ == "__main__": run(main)
