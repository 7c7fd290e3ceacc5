"""The variants of attention differ in what they remember: all keys and values, fewer, or a digest.

Every position of a text compares its query with the keys of the earlier ones and mixes their values
to match. A model that writes keeps all keys and values (the KV cache), and at long contexts they
outgrow its weights. Each variant saves there and pays elsewhere; all are made here from one layer.

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
from collections import defaultdict, namedtuple
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

def vectors(rng, *sizes, spread=1.0):
    """An array of these sizes, of independent Gaussians with that standard deviation."""
    if not sizes: return rng.gauss(0.0, spread)
    return [vectors(rng, *sizes[1:], spread=spread) for _ in range(sizes[0])]

# Arrays are nested lists. Heads are [n_heads][n][width], and joined, [n][n_heads width].
def leaves(array): return list(map(leaves, array)) if type(array) is list else Value(array)
def numbers(array): return sum(map(numbers, array), []) if type(array) is list else [array]
def join_heads(heads): return [sum(parts, []) for parts in zip(*heads)]
def one_hot(n): return [[float(i == j) for j in range(n)] for i in range(n)]
def mean(rows): return [sum(column) / len(rows) for column in zip(*rows)]
def gradient_size(array): return hypot(*(x.grad for x in numbers(array)))

def show_autograd(rng, h=1e-5):
    """A derivative through a softmax by backward(), and by two evaluations."""
    def f(x): return softmax([x, x * x, 1.0 - x])[0]
    x = Value(rng.gauss(0.0, 1.0))
    f(x).backward()
    slope = (f(x.data + h) - f(x.data - h)) / (2.0 * h)
    print(f"  slope of a softmax: {x.grad:+.9f} by backward(), {slope:+.9f} by differences")
    check("backward() gives the slope of the function", abs(x.grad - slope) < 1e-8)

# 2. A single head ---------------------------------------------------------------------------------
# A look-up in a dictionary, made soft. Each position has three vectors: a query, what it looks for;
# a key, what it is found by; a value, what it has to give. The dot products of a query with the
# keys are its scores; their softmax says how much of each value to take. Causal: a position sees
# itself and earlier ones. Dot products over d numbers of variance 1 have variance d: hence 1/√d.
def attend(queries, keys, values, causal=True, window=None, scale=None):
    """attention() unchecked. The queries may be those of the last positions only."""
    scale = scale or len(keys[0][0]) ** -0.5
    outputs = []
    for h, head in enumerate(queries):
        kv_head = h * len(keys) // len(queries)
        head_keys, head_values = keys[kv_head], values[kv_head]
        outputs.append([])
        for position, query in enumerate(head, len(head_keys) - len(head)):
            end = position + 1 if causal else len(head_keys)
            start = max(0, end - window) if window else 0
            weights = softmax([dot(query, key) * scale for key in head_keys[start:end]])
            COUNT["scores"] += len(weights)
            outputs[-1].append([dot(weights, column) for column in zip(*head_values[start:end])])
    return outputs

def shape(heads):
    """(number of heads, length, width) of three levels of lists."""
    lengths = {len(head) for head in heads}
    widths = {len(vector) for head in heads for vector in head}
    if len(lengths) != 1 or len(widths) != 1 or 0 in widths: raise ValueError(
        f"empty or ragged: {len(heads)} heads, lengths {list(lengths)}, widths {list(widths)}")
    return len(heads), min(lengths), min(widths)

def attention(queries, keys, values, causal=True, window=None):
    """Softmax attention. Vaswani et al. 2017, equation 1; shared heads as in Ainslie et al. 2023.
    queries [n_heads][seq_len][head_dim], keys and values [n_kv_heads][seq_len][head_dim], Values or
    floats -> [n_heads][seq_len][head_dim]; values and output may have another width. Query head h
    uses kv head h // (n_heads / n_kv_heads). causal: position i sees 0..i; window: i-window+1..i.
    ValueError: empty, ragged or unequal shapes; a window < 1 or without causal."""
    q, k, v = shape(queries), shape(keys), shape(values)
    if q[0] % k[0]: raise ValueError(f"{q[0]} heads: not a multiple of {k[0]}")
    if q[1:] != k[1:] or k[:2] != v[:2]: raise ValueError(
        f"(heads, length, width) do not fit: queries {q}, keys {k}, values {v}")
    if window is not None and not (causal and isinstance(window, int) and window >= 1):
        raise ValueError(f"window {window}, causal {causal}: must be an integer >= 1, and causal")
    return attend(queries, keys, values, causal, window)

def patterns(queries, keys, causal=True):
    """The weights themselves, [n_heads][n][n]: what attention gives for values that are one-hot."""
    return attention(queries, keys, [one_hot(len(keys[0]))] * len(keys), causal)

def show_single_head(rng, n=6, position=4):
    queries, keys, values = vectors(rng, 3, 1, n, 8)
    values = leaves(values)
    attention(queries, keys, values)[0][position][0].backward()
    slopes = [value[0].grad for value in values[0]]
    print(f"  what position {position} of {n} takes from each: d output / d value by autograd")
    bars([(f"position {j}", slope) for j, slope in enumerate(slopes)])
    check("d output / d value = its weight, or 0", slopes == patterns(queries, keys)[0][position])

# 3. Multi-head attention --------------------------------------------------------------------------
# One softmax makes one choice. So a layer has n_heads heads, each with its share of the numbers: as
# many patterns, for the weights and the arithmetic of one wide head. A head knows no order, so the
# last rope_dim numbers of its queries and keys are rotated by their position (RoPE, see microrope).
def rotate(vector, position, rope_dim, base=10000.0):
    """The last rope_dim numbers of a vector turned in pairs of neighbours. Su et al. 2021."""
    turned = vector[:len(vector) - rope_dim]
    for i in range(0, rope_dim, 2):
        angle = position * base ** (-i / rope_dim)
        x, y = vector[len(turned):len(turned) + 2]
        turned += [x * cos(angle) - y * sin(angle), x * sin(angle) + y * cos(angle)]
    return turned

class Layer(namedtuple("Layer", "rope_dim weights window", defaults=[None])):
    """Attention over vectors of d_model numbers: MHA, GQA or MQA, with a window or without.
    weights: "query", "key", "value" [heads][head_dim][d_model]; "out" [d_model][heads head_dim]."""
    def project(self, name, xs):
        """Heads of a weight times xs [n][d_model] -> [heads][n][width]; RoPE where it belongs."""
        rope_dim = self.rope_dim if name in ("query", "key", "rope") else 0
        heads = [linear(xs, head) for head in self.weights[name]]
        return [[rotate(x, i, rope_dim) for i, x in enumerate(head)] for head in heads]

    def remember(self, xs):
        """What a cache holds of xs: keys and values, [n_kv_heads][n][head_dim] each."""
        return [self.project("key", xs), self.project("value", xs)]

    def look(self, queries, keys, values):
        """queries [n_heads][n][head_dim], of the last n positions -> [n_heads][n][width]."""
        return attend(queries, keys, values, window=self.window)

    def run(self, xs):
        """A text of n positions: xs [n][d_model] -> [n][d_model]."""
        cached = self.remember(xs)
        COUNT["cached"] += len(numbers(cached))
        heads = self.look(self.project("query", xs), *cached)
        return linear(join_heads(heads), self.weights["out"])

    # For the formulas. A score costs a multiply-add for each number of its key, and of its value.
    def head_dim(self): return len(self.weights["query"][0])
    def score_cost(self): return 2 * self.head_dim()
    def cache_shape(self): return len(self.weights["key"]), self.head_dim(), self.head_dim()

def random_layer(rng, d_model=32, n_heads=8, window=None):
    """MHA whose queries, keys and values have variance 1 if its inputs have."""
    head_dim, spread = d_model // n_heads, d_model ** -0.5
    weights = {name: vectors(rng, n_heads, head_dim, d_model, spread=spread)
               for name in ("query", "key", "value")}
    weights["out"] = vectors(rng, d_model, d_model, spread=spread)
    return Layer(head_dim // 4 * 2, weights, window)     # half of a head is rotated

def show_multi_head(layer, xs, n_shown=4):
    queries, keys = layer.project("query", xs), layer.project("key", xs)
    rows = [[] for _ in xs]
    for head in patterns(queries, keys)[:n_shown]:
        for row, weights in zip(rows, head): row += [min(w, 0.5) for w in weights] + [0.0, 0.0]
    print(f"  weights of {n_shown} heads: queries down, keys across; blank below 1/16, █ from 7/16")
    heatmap(rows, 0.0, 0.5)

# 4. Multi-query (MQA) -----------------------------------------------------------------------------
# To write one token, a model reads its whole cache. Shazeer's remedy: many query heads, but one key
# head and one value head for all, a cache n_heads times smaller. By the chain rule the gradient of
# a shared head is the sum of what every query head asks of it.
def distance(array, reference):
    """|array - reference| / |reference|, over all numbers."""
    differences = [x - y for x, y in zip(numbers(array), numbers(reference))]
    return hypot(*differences) / hypot(*numbers(reference))

def show_mqa(rng, n_heads=6):
    """The gradient of one kv head for all query heads, and of a copy for each."""
    queries = vectors(rng, n_heads, 8, 4)
    keys, values = vectors(rng, 2, 1, 8, 4)
    gradients = []
    for n_copies in (1, n_heads):
        heads = leaves(keys * n_copies + values * n_copies)
        outputs = numbers(attention(queries, heads[:n_copies], heads[n_copies:]))
        dot(outputs, outputs).backward()                 # a loss, for want of a task: Σ output²
        gradients.append([[x.grad for x in numbers(head)] for head in heads])
    shared, own = gradients
    print("  size of the gradient in the keys: from each query head, and of the shared key head")
    bars([(f"head {h}", hypot(*own[h])) for h in range(n_heads)] + [("shared", hypot(*shared[0]))])
    sums = [[sum(column) for column in zip(*copies)] for copies in (own[:n_heads], own[n_heads:])]
    error = distance(shared, sums)
    check("gradient of a shared kv head = sum over its query heads", error < 1e-12, f"{error:.0e}")

# 5. Grouped-query (GQA) ---------------------------------------------------------------------------
# A kv head for each group of query heads. Trained MHA models are converted: a group's new head is
# the mean of its old ones, and is trained for a little longer. The mean is nearest to all of them:
# with w_i = mean + e_i and Σ e_i = 0, Σ|w_i - x|² = Σ|e_i|² + n |mean - x|².
def share_heads(layer, n_kv_heads, pool=True):
    """MHA to GQA or MQA: a group's kv head is their mean, or the first. Ainslie et al. 2023."""
    def merged(group): return [mean(rows) for rows in zip(*group)] if pool else group[0]
    weights = dict(layer.weights)
    size = len(weights["key"]) // n_kv_heads
    for name in ("key", "value"):
        heads = weights[name]
        weights[name] = [merged(heads[i * size:(i + 1) * size]) for i in range(n_kv_heads)]
    return layer._replace(weights=weights)

