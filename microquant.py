"""Rounding a model to 4 bits costs little if few weights share a scale; then the rounding matters.

Quantization stores a weight as a small integer, the code, and a scale that many weights share:
weight = scale x code. Half the bits are half the memory and, as decoding waits for memory, twice
the speed. The art is to keep one large number from setting the scale of all the small ones.

  Jacob et al. 2017 (1712.05877) integer inference     Dettmers et al. 2022 (2208.07339) LLM.int8()
  Frantar et al. 2022 (2210.17323) GPTQ                Xiao et al. 2022 (2211.10438) SmoothQuant
  python microquant.py [--seed N] [--names FILE]       needs only Python, takes a few seconds

  1. Autograd              derivatives of everything, in fifty lines
  2. Data and model        a tiny GPT learns to write names
  3. One number, one row   scale, zero-point, error; 6 dB for every bit
  4. Granularity           how many weights share a scale: its price in nats and in bytes
  5. Real formats          llama.cpp's Q8_0 and Q4_0, byte for byte
  6. Integer arithmetic    multiply the codes, rescale once at the end
  7. Outliers              one large feature ruins the rest; two ways out
  8. Better rounding       GPTQ: each weight makes up for the errors of those before it
  9. The bugs people ship  lost signs, short accumulators, leaked test data
  10. The real world       what fits on which device, and how fast it can decode
"""
import argparse, codecs, gc, os, random, struct, sys, time
from collections import Counter, defaultdict
from copy import copy
from itertools import product
from math import ceil, copysign, exp, floor, log, log2, log10, sqrt
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

def show_autograd(h=1e-5):
    def loss(w): return cross_entropy([w, w * -2.0, w * w], 0)
    weight, slope = Value(0.3), (loss(0.3 + h) - loss(0.3 - h)) / (2.0 * h)
    loss(weight).backward()
    print(f"  d loss / d weight: {weight.grad:+.9f} by backward(), {slope:+.9f} by differences")
    check("backward() gives the slope", abs(weight.grad - slope) < 1e-8)

# 2. Data and model --------------------------------------------------------------------------------
# microkv.py explains this model: two look-up tables, `token` and `position`, and seven matrices
# that linear() multiplies by. Rounding has no slope, so we train in floats and round afterwards, in
# many ways. What does a way cost? The loss on names held out can fall by luck: rounding makes some
# letters likelier, and others less so. The divergence of the rounded model's predictions q from the
# full one's, p, KL = Σ p log(p / q), counts every change: what it adds to the loss if p draws them.
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
def with_weights(model, matrices):       # the same forward pass serves all formats
    twin = copy(model)
    twin.weights = model.weights | matrices
    return twin

def predictions(model, names):           # the probabilities of what comes after every letter
    rows = [model.run(name[:-1], KVCache(model.n_layers)) for name in names]
    return list(map(softmax, sum(rows, [])))

def judge(model, names, truth):          # -> (loss on the names, KL from truth)
    found, letters = predictions(model, names), sum((name[1:] for name in names), [])
    loss = sum(-log(q[letter]) for q, letter in zip(found, letters)) / len(letters)
    kl = sum(p * log(p / q) for rows in zip(truth, found) for p, q in zip(*rows)) / len(letters)
    return loss, kl

def show_model(vocabulary, names, held_out, rng, n_steps=200):       # -> (model, loss held out)
    model = GPT(len(vocabulary), rng)
    train(model.parameters(), lambda i: model.loss([names[i % len(names)]]), n_steps, 0.01)
    model = model.frozen()
    loss = model.loss(held_out)
    print(f"  nats per letter on held-out names: {loss:.4f}; guessing: {log(len(vocabulary)):.4f}")
    return model, loss

