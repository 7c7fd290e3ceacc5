"""Decoding text is limited by memory, not by arithmetic; the KV cache makes it affordable at all.

A transformer writes one token at a time, and each new token attends to all the earlier ones. Run
naively, every step recomputes the whole prefix. But attention looks only backwards, so the keys and
values of a position never change: keep them, and a step costs one position instead of all of them.
The price is memory. Each step must read every weight and the whole cache to make a single token,
and that reading, not the multiplying, sets the speed.

  Vaswani et al. 2017 (1706.03762) attention      Pope et al. 2022 (2211.05102) inference cost
  Kwon et al. 2023 (2309.06180) paged KV memory   Williams et al. 2009 the roofline model

  python microkv.py [--seed N] [--names FILE]     needs only Python, takes a few seconds

  1. Autograd              derivatives of everything, in fifty lines
  2. Data and model        a tiny GPT learns to write names
  3. The cache             same logits with it and without it; every multiplication counted
  4. Prefill and decode    arithmetic done per byte read, and why batching pays
  5. Paging                the cache in blocks: same logits, hardly any memory reserved in vain
  6. The bugs people ship  a stale cache, a wrong position, a missing rollback
  7. The real world        real models on real devices, by the formulas just verified
"""
import argparse, codecs, gc, os, random, sys, time
from collections import defaultdict
from copy import copy
from itertools import accumulate
from math import ceil, exp, log, sqrt
from operator import mul
from pathlib import Path

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

def show_autograd(rng, n=16, h=1e-5):
    """A derivative by backward() beside the slope between two evaluations of the function."""
    def matrix(): return [[Value(rng.gauss(0.0, 1.0)) for _ in range(n)] for _ in range(n)]
    x = [rng.gauss(0.0, 1.0) for _ in range(n)]
    first, second = matrix(), matrix()
    def loss():
        hidden = softmax(linear([x], first)[0])
        return cross_entropy(linear([hidden], second)[0], target=0)
    y = loss()
    pairwise = sum(max(1, len(node.inputs) - 1) for node in TAPE)
    print(f"  Two {n} x {n} layers are {len(TAPE)} Values; with two inputs each, {pairwise}.")
    y.backward()
    weight = first[0][0]
    weight.data += h
    above = loss().data
    weight.data -= 2.0 * h
    below = loss().data
    slope = (above - below) / (2.0 * h)
    print(f"  d loss / d weight = {weight.grad:+.9f} by backward(), {slope:+.9f} by differences.")
    check("backward() gives the slope of the function", abs(weight.grad - slope) < 1e-8)

# 2. Data and model --------------------------------------------------------------------------------
# A token is a number that stands for a letter. The model turns a token and its position in the text
# into a vector of d_model numbers, and that vector, in two kinds of steps, into logits: a score for
# every token of the vocabulary. softmax(logits) is the distribution of the next token.
# Attention lets a position take something over from those before it. Three matrices make of its
# vector a query (what it looks for), a key (what it is found by) and a value (what it has to give).
# The dot products of its query with all keys so far become weights, by softmax, and the mean of
# the values with these weights is added to its vector. n_heads such searches run side by side, each
# on its slice of head_dim numbers. The other kind of step is a network of two layers, `up` and
# `down`, that works on each position by itself. One step of each kind is a layer of the model.
# >>> shared: names (the same in every script that learns names)
NAMES = """
aaron abigail ada adam adrian agnes ahmed aisha alan albert alex ali alice amelia amina amir amy ana
andrew anna ariana astrid aurora ava barbara bella ben benjamin bruno camila carla carmen charles
chloe clara claudia daisy dan dana daniel david diana diego dina dora edith elena eli elias ella
ellen elsa emil emilia emily emma emmy enzo eric erin esther ethan eva eve evelyn fay felix fernando
finn fiona flora frank frida gabriel gemma grace gwen hana hannah hans hazel helen helena henry
hilda hugo irene iris isaac isabel ivan ivy jack jacob james jana jane jasmine jill joel john jon
jonas jonathan jose josephine joy juan judy julia juliana june kai karen karim katarina kate kenji
kevin kira klara kurt lana lara laura lea leah lena leo leon leona leonard lewis liam lidia lily
lina lisa lola lorena louis lucas lucia lucy luis luisa luke luna lydia magdalena malik mara marco
margaret maria marie marina mario mark marta martin mary matilda max maya mei mia michael mike mila
milo miriam monica nadia naomi natalia nathan nicholas nils nina noah nora olga oliver olivia omar
oscar otto pablo patricia paula pedro rachel raul ray rebecca rita robert roman rosa rosalind rosie
ruby rudy ruth ryan sabina sam samuel sara sebastian simon sofia sonia sophia susan tara teresa theo
thomas tina toby tom valeria vera veronica vincent william yasmin yuki yusuf zara zoe
"""
BOUNDARY = 0                             # the token before and after every name, printed as "."