def show_gqa(layer, xs, rng, n_layers=24):
    """Random layers with merged heads -> [(error by mean, by first of group)]."""
    errors = []
    for _ in range(n_layers):
        small, inputs = random_layer(rng, 16, 4), vectors(rng, 6, 16)
        errors.append([distance(share_heads(small, 2, pool).run(inputs), small.run(inputs))
                       for pool in (True, False)])
    print(f"  error |output - MHA's| / |MHA's|, mean of {n_layers} random layers, 4 kv heads to 2")
    bars(list(zip(("mean of the group", "first of the group"), mean(errors))))
    check("GQA with a kv head for every head = MHA", share_heads(layer, 8).run(xs) == layer.run(xs))
    return errors

# 6. Sliding window --------------------------------------------------------------------------------
# A position sees the last `window` positions, itself included; older ones need not be cached. But
# the past is not lost at once: what a layer below saw is in its outputs, and L layers reach back
# over L (window - 1) + 1 positions. (Norms, MLPs and residual connections mix no positions.)
def reach(layers, xs):
    """Size of d (last output) / d (input j) through all layers, for each j."""
    inputs = rows = leaves(xs)
    for layer in layers: rows = layer.run(rows)
    dot(rows[-1], [1.0] * len(rows[-1])).backward()
    return list(map(gradient_size, inputs))