# 3. One number, one row ---------------------------------------------------------------------------
# b bits name 2^b points, `scale` apart; the code of a weight is the number of the nearest point.
# Symmetric: the largest magnitude sets the scale, and one code stays unused. Asymmetric: from the
# smallest value to the largest; zero_point is the code of 0, which never lies outside: padding and
# what relu cuts off stay exact. An error spread evenly over a step has the mean square scale²/12;
# a bit more halves the step and quarters that: 10 log10(4) = 6.02 decibels of signal-to-noise.
def quantize(values, bits, symmetric=True):
    """values [n] -> (codes [n], signed integers of `bits` bits; scale; zero_point, 0 if symmetric).
    No value is off by more than scale / 2, a normal float; 0 is exact. Jacob et al. 2017, sec. 2.
    ValueError for no values, NaN, magnitudes from 1e300 on, and bits other than 2 to 16."""
    if not values or not all(abs(value) < 1e300 for value in values) or not 2 <= bits <= 16:
        raise ValueError(f"{len(values)} values, {values[:3]} ..., have no codes of {bits} bits")
    low, high, top = min(*values, 0.0), max(*values, 0.0), 2 ** (bits - 1) - 1
    scale = max(-low, high) / top if symmetric else (high - low) / (2 * top + 1)
    scale = max(scale, sys.float_info.min)                   # a row of zeros has one, too
    zero_point = 0 if symmetric else -top - 1 - round(low / scale)
    codes = [round(value / scale) + zero_point for value in values]
    return [min(code, top) for code in codes], scale, zero_point     # both ends may be ties

def dequantize(codes, scale, zero_point):
    """The values that the codes stand for: scale x (code - zero_point)."""
    COUNT["scalings"] += len(codes)
    return [scale * (code - zero_point) for code in codes]

def quantize_rows(matrix, bits): return [quantize(row, bits) for row in matrix]
def dequantize_rows(rows): return [dequantize(*row) for row in rows]
def decimals(values, digits=4): return [f"{value:.{digits}f}" for value in values]

def difference(rows, others):
    """The relative error of a matrix: |rows - others| / |rows|."""
    exact, found = sum(rows, []), sum(others, [])
    return sqrt(sum((a - b) ** 2 for a, b in zip(exact, found)) / sumprod(exact, exact))

def show_codes(row):
    rows = [["weight of `up`", *decimals(row, 3)]]
    for symmetric in (True, False):
        codes, scale, zero_point = quantize(row, 4, symmetric)
        rows.append([f"code (scale {scale:.3f}, zero-point {zero_point})", *codes])
        rows.append(["stands for", *decimals(dequantize(codes, scale, zero_point), 3)])
    table(*rows)

def show_noise(rng, n=2000):             # -> {bits: signal-to-noise of Gaussian numbers}
    values, found, errors = [rng.gauss(0.0, 1.0) for _ in range(n)], {}, {}
    for bits in range(2, 9):
        codes, scale, _ = quantize(values, bits)
        stored = dequantize(codes, scale, 0)
        found[bits] = -20.0 * log10(difference([values], [stored]))
        errors[bits] = [(a - b) / scale for a, b in zip(values, stored)]
    print(f"\n  signal-to-noise of {n:,} Gaussian numbers in dB; theory: {10 * log10(4):.2f} a bit")
    table(["bits", *found], ["signal-to-noise", *decimals(found.values(), 2)],
          ["gain of this bit", "", *decimals([found[i] - found[i - 1] for i in range(3, 9)], 2)])
    print("\n  how many have which error in 4 bits, in steps (1 step = the scale)")
    histogram = Counter(floor(4.0 * error) for error in errors[4])
    bars([(f"{i / 4:+.2f} to {(i + 1) / 4:+.2f}", histogram[i]) for i in range(-2, 2)])
    check("no error exceeds half a step", max(map(abs, sum(errors.values(), []))) <= 0.5 + 1e-9)
    return found

# 4. Granularity -----------------------------------------------------------------------------------
# The largest of the weights that share a scale decides how coarse it is for all: the fewer, the
# finer. But a scale takes 2 bytes (fp16) and a zero-point 1: in groups of n a weight costs b + 16/n
# bits, or b + 24/n. A tensor is a matrix here; a channel, one row of it, makes one output; a group
# is half a row, 32 weights or 8. Stored codes are two's complement: in 4 bits, 15 is -1.
def signed(number, bits): return (number + 2 ** (bits - 1)) % 2 ** bits - 2 ** (bits - 1)
def chunks(values, size): return [values[i:i + size] for i in range(0, len(values), size)]
def fp32(x): return struct.unpack("<f", struct.pack("<f", x))[0]