def read_names(path):
    """The different names in a text file, one a line; ValueError or OSError if it will not do."""
    lines = Path(path).read_text("utf-8-sig").splitlines()
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    longest, letters = max(names, key=len, default=""), set("".join(names))
    if len(names) < 20: raise ValueError(f"only {len(names)} different names, 20 are needed")
    if len(longest) > 20: raise ValueError(f"over 20 characters in a line: {longest[:25]!r}...")
    if len(letters) > 100: raise ValueError(f"{len(letters)} different characters, at most 100")
    return names

def tokenize(names, rng):
    """-> (vocabulary, names to train on, a tenth held out); a name is [BOUNDARY, ..., BOUNDARY]."""
    vocabulary = ["."] + sorted(set("".join(names)))
    token = {letter: i for i, letter in enumerate(vocabulary)}
    rows = [[BOUNDARY, *(token[c] for c in name), BOUNDARY] for name in sorted(set(names))]
    rng.shuffle(rows)
    return vocabulary, rows[len(rows) // 10:], rows[:len(rows) // 10]
# <<< shared: names

# >>> shared: gpt (the same in every script that uses it)
class KVCache:
    """keys[layer][position] and values[layer][position]: [d_model], of all positions so far."""
    def __init__(self, n_layers):
        self.keys, self.values = [[] for _ in range(n_layers)], [[] for _ in range(n_layers)]
    @property
    def length(self): return len(self.keys[-1])
    def append(self, layer, key, value):
        """Add the next position of a layer -> all keys and all values of that layer."""
        self.keys[layer].append(key)
        self.values[layer].append(value)
        return self.keys[layer], self.values[layer]
    def truncate(self, length):
        """Forget every position from `length` on."""
        for vectors in self.keys + self.values: del vectors[length:]

def add(a, b): return [x + y for x, y in zip(a, b)]

def rmsnorm(x):
    """x at a root mean square of 1, so that depth cannot blow it up. Zhang & Sennrich 2019."""
    scale = (dot(x, x) / len(x) + 1e-5) ** -0.5
    return [value * scale for value in x]

def attend(query, keys, values, n_heads):
    """One position looks at n. query [d_model], keys and values [n][d_model] -> [d_model]."""
    head_dim, mixed = len(query) // n_heads, []
    for start in range(0, len(query), head_dim):
        head = slice(start, start + head_dim)
        q = [x * head_dim ** -0.5 for x in query[head]]
        weights = softmax([dot(q, key[head]) for key in keys])
        mixed += [dot(weights, column) for column in zip(*(value[head] for value in values))]
    return mixed

class GPT:
    """A decoder-only transformer: learned positions, RMSNorm before each part, ReLU, no biases."""
    def __init__(self, vocab_size, rng, n_layers=1, d_model=16, n_heads=2, context=32):
        self.n_layers, self.n_heads = n_layers, n_heads
        self.d_model, self.context = d_model, context
        shapes = {"token": (vocab_size, d_model), "position": (context, d_model)}
        for i in range(n_layers):
            for part in "query", "key", "value", "out": shapes[f"{part}{i}"] = (d_model, d_model)
            shapes |= {f"up{i}": (4 * d_model, d_model), f"down{i}": (d_model, 4 * d_model)}
        shapes["logits"] = (vocab_size, d_model)
        self.weights = {name: [[Value(rng.gauss(0.0, 0.08)) for _ in range(n)] for _ in range(m)]
                        for name, (m, n) in shapes.items()}
    def parameters(self): return [p for rows in self.weights.values() for row in rows for p in row]
    def frozen(self):
        """The same model with floats for weights: running it builds no graph."""
        twin = copy(self)
        twin.weights = {name: list(map(floats, matrix)) for name, matrix in self.weights.items()}
        return twin
    def forward(self, rows):
        """rows: [(token, position, cache)] -> logits [len(rows)][vocab_size].

        A row enters its cache and then attends to all that is in it: consecutive positions with one
        cache are a prompt, single positions with many caches a batch, and any mixture works."""
        w = self.weights
        xs = [add(w["token"][token], w["position"][position]) for token, position, _ in rows]
        for i in range(self.n_layers):
            normed = [rmsnorm(x) for x in xs]
            q, k, v = (linear(normed, w[f"{part}{i}"]) for part in ("query", "key", "value"))
            mixed = [attend(q[row], *cache.append(i, k[row], v[row]), self.n_heads)
                     for row, (_, _, cache) in enumerate(rows)]
            xs = list(map(add, xs, linear(mixed, w[f"out{i}"])))
            hidden = [list(map(relu, h)) for h in linear([rmsnorm(x) for x in xs], w[f"up{i}"])]
            xs = list(map(add, xs, linear(hidden, w[f"down{i}"])))
        return linear([rmsnorm(x) for x in xs], w["logits"])
    def run(self, tokens, cache, position=0):
        """The next tokens of one sequence, the first at `position` -> the logits after each."""
        return self.forward([(token, position + i, cache) for i, token in enumerate(tokens)])
    def loss(self, names):
        """Mean of -log p over the letters of the names, in nats; frozen, or it builds a graph."""
        losses = [cross_entropy(logits, target) for name in names for logits, target
                  in zip(self.run(name[:-1], KVCache(self.n_layers)), name[1:])]
        return dot(losses, [1.0 / len(losses)] * len(losses))
# <<< shared: gpt

def bigram_loss(names, held_out, vocab_size):
    """Nats per letter on held_out for a model that counts letter pairs, each seen once extra."""
    counts = [[1] * vocab_size for _ in range(vocab_size)]
    for name in names:
        for letter, following in zip(name, name[1:]): counts[letter][following] += 1
    losses = [log(sum(counts[letter]) / counts[letter][following])
              for name in held_out for letter, following in zip(name, name[1:])]
    return sum(losses) / len(losses)

def greedy(logits): return max(range(len(logits)), key=logits.__getitem__)

def generate(model, prompt, n_tokens, use_cache=True, choose=greedy, cache=None, position=0):
    """Continue a prompt -> (new tokens, the logits behind each, the multiply-adds of each step).

    prompt: tokens, the first of them at `position`. With a cache, the first step runs the prompt
    and every other step the one token before it; without, every step runs all tokens so far.
    choose(logits) picks the token. ValueError if the text would not fit into model.context."""
    end = position + len(prompt) + n_tokens - 1
    if not prompt: raise ValueError("the prompt is empty: there is nothing to continue")
    if end > model.context: raise ValueError(f"{end} positions, but the context is {model.context}")
    tokens, history, counts, pending = [], [], [], list(prompt)
    cache = cache or KVCache(model.n_layers)
    for _ in range(n_tokens):
        before = COUNT["multiply-adds"]
        if use_cache:
            logits = model.run(pending, cache, position)[-1]
            position += len(pending)
        else: logits = model.run([*prompt, *tokens], KVCache(model.n_layers), position)[-1]
        tokens.append(choose(logits))
        history.append(logits)
        counts.append(COUNT["multiply-adds"] - before)
        pending = tokens[-1:]
    return tokens, history, counts

def show_model(vocabulary, names, held_out, rng, n_steps=250, window=20):
    """Train the tiny GPT, print what it learned -> (the model with float weights, the losses)."""
    model = GPT(len(vocabulary), rng)
    print(f"  {len(names)} names to learn and {len(held_out)} held out, {len(vocabulary)} tokens, "
          f"{len(model.parameters()):,} weights, {n_steps} steps.\n")
    curve = train(model.parameters(), lambda i: model.loss([names[i % len(names)]]), n_steps, 0.01)
    model = model.frozen()
    means = [(i, sum(curve[i - window:i]) / window) for i in range(window, n_steps + 1)]
    plot(f"nats per letter over steps, means of {window}", {"training loss": means}, height=7)
    print("\n  nats per letter on the names held out")
    losses = {"a uniform guess": log(len(vocabulary)),
              "counting letter pairs": bigram_loss(names, held_out, len(vocabulary)),
              "the tiny GPT": model.loss(held_out)}
    bars(list(losses.items()))
    def draw(logits): return rng.choices(range(len(logits)), softmax(logits))[0]
    texts = ["".join(vocabulary[token] for token in generate(model, [BOUNDARY], 16, choose=draw)[0])
             for _ in range(10)]
    print(f"\n  ten samples: {', '.join(text.split('.')[0] for text in texts)}")
    return model, losses

# 3. The cache -------------------------------------------------------------------------------------
# What does one position cost? Its vector meets four d x d matrices (query, key, value, out) and two
# of d x 4d (up, down): 12 d² multiply-adds a layer. Its query meets n keys, its softmax weights n
# values, d numbers each over all heads: 2 n d. The norms take 2 d a layer and d at the end, the
# logits vocab_size x d. Multiply-adds, here and below, are products that are summed up.
def position_cost(model, n):
    """Multiply-adds to run one position that attends to n positions, itself included."""
    d, vocab_size = model.d_model, len(model.weights["logits"])
    return model.n_layers * (12 * d * d + 2 * d + 2 * n * d) + d + vocab_size * d

def show_cache(model, prompt):
    """Fill the context with and without the cache -> the multiply-adds of every step of both."""
    n_tokens = model.context - len(prompt) + 1
    naive_tokens, naive_logits, naive = generate(model, prompt, n_tokens, use_cache=False)
    tokens, logits, cached = generate(model, prompt, n_tokens)
    lengths = range(len(prompt), model.context + 1)          # positions run so far, at every step
    naive_formula = [sum(position_cost(model, i + 1) for i in range(n)) for n in lengths]
    cached_formula = naive_formula[:1] + [position_cost(model, n) for n in lengths[1:]]
    print("  multiply-adds of a step, the first of which runs the prompt")
    table(["step", "positions", "without: counted", "formula", "with: counted", "formula", "ratio"],
          *([f"{i + 1}", lengths[i], naive[i], naive_formula[i], cached[i], cached_formula[i],
             f"{naive[i] / cached[i]:.1f}"] for i in (0, 1, 7, n_tokens - 1)))
    print()
    plot("multiply-adds so far, in thousands, over tokens generated",
         {name: [(i + 1, total / 1e3) for i, total in enumerate(accumulate(counts))]
          for name, counts in (("without the cache", naive), ("with it", cached))}, height=8)
    # A position costs a constant, and 2 n d for attention. Summed over T cached steps: a term in T
    # and one in T². Without the cache every step sums over its whole prefix again: T² and T³.
    constant, share = position_cost(model, 0), f"share at {model.context}"
    naive_share = constant * sum(lengths) / sum(naive)
    cached_share = constant * model.context / sum(cached)
    print()
    table(["over T positions", "without", share, "with", share],
          ["weights, norms, logits", "~ T²", f"{naive_share:.0%}", "~ T", f"{cached_share:.0%}"],
          ["attention", "~ T³", f"{1 - naive_share:.0%}", "~ T²", f"{1 - cached_share:.0%}"])
    check("with the cache: the same tokens and logits, bit for bit, at every step",
          (tokens, logits) == (naive_tokens, naive_logits), f"{n_tokens} steps")
    check("multiply-adds counted = formula, at every step, with the cache and without",
          (naive, cached) == (naive_formula, cached_formula), f"{sum(naive) / sum(cached):.1f}x")
    return {"without": naive, "with": cached}

# 4. Prefill and decode ----------------------------------------------------------------------------
# Vendor data sheets, dense 16-bit arithmetic: FLOP/s, bytes/s of memory, bytes of memory.
DEVICES = {"A100 80GB": (312e12, 2.039e12, 80e9), "H100": (989e12, 3.35e12, 80e9),
           "H200": (989e12, 4.8e12, 141e9), "B200": (2250e12, 8.0e12, 180e9),
           "RTX 4090": (165e12, 1.008e12, 24e9)}
# Public config files: layers, query heads, key/value heads, head_dim, weights. In MHA every query
# head has a key/value head of its own, in GQA a group shares one, in MQA all do (microattention).
# MLA, of DeepSeek-V3, caches 512 + 64 numbers a layer for both: as much as a key and value of 288.
MODELS = {"GPT-3 (MHA)": (96, 96, 96, 128, 175e9), "Llama-2-7B (MHA)": (32, 32, 32, 128, 6.74e9),
          "Llama-3-8B (GQA)": (32, 32, 8, 128, 8.03e9),
          "Mistral-7B (GQA)": (32, 32, 8, 128, 7.24e9), "Llama-2-70B (GQA)": (80, 64, 8, 128, 69e9),
          "Falcon-7B (MQA)": (32, 71, 1, 64, 7e9), "DeepSeek-V3 (MLA)": (61, 128, 1, 288, 671e9)}

def kv_bytes_per_token(n_layers, n_kv_heads, head_dim, bytes_per_element=2):
    """A key and a value per layer and key/value head -> bytes of cache that one token occupies."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_element

def step_cost(name, batch, context):
    """One decoding step of a real model in 16 bits -> (FLOP, bytes read). Pope et al. 2022.

    A multiply-add is 2 FLOP. A weight is used once per sequence but read once per step; the caches
    are read one by one. The look-up tables are counted as if they were read: an upper bound."""
    n_layers, n_heads, n_kv_heads, head_dim, weights = MODELS[name]
    flop = 2 * weights + 4 * n_layers * n_heads * head_dim * context
    cache = kv_bytes_per_token(n_layers, n_kv_heads, head_dim) * context
    return batch * flop, 2 * weights + batch * cache

def fork(cache):
    """A second cache with the same content. (micropaged does this without copying.)"""
    twin = copy(cache)
    twin.keys, twin.values = list(map(list, cache.keys)), list(map(list, cache.values))
    return twin

def run_pass(model, rows):
    """One forward pass -> (logits, [FLOP, bytes of weights, bytes of cache]) in 16-bit numbers.

    The weights are counted where linear() reads them; of a cache, what a kernel must read at least:
    each of its positions once per pass, however many rows look at it (microflash shows how)."""
    COUNT.clear()
    logits = model.forward(rows)
    positions = sum(cache.length for cache in {id(cache): cache for _, _, cache in rows}.values())
    cache_bytes = kv_bytes_per_token(model.n_layers, 1, model.d_model) * positions
    return logits, [2 * COUNT["multiply-adds"], 2 * COUNT["weights read"], cache_bytes]

def show_prefill_and_decode(model, text, n=24):
    """n tokens in chunks of several sizes, then one more token in batches of several sizes."""
    whole = model.run(text[:n], KVCache(model.n_layers))
    same, prefill, decode = True, {}, {}
    for size in (24, 8, 3, 1):
        cache, prefill[size] = KVCache(model.n_layers), [0, 0, 0]
        for start in range(0, n, size):
            rows = [(text[i], i, cache) for i in range(start, min(start + size, n))]
            logits, cost = run_pass(model, rows)
            prefill[size] = add(prefill[size], cost)
            same = same and logits == whole[start:start + size]
    alone = model.run([text[n]], fork(cache), n)[0]
    for size in (1, 4, 16, 64, 256):
        logits, decode[size] = run_pass(model, [(text[n], n, fork(cache)) for _ in range(size)])
        same = same and all(row == alone for row in logits)
    costs = {f"prefill, {n} tokens by {size}": cost for size, cost in prefill.items()}
    costs |= {f"decode, a batch of {size}": cost for size, cost in decode.items()}
    table(["16-bit numbers", "FLOP", "weight bytes", "cache bytes", "FLOP per byte"],
          *([name, *cost, f"{cost[0] / sum(cost[1:]):.2f}"] for name, cost in costs.items()))
    print()
    matrices = [m for name, m in model.weights.items() if name not in ("token", "position")]
    weight_bytes = 2 * sum(len(m) * len(m[0]) for m in matrices)
    passes = [(ceil(n / size), cost) for size, cost in prefill.items()]
    passes += [(1, cost) for cost in decode.values()]
    check("any chunks of the prompt and any batch: the same logits, bit for bit", same)
    check("weight bytes read = all matrices, once per pass",
          all(cost[1] == n_passes * weight_bytes for n_passes, cost in passes),
          f"{weight_bytes:,} a pass")
    return {"prefill": prefill, "decode": decode}

def show_roofline(name="Llama-3-8B (GQA)"):
    """FLOP per byte of a real model over the size of a pass, beside what a device can balance.

    A 16-bit weight is 2 bytes and one multiply-add: decoding alone does 1 FLOP per byte. A batch
    shares the weights but not the caches: the longer the context, the sooner its gain ends. Below
    the ridge, FLOP/s over bytes/s, memory sets the pace. Williams et al. 2009."""
    peak, bandwidth, _ = DEVICES["H100"]
    ridge, sizes = peak / bandwidth, [2 ** i for i in range(11)]
    curves = {f"ridge of an H100, {ridge:.0f}": [(2 ** (i / 8), ridge) for i in range(81)]}
    for context in (512, 8192):
        costs = [(size, *step_cost(name, size, context)) for size in sizes]
        curves[f"batch, context {context}"] = [(size, flop / read) for size, flop, read in costs]
    curves["prefill"] = []
    for n in sizes:                      # n tokens of one sequence see n / 2 others on average
        flop, (_, read) = n * step_cost(name, 1, n / 2)[0], step_cost(name, 1, n)
        curves["prefill"].append((n, flop / read))
    plot(f"{name}: FLOP per byte over tokens in a pass (both axes log)", curves, True, True)
    print("  Below the ridge, arithmetic waits for memory.")

# 5. Paging ----------------------------------------------------------------------------------------
class PagedKVCache:
    """A KVCache in blocks of a pool that many sequences share. Kwon et al. 2023, section 4.

    pool[layer][block][slot] is a (key, value). free: numbers of the unused blocks, in any order.
    The block table tells where the sequence's first, second, ... block lies in the pool. Production
    kernels read through the table in place; here the vectors are gathered. micropaged goes on."""
    def __init__(self, pool, free, block_size):
        self.pool, self.free, self.block_size = pool, free, block_size
        self.block_table, self.lengths = [], [0] * len(pool)
    def append(self, layer, key, value):
        """As KVCache.append(); takes a block from the free list when the last one is full."""
        blocks, size, last = self.pool[layer], self.block_size, self.lengths[layer]
        if last == len(self.block_table) * size: self.block_table.append(self.free.pop())
        blocks[self.block_table[last // size]][last % size] = key, value
        self.lengths[layer] += 1
        return zip(*(blocks[self.block_table[i // size]][i % size] for i in range(last + 1)))

def show_paging(model, text, names, rng, block_size=4, n=22):
    """Two sequences grow in one shuffled pool; then what reserving memory by blocks wastes."""
    n_blocks = 2 * ceil(model.context / block_size)
    pool = [[[None] * block_size for _ in range(n_blocks)] for _ in range(model.n_layers)]
    free = rng.sample(range(n_blocks), n_blocks)
    paged = [PagedKVCache(pool, free, block_size) for _ in "AB"]
    plain = [KVCache(model.n_layers) for _ in "AB"]
    same = True
    for i in range(n):
        tokens = text[i], text[n - i]
        in_blocks, in_a_row = (model.forward([(t, i, cache) for t, cache in zip(tokens, caches)])
                               for caches in (paged, plain))
        same = same and in_blocks == in_a_row
    owner = {block: letter for letter, cache in zip("AB", paged) for block in cache.block_table}
    for letter, cache in zip("AB", paged): print(f"  block table of {letter}: {cache.block_table}")
    blocks = "".join(owner.get(block, "·") for block in range(n_blocks))
    print(f"  the pool, {block_size} tokens a block: {blocks}\n")
    lengths = [len(name) - 1 for name in names]
    print(f"  share of the reserved memory that holds tokens: {len(names)} names of "
          f"{min(lengths)} to {max(lengths)} tokens")
    shares = {size: sum(lengths) / sum(ceil(length / size) * size for length in lengths)
              for size in (model.context, 16, 8, 4, 2)}
    bars([(f"blocks of {size}" if size < model.context else f"reserve all {size}", 100 * share)
          for size, share in shares.items()], " %")
    unused = [len(cache.block_table) * block_size - cache.lengths[0] for cache in paged]
    check("in blocks, in shuffled order: the same logits, bit for bit", same)
    check("a sequence leaves less than a block unused", max(unused) < block_size, unused)
    return shares

# 6. The bugs people ship --------------------------------------------------------------------------
def prefill_then_decode(model, prompt, n_tokens, choose, stale=(), shift=0, rejected=()):
    """generate() in two calls, as a server makes them -> (tokens, logits). Defaults are right."""
    cache = KVCache(model.n_layers)
    if stale: model.run(stale, cache)                # bug: another request's cache, never reset
    first, first_logits, _ = generate(model, prompt, 1, choose=choose, cache=cache)
    if rejected: model.run(rejected, cache, len(prompt))     # bug: not followed by truncate()
    position = len(prompt) + shift                   # bug: any shift but 0
    rest, rest_logits, _ = generate(model, first, n_tokens - 1, True, choose, cache, position)
    return first + rest, first_logits + rest_logits

def divergence(p_logits, q_logits):
    """KL(p || q) in nats of two next-token distributions: 0 if and only if they are the same."""
    return sum(p * log(p / q) for p, q in zip(softmax(p_logits), softmax(q_logits)))

def show_bugs(model, vocabulary, name, other, n_tokens=12):
    """Each bug beside the correct run: the text it writes, and how far off its predictions are."""
    prompt = name[:3]
    right, truth = prefill_then_decode(model, prompt, n_tokens, greedy)
    bugs = {"cache of another request not reset": {"stale": other[:-1]},
            "decoding restarts at position 0": {"shift": -len(prompt)},
            "decoding is one position late": {"shift": 1},
            "rejected tokens not rolled back": {"rejected": other[1:-1]}}
    def text(tokens): return "".join(vocabulary[token] for token in tokens)
    rows, divergences = [["none", "", "", "", "", text(right)]], {}
    for bug, mistake in bugs.items():
        wrong, _ = prefill_then_decode(model, prompt, n_tokens, greedy, **mistake)
        script = iter(right)             # predictions are comparable only after the same text
        _, logits = prefill_then_decode(model, prompt, n_tokens, lambda _: next(script), **mistake)
        divergences[bug] = kl = list(map(divergence, truth, logits))
        differs = [i + 1 for i, (a, b) in enumerate(zip(right, wrong)) if a != b] or ["none"]
        kls = [f"{x:.3f}" for x in (kl[0], kl[1], max(kl))]
        rows.append([bug, differs[0], *kls, text(wrong)])
    print(f"  prompt {text(prompt)!r}; KL in nats, right next-token distribution against the bug's")
    table(["bug", "first wrong token", "KL at step 1", "step 2", "largest", "greedy text"], *rows)
    stale, *late = divergences.values()
    one_call = generate(model, prompt, n_tokens)[:2]
    check("prefill and decode in two calls = in one", (right, truth) == one_call)
    check("a stale cache is wrong from the first token on", stale[0] > 0.0, f"KL {stale[0]:.1e}")
    check("a wrong position, a missing rollback: first token exact, then drift",
          all(kl[0] == 0.0 < max(kl) for kl in late), f"KL up to {max(map(max, late)):.1e}")
    return divergences

# 7. The real world --------------------------------------------------------------------------------
def decode_tokens_per_second(flop, read_bytes, batch, peak_flops, bandwidth):
    """Ceiling on decoding, all sequences together -> (tokens per second, "memory" or "compute").

    flop, read_bytes: of one step of the whole batch; peak_flops: FLOP/s; bandwidth: bytes/s. The
    slower of the two sets the pace: the roofline, Williams et al. 2009."""
    compute, memory = flop / peak_flops, read_bytes / bandwidth
    return batch / max(compute, memory), "compute" if compute > memory else "memory"

def fitting(name, context, memory):
    """How many requests of `context` tokens fit beside the weights into `memory` bytes."""
    _, weights = step_cost(name, 0, context)
    _, with_one = step_cost(name, 1, context)
    return max(0, int((memory - weights) // (with_one - weights)))

def show_cache_sizes():
    """-> {model: bytes of cache per token}"""
    per_token, rows = {}, []
    for name, (n_layers, _, n_kv_heads, head_dim, weights) in MODELS.items():
        per_token[name] = size = kv_bytes_per_token(n_layers, n_kv_heads, head_dim)
        sizes = [f"{size * n * 1024 / 1e9:.2f} GB" for n in (4, 32, 128)]
        rows.append([name, f"{size / 1024:,.1f} KiB", *sizes, f"{2 * weights / 1e9:,.0f} GB"])
    table(["KV cache in 16 bits", "per token", "4k tokens", "32k", "128k", "weights"], *rows)
    return per_token

def show_capacity(context=8192):
    """Concurrent requests beside the weights, for every model that one of the devices can hold."""
    rows = [[name, *(fitting(name, context, memory) for _, _, memory in DEVICES.values())]
            for name in MODELS]
    print()
    table([f"requests of {context:,} tokens that fit", *DEVICES],
          *(row for row in rows if any(row[1:])))

def show_ceilings():
    """The most tokens per second: of one sequence, and of a batch that fills the memory."""
    rows = []
    for name, context, device in (("Llama-2-7B (MHA)", 4096, "H100"),
                                  ("Llama-3-8B (GQA)", 8192, "H100"),
                                  ("Llama-3-8B (GQA)", 512, "H100"),
                                  ("Llama-3-8B (GQA)", 512, "A100 80GB")):
        peak, bandwidth, memory = DEVICES[device]
        for batch in (1, fitting(name, context, memory)):
            flop, read = step_cost(name, batch, context)
            speed, bound = decode_tokens_per_second(flop, read, batch, peak, bandwidth)
            rows.append([f"{name[:10]}, {context:,} tokens, {device}", batch, f"{speed:,.0f}",
                         f"{flop / read:.1f}", f"{peak / bandwidth:.0f}", bound])
    print()
    table(["ceiling on decoding", "batch", "tokens/s", "FLOP per byte", "ridge", "bound by"], *rows)

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

def main(seed=42, names=None):
    """Run all sections -> the measurements. names: a list to learn instead of the built-in one."""
    started, rng = begin(), random.Random(seed)
    vocabulary, names, held_out = tokenize(names or NAMES.split(), rng)
    section("1. Autograd", show_autograd, rng)
    model, losses = section("2. Data and model", show_model, vocabulary, names, held_out, rng)
    text = [token for name in names[:40] for token in name[:-1]]         # names in a row
    multiply_adds = section("3. The cache", show_cache, model, names[0][:3])
    traffic = section("4. Prefill and decode", show_prefill_and_decode, model, text)
    show_roofline()
    shares = section("5. Paging", show_paging, model, text, names, rng)
    divergences = section("6. The bugs people ship", show_bugs, model, vocabulary, *names[:2])
    per_token = section("7. The real world", show_cache_sizes)
    show_capacity()
    show_ceilings()
    return finish(started, losses=losses, multiply_adds=multiply_adds, traffic=traffic,
                  reserved_share=shares, divergences=divergences, kv_bytes_per_token=per_token)

if __name__ == "__main__": run(main, names=read_names)