def show_window(layer, xs, rng, window=4, depth=4, n=18):
    stack = [random_layer(rng, 8, 2, window) for _ in range(depth)]
    inputs = vectors(rng, n, 8)
    rows, exact = [], True
    for n_layers in range(1, depth + 1):
        formula = n_layers * (window - 1) + 1
        picture = "".join("█" if size else "·" for size in reach(stack[:n_layers], inputs))
        exact = exact and picture == "·" * (n - formula) + "█" * formula
        rows.append([str(n_layers), picture, picture.count("█"), formula])
    print(f"  window {window}: inputs in which the last output has a gradient (█)")
    table(["layers", "inputs", "reach", "formula"], *rows)
    check("L window layers see exactly the last L (window - 1) + 1 positions", exact)
    check("a window over all = none", layer._replace(window=len(xs)).run(xs) == layer.run(xs))
    return [row[2] for row in rows]

# 7. Latent (MLA) ----------------------------------------------------------------------------------
# Cache neither keys nor values of a position x but c = down x, `rank` numbers, from which each head
# projects its key U c and its value V c up. And these need not ever be computed: since
#   q · (U c) = (Uᵀ q) · c     and     Σ weight_j V c_j = V Σ weight_j c_j,
# the up-projections move to the query and to the output ("absorbed"), and attention runs on the
# cache: MQA with one wide kv head whose value is a part of its key. RoPE would rotate between q and
# U, so it gets numbers of its own ("decoupled"): some of each query, and one rotated key for all
# heads, cached beside c. (DeepSeek also compresses the queries, and normalises c.)
class MLA(Layer):
    """Multi-head latent attention. DeepSeek-AI 2024 (DeepSeek-V2), section 2.1.
    weights: "query", "out" as ever, "down" [1][rank][d_model], "rope" [1][rope_dim][d_model],
    "up_key" [n_heads][head_dim - rope_dim][rank], "up_value" [n_heads][value_dim][rank]."""
    def remember(self, xs):
        """The latent vectors and the rotated keys, [1][n][width] each: one head for all."""
        return [self.project("down", xs), self.project("rope", xs)]

    def look_decompressed(self, queries, latents, rotated):
        """By the definition: make every head's keys and values."""
        keys = [join_heads([linear(latents[0], up), *rotated]) for up in self.weights["up_key"]]
        values = [linear(latents[0], up) for up in self.weights["up_value"]]
        return attend(queries, keys, values)

    def look(self, queries, latents, rotated):
        """The same, absorbed: attention on what is cached."""
        still = self.head_dim() - self.rope_dim
        wide_queries = []
        for head, up in zip(queries, self.weights["up_key"]):
            asked = linear([query[:still] for query in head], list(zip(*up)))
            wide_queries.append(join_heads([asked, [query[still:] for query in head]]))
        wide_keys = [join_heads(latents + rotated)]
        mixed = attend(wide_queries, wide_keys, latents, scale=self.head_dim() ** -0.5)
        return [linear(head, up) for head, up in zip(mixed, self.weights["up_value"])]

    def score_cost(self): return 2 * len(self.weights["down"][0]) + self.rope_dim
    def cache_shape(self): return 1, len(self.weights["down"][0]) + self.rope_dim, 0  # value in key