def pack(codes, bits):
    """Signed codes -> bytes, 2, 3, 4 or 8 bits each, the first lowest; ValueError if too wide."""
    if bits not in (2, 3, 4, 8) or any(signed(code, bits) != code for code in codes):
        raise ValueError(f"{bits} bits are not 2, 3, 4 or 8, or too few for {codes[:9]}")
    stream = sum((code % 2 ** bits) << (bits * i) for i, code in enumerate(codes))
    return stream.to_bytes(ceil(bits * len(codes) / 8), "little")

def unpack(data, bits, n):
    """The n codes behind pack(); ValueError if the data is not as long as n codes are."""
    if bits not in (2, 3, 4, 8) or len(data) != ceil(bits * n / 8):
        raise ValueError(f"{len(data)} bytes for {n} codes of {bits} bits")
    stream = int.from_bytes(data, "little")
    return [signed(stream >> (bits * i), bits) for i in range(n)]

def compress(model, bits, symmetric=True, granularity="channel"):
    """All matrices to bytes and back -> (bytes, by formula, the model that they decode to)."""
    n_bytes, formula, matrices = 0, 0, {}
    for name, matrix in model.weights.items():
        weights, n, decoded = sum(matrix, []), len(matrix[0]), []
        size = {"tensor": len(weights), "channel": n, "group": n // 2}[granularity]
        for group in chunks(weights, size):
            codes, scale, zero_point = quantize(group, bits, symmetric)
            if not symmetric: codes.append(zero_point)       # a code, too; begins a new byte
            data = struct.pack("<e", scale) + pack(codes, bits)
            scale, codes = struct.unpack("<e", data[:2])[0], unpack(data[2:], bits, len(codes))
            if not symmetric: zero_point = codes.pop()
            decoded += dequantize(codes, scale, zero_point)
            n_bytes += len(data)
        formula += len(weights) * bits / 8 + len(weights) / size * (2 if symmetric else 3)
        matrices[name] = chunks(decoded, n)
    return n_bytes, formula, with_weights(model, matrices)

def show_granularity(model, held_out, truth, loss):          # -> {format: (loss, KL, bytes)}
    n, found, rows, exact = len(model.parameters()), {}, [], True
    curves = {"tensor": [], "channel": [], "group": []}
    for bits, kind, per in product((8, 4, 3, 2), ("symmetric", "asymmetric"), curves):
        size, formula, small = compress(model, bits, kind == "symmetric", per)
        after, kl = judge(small, held_out, truth)
        errors = [abs(a - b) for a, b in zip(model.parameters(), small.parameters())]
        row = f"{after:.4f} {after - loss:+.4f} {kl:.6f} {max(errors):.4f} {sum(errors) / n:.4f}"
        rows.append([f"INT{bits}, {kind}, {per}", *row.split(), size, f"{8 * size / n:.2f}"])
        found[bits, kind, per] = after, kl, size
        curves[per].append((size, kl))
        exact = exact and size == formula
    header = "a scale per", "loss", "added", "KL", "worst error", "mean", "bytes", "bits a weight"
    table(header, *rows)
    print()
    plot(f"KL over bytes (both log); FP32: 0 in {4 * n:,} bytes", curves, True, True, height=9)
    check("bytes stored = bytes by formula, in every format", exact, f"{len(found)} formats")
    return found

# 5. Real formats ----------------------------------------------------------------------------------
# llama.cpp's blocks: 32 weights behind one fp16 scale. Q8_0 is symmetric INT8. Q4_0 gives the value
# of largest magnitude the code -8, by a scale with a sign: all 16 codes serve, the other end is
# clipped. Rounding to float32 after every operation, as there, is what makes the bytes the same.
def encode_blocks(row, scale_of, pack_block):
    """Per 32 values the scale, scale_of(block), and the codes: pack_block(block / scale)."""
    if not row or len(row) % 32: raise ValueError(f"{len(row)} values do not fill blocks of 32")
    data = b""
    try:
        for values in chunks(row, 32):
            block = [fp32(x) for x in values]
            scale = fp32(scale_of(block))
            inverse = fp32(1.0 / scale) if scale else 0.0
            data += struct.pack("<e", scale) + pack_block([fp32(x * inverse) for x in block])
    except (OverflowError, ValueError) as error: raise ValueError(f"at byte {len(data)}: {error}")
    return data

def encode_q8_0(row):
    """row [32 n], taken as float32 -> 34 n bytes: per block an fp16 scale and 32 int8 codes.
    ValueError if 32 does not divide the length, for NaN and infinity, and if scale (max / 127) or
    1 / scale overflows: from 8.3e6 on, and 8.9e-44 to 3.7e-37. Below 3.7e-6 zeros come back."""
    def pack_block(xs): return struct.pack("<32b", *(int(x + copysign(0.5, x)) for x in xs))
    return encode_blocks(row, lambda block: max(map(abs, block)) / 127.0, pack_block)

def encode_q4_0(row):
    """row [32 n], taken as float32 -> 18 n bytes: an fp16 scale, then in byte j the codes + 8 of
    weights j (low half) and j + 16. Errors as in Q8_0, with limits 16 times smaller."""
    def pack_block(xs):
        codes = [min(int(fp32(x + 8.5)), 15) for x in xs]
        return bytes(low + 16 * high for low, high in zip(codes, codes[16:]))
    return encode_blocks(row, lambda block: max(block, key=abs) / -8.0, pack_block)

def decode_q8_0(data):
    """34 n bytes -> 32 n floats; ValueError for other lengths."""
    if not data or len(data) % 34: raise ValueError(f"{len(data)} bytes are no blocks of 34")
    return [scale * code for scale, *codes in struct.iter_unpack("<e32b", data) for code in codes]

def decode_q4_0(data):
    """18 n bytes -> 32 n floats; ValueError for other lengths."""
    if not data or len(data) % 18: raise ValueError(f"{len(data)} bytes are no blocks of 18")
    def nibbles(pairs): return [pair % 16 for pair in pairs] + [pair // 16 for pair in pairs]
    return [scale * (code - 8) for scale, *pairs in struct.iter_unpack("<e16B", data)
            for code in nibbles(pairs)]

def show_blocks(weights):                # -> {format: bits per weight}
    found, rows = {}, []
    formats = {"Q8_0": (encode_q8_0, decode_q8_0), "Q4_0": (encode_q4_0, decode_q4_0)}
    for name, (encode, decode) in formats.items():
        data = encode(weights)
        found[name], error = 8 * len(data) / len(weights), difference([weights], [decode(data)])
        rows.append([name, data[:16].hex(" "), len(data), found[name], f"{error:.2%}"])
    table(["`down` in", "scale, first codes", "bytes", "bits per weight", "error"], *rows)
    return found

# 6. Integer arithmetic ----------------------------------------------------------------------------
# Weight-only, W4A16, saves memory: codes become floats before they meet inputs of 16 bits. W8A8
# rounds the inputs too, by one scale for all, and multiplies codes: Σ (s_x q_x)(s_w q_w) = s_x s_w
# Σ q_x q_w, a sum of integers, scaled once. We watch one layer, `up`. All layers multiply by
# linear(), so a function in its place sees their inputs.
matmul = linear                          # under a name that is never replaced
def w4a16(xs, weight): return matmul(xs, dequantize_rows(quantize_rows(weight, 4)))
def output_error(xs, weight, other): return difference(matmul(xs, weight), matmul(xs, other))

def layer_inputs(model, names):
    """Run the names -> {name of a matrix: all vectors that it is multiplied by}."""
    global linear
    inputs, name_of = defaultdict(list), {id(m): name for name, m in model.weights.items()}
    def linear(xs, weight):
        inputs[name_of[id(weight)]] += xs
        return matmul(xs, weight)
    try: model.loss(names)
    finally: linear = matmul
    return inputs

def w8a8(xs, weight, accumulator=32):
    """linear(xs, weight) by integer products, summed up in so many bits, scaled at the end."""
    codes, scale, _ = quantize(sum(xs, []), 8)
    rows = quantize_rows(weight, 8)      # in production once, beforehand
    sums = matmul(chunks(codes, len(xs[0])), [row_codes for row_codes, _, _ in rows])
    COUNT["scalings"] += len(xs) * len(rows)
    COUNT["overflows"] += sum(total != signed(total, accumulator) for total in sum(sums, []))
    return [[signed(total, accumulator) * (scale * row_scale)
             for total, (_, row_scale, _) in zip(totals, rows)] for totals in sums]

def show_integers(up, xs):               # -> {scheme: (products, scalings, bytes)}
    m, n, k, found, rows = len(up), len(xs), len(xs[0]), {}, []
    def stored(bits): return sum(2 + len(pack(row, bits)) for row, _, _ in quantize_rows(up, bits))
    for name, multiply, n_bytes in (("FP16: floats", matmul, 2 * m * k),     # a scale is 2 bytes
                                    ("W4A16: floats", w4a16, stored(4)),
                                    ("W8A8: integers", w8a8, stored(8))):
        COUNT.clear()
        ys = multiply(xs, up)
        found[name] = COUNT["multiply-adds"], COUNT["scalings"], n_bytes
        rows.append([name, f"{difference(matmul(xs, up), ys):.2%}", *found[name]])
    table([f"`up` x {n} inputs", "output error", "products", "scalings", "weight bytes"], *rows)
    formula = [(n * m * k, 0, 2 * m * k), (n * m * k, m * k, m * k // 2 + 2 * m),
               (n * m * k, n * m, m * k + 2 * m)]
    check("products, scalings, bytes counted = formula", list(found.values()) == formula)
    check("no sum overflows int32", COUNT["overflows"] == 0)
    rounded = chunks(dequantize(*quantize(sum(xs, []), 8)), k)
    exact = matmul(rounded, dequantize_rows(quantize_rows(up, 8)))
    check("W8A8 = product of the dequantized numbers, to rounding", difference(exact, ys) < 1e-12)
    return found

# 7. Outliers --------------------------------------------------------------------------------------
# In large transformers a few input columns are up to 20 times as large as the others (Dettmers et
# al. 2022): they set the scale, and the others drown in its error. Here one is planted: an input of
# `up` is scaled to 60, its weights are divided by as much. Two ways out: multiply the large columns
# apart, in floats (LLM.int8()), or move their size over to the weights (SmoothQuant).
def scaled(matrix, factors): return [[x * f for x, f in zip(row, factors)] for row in matrix]
def divided(matrix, factors): return scaled(matrix, [1.0 / f for f in factors])
def largest(matrix): return [max(map(abs, column)) or 1.0 for column in zip(*matrix)]

def outlier_split(xs, weight, multiply, threshold=6.0):
    """LLM.int8(), section 3.2: multiply() the small input columns, the large ones in floats."""
    small = [float(peak < threshold) for peak in largest(xs)]
    outliers = scaled(xs, [1.0 - keep for keep in small])    # production gathers these columns
    return list(map(add, multiply(scaled(xs, small), weight), matmul(outliers, weight)))

def smoothing(xs, weight):
    """SmoothQuant, equation 4 with alpha 1/2: divide each input column by √(max|x| / max|w|) and
    multiply its weights. By a power of two here, so that the full-precision product stays exact."""
    return [2.0 ** round(log2(x / w) / 2.0) for x, w in zip(largest(xs), largest(weight))]

def show_outliers(up, inputs, unseen, rng, magnitude=60.0):          # -> {scheme: output error}
    grow, column = [1.0] * len(inputs[0]), rng.randrange(len(inputs[0]))
    grow[column] = magnitude / largest(inputs)[column]
    planted, weight = scaled(unseen, grow), divided(up, grow)
    factors = smoothing(scaled(inputs, grow), weight)
    smooth, migrated = divided(planted, factors), scaled(weight, factors)
    outputs = {"nothing planted": w8a8(unseen, up), "planted": w8a8(planted, weight),
               "planted, LLM.int8()": outlier_split(planted, weight, w8a8),
               "planted, SmoothQuant": w8a8(smooth, migrated)}
    exact = matmul(planted, weight)
    found = {name: difference(exact, ys) for name, ys in outputs.items()}
    print(f"  Output error of `up` in INT8, input {column} multiplied by {grow[column]:.1f}:")
    bars([(name, 100 * error) for name, error in found.items()], " %")
    apart = difference(matmul(unseen, up), outlier_split(planted, weight, matmul))
    check("planting and LLM.int8()'s split: unchanged in floats, to rounding", apart < 1e-12)
    check("SmoothQuant: same, bit for bit", matmul(smooth, migrated) == exact)
    return found

# 8. Better rounding -------------------------------------------------------------------------------
# The nearest code is best for one weight, not for a sum of many: where inputs rise and fall
# together, one weight's error can make up for another's. Rounding a row w to w - e changes the
# outputs by X e, X being the inputs of a calibration set: |X e|² = eᵀ H e, H = XᵀX (the Hessian,
# halved). With H = R Rᵀ, R upper triangular, it is |Rᵀ e|² = Σ_j (R_jj e_j + Σ_{i<j} R_ij e_i)²:
# square j depends on no later error. So go from left to right and add Σ_{i<j} R_ij e_i / R_jj, the
# error fed forward, to weight j before rounding it. (The paper comes to the same by inverting H.)
def cholesky(h):                         # -> the columns of the upper triangular R with R Rᵀ = h
    columns = []
    while h:
        column = [x / sqrt(h[-1][-1]) for x in h[-1]]
        columns.insert(0, column)
        h = [[x - a * b for x, b in zip(row[:-1], column)] for row, a in zip(h[:-1], column)]
    return columns

def gptq(weight, inputs, bits):
    """weight [m][n], inputs [k][n] -> [m] of (codes, scale, 0), on the grid of quantize(row, bits).
    Frantar et al. 2022, section 3, less column order and groups. ValueError: none, ragged, NaN."""
    if not weight or not inputs or len({len(row) for row in [*weight, *inputs]}) != 1:
        raise ValueError(f"{len(weight)} rows and {len(inputs)} inputs, not all of one length")
    found, features = quantize_rows(weight, bits), list(zip(*inputs))
    h = [[sumprod(a, b) for b in features] for a in features]
    damping = 0.01 * sum(row[i] for i, row in enumerate(h)) / len(h) or 1.0    # lest H be singular
    for i, row in enumerate(h): row[i] += damping
    columns, top = cholesky(h), 2 ** (bits - 1) - 1
    for row, (codes, scale, _) in zip(weight, found):
        errors = []
        for j, column in enumerate(columns):
            target = row[j] + sumprod(errors, column[:-1]) / column[-1]
            codes[j] = min(max(round(target / scale), -top), top)
            errors.append(row[j] - scale * codes[j])
    return found

def show_gptq(model, inputs, unseen, held_out, truth):       # -> {(bits, method): a row's numbers}
    def nearest(weight, xs, bits): return quantize_rows(weight, bits)
    up, found, rows = model.weights["up0"], {}, []
    for bits, method in product((4, 3, 2), (nearest, gptq)):
        rounded = {name: dequantize_rows(method(model.weights[name], xs, bits))
                   for name, xs in inputs.items()}
        seen, test = (output_error(xs["up0"], up, rounded["up0"]) for xs in (inputs, unseen))
        loss, kl = judge(with_weights(model, rounded), held_out, truth)
        found[bits, method.__name__] = seen, test, loss, kl
        row = f"{seen:.2%} {test:.2%} {loss:.4f} {kl:.6f}"
        rows.append([f"INT{bits}, {method.__name__}", *row.split()])
    table(["all layers rounded", "error of `up`, calibration", "held out", "loss", "KL"], *rows)
    better = found[3, "gptq"][0] / found[3, "nearest"][0]
    check("GPTQ beats nearest in 3 bits (calibration)", better < 1.0, f"{better:.0%} of it")
    return found

# 9. The bugs people ship --------------------------------------------------------------------------
# One mistake each, most of them in the layer `up`: its symptom with the bug, then without it.
def lose_signs(up, xs):
    """Nibbles read as 0 ... 15, without sign extension -> output errors."""
    rows = quantize_rows(up, 4)
    unsigned = [([code % 16 for code in codes], scale, 0) for codes, scale, _ in rows]
    return [output_error(xs, up, dequantize_rows(read)) for read in (unsigned, rows)]

def sum_in(accumulator, up, xs):         # W8A8 -> (output error, share of sums that overflow)
    COUNT.clear()
    error = difference(matmul(xs, up), w8a8(xs, up, accumulator))
    return error, COUNT["overflows"] / COUNT["scalings"]

def calibrate_on_test(up, inputs, test):
    """GPTQ in 3 bits that has seen the test set, or as many other inputs -> output errors."""
    return [output_error(test, up, dequantize_rows(gptq(up, xs, 3)))
            for xs in (test, inputs[:len(test)])]

def share_of_zeros(weights): return quantize(weights, 8)[0].count(0) / len(weights)
def leave_out_zero(row): return (max(row) - min(row)) / 255, quantize(row, 8, symmetric=False)[1]

def show_bugs(up, inputs, unseen):       # -> {symptom: (with the bug, correct)}
    narrow, wide = sum_in(16, up, unseen), sum_in(32, up, unseen)
    crushed = share_of_zeros([60.0, *sum(up, [])]), share_of_zeros(sum(up, []))
    found = {"INT4 unpacked without sign extension: output error": lose_signs(up, unseen),
             "INT8 products summed in int16: output error": (narrow[0], wide[0]),
             "... share of sums that overflow": (narrow[1], wide[1]),
             "one INT8 scale, an outlier of 60: share of zeros": crushed,
             "GPTQ calibrated on test data: error": calibrate_on_test(up, inputs, unseen[:30]),
             "constant row, range without 0: scale to divide by": leave_out_zero([0.3] * 8)}
    table(["symptom", "bug", "correct"], *([name, *decimals(pair)] for name, pair in found.items()))
    return found

# 10. The real world -------------------------------------------------------------------------------
# Every token reads all weights: bandwidth / bytes is a ceiling on tokens per second, if they fit at
# all; caches come on top. Public config files, vendor data sheets: weights; bytes/s and bytes.
MODELS = {"Llama-3-8B": 8.03e9, "Llama-3.1-70B": 70.6e9, "Llama-3.1-405B": 405e9}
DEVICES = {"RTX 4090, 24 GB": (1.008e12, 24e9), "H100, 80 GB": (3.35e12, 80e9)}

def show_real_world(block_bits):         # -> {(model, format): bytes of weights}
    def speed(size, bandwidth, memory):
        return f"{bandwidth / size:,.0f}" if size < memory else f"({ceil(size / memory)} needed)"
    formats = {"FP16": 16.0, **block_bits, "INT3/128": 3 + 16 / 128, "INT2/128": 2 + 16 / 128}
    found, rows = {}, []
    for (model, n_weights), (name, bits) in product(MODELS.items(), formats.items()):
        found[model, name] = size = n_weights * bits / 8
        speeds = [speed(size, *device) for device in DEVICES.values()]
        rows.append([f"{model} in {name}", f"{bits:.3f}", f"{size / 1e9:.1f}", *speeds])
    table(["tokens/s at most (/128: weights per scale)", "bits a weight", "GB", *DEVICES], *rows)
    return found

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
    del held_out[40:]                    # of a long list
    section("1. Autograd", show_autograd)
    model, loss = section("2. Data and model", show_model, vocabulary, names, held_out, rng)
    inputs, unseen = layer_inputs(model, names[:16]), layer_inputs(model, held_out)
    up, truth = model.weights["up0"], predictions(model, held_out)
    section("3. One number, one row", show_codes, up[0][:8])
    decibels = show_noise(rng)
    formats = section("4. Granularity", show_granularity, model, held_out, truth, loss)
    block_bits = section("5. Real formats", show_blocks, sum(model.weights["down0"], []))
    products = section("6. Integer arithmetic", show_integers, up, unseen["up0"])
    outliers = section("7. Outliers", show_outliers, up, inputs["up0"], unseen["up0"], rng)
    rounding = section("8. Better rounding", show_gptq, model, inputs, unseen, held_out, truth)
    bugs = section("9. The bugs people ship", show_bugs, up, inputs["up0"], unseen["up0"])
    sizes = section("10. The real world", show_real_world, block_bits)
    return finish(started, loss=loss, decibels=decibels, formats=formats, block_bits=block_bits,
                  products=products, outliers=outliers, rounding=rounding, bugs=bugs, sizes=sizes)

if __name__ == "__main__": run(main, names=read_names)