def to_mla(layer, rank):
    """MHA to MLA: the rotated key is the mean of the heads', c the first `rank` numbers of x. (In
    trained weights, some directions matter more than others, and c should keep those.)"""
    weights, still = dict(layer.weights), layer.head_dim() - layer.rope_dim
    keys, values = weights.pop("key"), weights.pop("value")
    weights["down"] = [one_hot(len(weights["out"]))[:rank]]
    weights["rope"] = [[mean(rows) for rows in zip(*(head[still:] for head in keys))]]
    weights["up_key"] = [[row[:rank] for row in head[:still]] for head in keys]
    weights["up_value"] = [[row[:rank] for row in head] for head in values]
    return MLA(layer.rope_dim, weights)

def show_mla(layer, rng, rank=16, n=128):
    """Both ways to compute MLA -> {way: multiply-adds of one position's attention over n}."""
    xs, mla = vectors(rng, n, 32), to_mla(layer, rank)
    queries = [head[-1:] for head in layer.project("query", xs)]         # the last position's
    latents = mla.remember(xs)
    outputs, costs = [], {}
    for name, look, cached in (("MHA", layer.look, layer.remember(xs)),
                               ("MLA decompressed", mla.look_decompressed, latents),
                               ("MLA absorbed", mla.look, latents)):
        COUNT.clear()
        outputs.append(look(queries, *cached))
        costs[name] = COUNT["multiply-adds"]
    print(f"  multiply-adds of one position's attention over {n} that are cached")
    bars(list(costs.items()))
    error = distance(outputs[1], outputs[2])
    check("MLA absorbed = decompressed", error < 1e-10, f"{error:.0e}")
    return costs

# 8. Side by side ----------------------------------------------------------------------------------
# All are made from one MHA layer, untrained: its heads have nothing in common, a hard case. One
# wide head is that layer with one pattern for all. (Rotations, a few products, are not counted.)
def kv_bytes_per_token(n_layers, n_kv_heads, key_dim, value_dim):
    """What one token adds to the cache: a key and a value per layer and kv head, in 16 bits."""
    return 2 * n_layers * n_kv_heads * (key_dim + value_dim)

def show_variants(layer, xs, window=4, rank=16):
    """The table of all variants -> its rows."""
    wide = {name: [sum(layer.weights[name], [])] for name in ("query", "key", "value")}
    kinds = {"one wide head": layer._replace(weights=layer.weights | wide), "MHA": layer,
             "GQA, 4 kv heads": share_heads(layer, 4), "GQA, 2 kv heads": share_heads(layer, 2),
             "MQA": share_heads(layer, 1), f"window {window}": layer._replace(window=window),
             f"MLA, rank {rank}": to_mla(layer, rank)}
    n, reference = len(xs), layer.run(xs)
    rows, equal = [], True
    for name, kind in kinds.items():
        needed = sum(size > 0.0 for size in reach([kind], xs))
        COUNT.clear()
        error = distance(kind.run(xs), reference)
        n_scores = len(kind.weights["query"]) * sum(min(i + 1, kind.window or n) for i in range(n))
        formula = n * COUNT["weights read"] + n_scores * kind.score_cost()
        kv_bytes = kv_bytes_per_token(1, *kind.cache_shape())
        equal = equal and COUNT["multiply-adds"] == formula and COUNT["scores"] == n_scores
        equal = equal and 2 * COUNT["cached"] == n * kv_bytes
        rows.append([name, COUNT["weights read"], COUNT["multiply-adds"], formula, COUNT["scores"],
                     2 * COUNT["cached"] // n, kv_bytes, needed, f"{error:.2f}"])
    print("  needed: positions in which the last has a gradient; error: |output - MHA's| / |MHA's|")
    table([f"{n} positions", "weights", "multiply-adds", "formula", "query · key", "KV B/token",
           "formula", "needed", "error"], *rows)
    check("multiply-adds, KV bytes and scores counted = formulas, all variants", equal)
    return rows

# 9. The bugs people ship --------------------------------------------------------------------------
# None of these raises an error, and each is right in a special case: a head of one number, the last
# position, a kv head for each head or for all, a text shorter than the window.
def missing_scale(rng, n_queries=40, n_keys=32):
    """No 1/√head_dim: the softmax turns into a choice, and its gradient vanishes."""
    def sharpness(scores):
        weights = softmax(scores)
        dot(weights, vectors(rng, n_keys)).backward()
        return -sum(p * log(p) for p in floats(weights) if p), gradient_size(scores)
    rows, sharper = [], True
    for head_dim in (4, 16, 64, 256):
        products = linear(vectors(rng, n_queries, head_dim), vectors(rng, n_keys, head_dim))
        right = [sharpness(leaves([x * head_dim ** -0.5 for x in row])) for row in products]
        wrong = [sharpness(leaves(row)) for row in products]
        sharper = sharper and all(w[0] <= r[0] + 1e-9 for r, w in zip(right, wrong))
        entropies, gradients = zip(mean(right), mean(wrong))
        rows.append([f"no scale 1/√{head_dim}", "entropy of the weights, nats", *entropies])
        rows.append([f"no scale 1/√{head_dim}", "size of d output / d scores", *gradients])
    check("without the scale, every softmax is sharper", sharper)       # d entropy / d scale <= 0
    return rows

def late_mask(rng, n=8, position=4):
    """Masked after the softmax, the future stays in its denominator."""
    queries, keys = vectors(rng, 1, n, 4), leaves(vectors(rng, 1, n, 4))
    def future_gradient(causal):
        weights = patterns(queries, keys, causal)[0][position][:position + 1]
        dot(weights, vectors(rng, position + 1)).backward()
        return gradient_size(keys[0][position + 1:])
    right, wrong = future_gradient(True), future_gradient(False)
    check("no gradient from the future; with a late mask, there is", right == 0.0 < wrong)
    return [["mask after the softmax", "size of d output / d later keys", right, wrong]]

def wrong_repeat(rng, n_heads=8):
    """Kv heads copied a b a b (torch: repeat), not a a b b (repeat_interleave)."""
    def interleaved(heads, n): return [head for head in heads for _ in range(n)]
    queries = vectors(rng, n_heads, 8, 4)
    rows = []
    for n_kv_heads in (1, 2, 4, 8):
        n = n_heads // n_kv_heads
        keys, values = vectors(rng, 2, n_kv_heads, 8, 4)
        gqa = attention(queries, keys, values)
        right = attention(queries, interleaved(keys, n), interleaved(values, n))
        wrong = attention(queries, keys * n, values * n)
        rows.append(["repeat, not interleaved", f"output error, kv heads: {n_kv_heads}",
                     distance(right, gqa), distance(wrong, gqa)])
    check("MQA and GQA = MHA with each kv head repeated in place", not any(row[2] for row in rows))
    check("repeat for repeat_interleave: wrong in GQA, right in MQA and MHA",
          [row[3] > 0.0 for row in rows] == [False, True, True, False])
    return rows

def wide_window(layer, xs, window=4):
    right, wrong = (layer._replace(window=n).run(xs) for n in (window, window + 1))
    differ = [i for i in range(len(xs)) if right[i] != wrong[i]]
    check("a window one too wide: wrong once it is full", differ == list(range(window, len(xs))))
    sizes = [reach([layer._replace(window=n)], xs) for n in (window, window + 1)]
    seen = [sum(size > 0.0 for size in row) for row in sizes]
    return [[f"window {window + 1} for {window}", "positions that the last one sees", *seen]]

def show_bugs(layer, xs, rng):
    """Each mistake beside the correct version, by the symptom that gives it away."""
    rows = missing_scale(rng) + late_mask(rng) + wrong_repeat(rng) + wide_window(layer, xs)
    table(["mistake", "symptom", "right", "wrong"],
          *([*texts, short(right), short(wrong)] for *texts, right, wrong in rows))
    return rows

# 10. The real world -------------------------------------------------------------------------------
# Public config files. For MLA, "key" stands for what it caches, 512 + 64 (RoPE) numbers a layer.
Model = namedtuple("Model", "n_layers n_kv_heads key_dim value_dim n_weights window", defaults=[0])
MODELS = {"GPT-3 (MHA)": Model(96, 96, 128, 128, 175e9),
          "Llama-2-7B (MHA)": Model(32, 32, 128, 128, 6.74e9),
          "Llama-2-70B (GQA)": Model(80, 8, 128, 128, 69e9),
          "Mistral-7B (GQA, window)": Model(32, 8, 128, 128, 7.24e9, window=4096),
          "Falcon-7B (MQA)": Model(32, 1, 64, 64, 7e9),
          "DeepSeek-V3 (MLA)": Model(61, 1, 512 + 64, 0, 671e9)}

def show_real_world(memory=80e9, context=131072):
    """Caches in 16 bits, as if every model ran at this context -> the rows of the table."""
    rows = []
    for name, model in MODELS.items():
        size = kv_bytes_per_token(*model[:4])
        cache = size * min(context, model.window or context)
        weights = 2 * model.n_weights
        users = int((memory - weights) // cache) if weights < memory else "no room"
        rows.append([name, f"{size / 1024:,.1f} KiB", f"{cache / 1e9:.2f} GB",
                     f"{weights / 1e9:,.0f} GB", users])
    table(["KV caches and weights in 16 bits", "a token", f"{context // 1024}k tokens", "weights",
           f"users of {context // 1024}k on {memory / 1e9:.0f} GB"], *rows)
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
    """Run all sections -> the measurements."""
    started, rng = begin(), random.Random(seed)
    layer, xs = random_layer(rng), vectors(rng, 10, 32)
    section("1. Autograd", show_autograd, rng)
    section("2. A single head", show_single_head, rng)
    section("3. Multi-head attention", show_multi_head, layer, xs)
    section("4. Multi-query (MQA)", show_mqa, rng)
    gqa = section("5. Grouped-query (GQA)", show_gqa, layer, xs, rng)
    window = section("6. Sliding window", show_window, layer, xs, rng)
    mla = section("7. Latent (MLA)", show_mla, layer, rng)
    kinds = section("8. Side by side", show_variants, layer, xs)
    bugs = section("9. The bugs people ship", show_bugs, layer, xs, rng)
    models = section("10. The real world", show_real_world)
    return finish(started, gqa=gqa, window=window, mla=mla, kinds=kinds, bugs=bugs, models=models)

if __name__ == "__main__": run(main)
