"""Choosing the next token: filters shape it, search maximises it, speculation makes it cheap.

A language model gives every token a probability; somebody still has to choose. Filters cut the tail
of unlikely tokens. Search finds the most probable text, often a short one. In speculative decoding
a small model guesses, a large one checks several guesses in a pass, and the distribution stays.

  Holtzman et al. 2019 (1904.09751) nucleus       Stahlberg & Byrne 2019 (1908.10090) exact search
  Wu et al. 2016 (1609.08144) length penalty      Leviathan et al. 2022 (2211.17192) speculation
  Chen et al. 2023 (2302.01318) the same
  python microbeam.py [--seed N] [--names FILE]   needs only Python, takes a few seconds

  1. Autograd              what temperature does to a distribution, as a derivative
  2. Data and models       a tiny GPT learns to write names, and a tinier one, its draft
  3. Filters               temperature, top-k, top-p and min-p on one real distribution
  4. Search                greedy, beam and exact search; the most probable name disappoints
  5. Sampling quality      likelihood against diversity, strategy by strategy
  6. Speculative decoding  several tokens per pass of the large model, the distribution unchanged
  7. The bugs people ship  a biased acceptance, a stale cache, an unfair beam
  8. The real world        published pairs, and the batch at which speculation loses
"""
import argparse, codecs, gc, os, random, sys, time
from collections import defaultdict
from copy import copy, deepcopy
from functools import lru_cache
from heapq import heappop, heappush
from math import ceil, exp, inf, isfinite, isnan, log, sqrt
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

def show_temperature_slope(rng):
    """Temperature t divides logits z: in b = 1/t, the mean of z under softmax(b z) has the slope
    Σ p z² - (Σ p z)², a variance, never negative: cooling moves mass to the likely tokens."""
    logits, inverse = [rng.gauss(0.0, 2.0) for _ in range(8)], Value(1.0)
    dot(softmax([inverse * z for z in logits]), logits).backward()
    p = softmax(logits)
    variance = dot(p, [z * z for z in logits]) - dot(p, logits) ** 2
    print(f"  8 logits: d mean / d (1/t) = {inverse.grad:.9f}, their variance {variance:.9f}")
    check("slope of the mean logit in 1/t = variance", abs(inverse.grad - variance) < 1e-9)

# 2. Data and models -------------------------------------------------------------------------------
# Token 0, printed as ".", begins and ends a name. A GPT (microkv) gives a score, a logit, to every
# token that may come next. The target is the model whose names we want, the draft an imitation.
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
MAX_LEN = 20                             # tokens of a name, the boundary that ends it included

# One pass of a model over what its cache does not hold yet -> the logits after each new token.
def read(model, cache, text): return model.run(text[cache.length:], cache, cache.length)

@lru_cache(maxsize=10_000)               # searches and samples ask for the same prefixes again
def run_prefix(model, prefix):           # a tuple of tokens -> (logits of the next, the cache)
    cache = deepcopy(run_prefix(model, prefix[:-1])[1]) if prefix[1:] else KVCache(model.n_layers)
    return read(model, cache, prefix)[0], cache

def show_models(vocabulary, names, held_out, rng):
    """Train the target and the draft -> (both, their losses)."""
    models, losses = [], {"a uniform guess": log(len(vocabulary))}
    for role, d_model, steps, rate in ("target", 16, 190, 0.01), ("draft", 4, 140, 0.03):
        model = GPT(len(vocabulary), rng, d_model=d_model)
        train(model.parameters(), lambda i: model.loss([names[i % len(names)]]), steps, rate)
        models.append(model.frozen())
        losses[f"the {role}, {len(model.parameters()):,} weights"] = models[-1].loss(held_out)
    print(f"  {len(names)} names to learn, {len(held_out)} held out; nats per letter on the latter")
    bars(list(losses.items()))
    return models, losses

# 3. Filters ---------------------------------------------------------------------------------------
# Each token of the tail is improbable, all together are not: sooner or later one spoils the text.
# Filters keep what is at or above a floor, and rescale it to a sum of 1. The floor is set by a rank
# (top-k), by the mass above it (top-p, the nucleus) or by the top token (min-p). Ties all stay.
def require_probabilities(*rows):
    for row in rows:                     # each over as many tokens as the first
        fair = row and len(row) == len(rows[0]) and min(row) >= 0.0 and abs(sum(row) - 1.0) < 1e-6
        if not fair: raise ValueError(f"not the probabilities of {len(rows[0])} tokens: {row[:5]}")

def keep(probs, floor):
    total = sum(p for p in probs if p >= floor)
    return [p / total if p >= floor else 0.0 for p in probs]

def apply_temperature(logits, t):
    """softmax(logits / t) -> probabilities. t = 0 is the limit: all on the largest (ties share)."""
    if not 0.0 <= t < inf: raise ValueError(f"temperature {t}, must be at least 0 and finite")
    top = max(logits, default=-inf)
    if not isfinite(top) or any(map(isnan, logits)): raise ValueError(f"logits {logits[:5]}")
    if t == 0.0: return keep([float(z == top) for z in logits], 1.0)
    return softmax([(z - top) / t for z in logits])

def top_k(probs, k):
    """Keep the k most probable tokens, and what ties with the last; k may exceed the vocabulary."""
    require_probabilities(probs)
    if not (k >= 1 and k % 1 == 0): raise ValueError(f"top-k {k}, must be 1, 2, 3, ...")
    return keep(probs, sorted(probs, reverse=True)[min(int(k), len(probs)) - 1])

def top_p(probs, p):
    """Keep the fewest tokens of mass p or more, and ties with the last. Holtzman, section 3.1."""
    require_probabilities(probs)
    if not 0.0 <= p <= 1.0: raise ValueError(f"top-p {p}, must be in 0..1")
    floor, mass = max(probs), 0.0
    for prob in sorted(probs, reverse=True):
        if mass >= p - 1e-12 and p < 1.0: break              # in floats, 0.7 + 0.2 < 0.9
        floor = prob
        mass += prob
    return keep(probs, floor)

def min_p(probs, p):
    """Keep what has at least p times the probability of the top token."""
    require_probabilities(probs)
    if not 0.0 <= p <= 1.0: raise ValueError(f"min-p {p}, must be in 0..1")
    return keep(probs, p * max(probs))

PLAIN, GREEDY = ("temperature", 1.0), ("temperature", 0.0)   # a rule: its kind and its strength
RULES = [("temperature", 1.5), PLAIN, ("temperature", 0.7), ("temperature", 0.4), GREEDY,
         ("top-k", 5), ("top-p", 0.8), ("min-p", 0.3)]

def choose(logits, rule):                # -> the probabilities to draw from
    kind, strength = rule
    if kind == "temperature": return apply_temperature(logits, strength)
    return {"top-k": top_k, "top-p": top_p, "min-p": min_p}[kind](softmax(logits), strength)

def probs_after(model, prefix, rule): return choose(run_prefix(model, tuple(prefix))[0], rule)
def draw(probs, rng): return rng.choices(range(len(probs)), probs)[0]

def show_filters(model, vocabulary, prefix):
    before, rows = probs_after(model, prefix, PLAIN), []
    print(f"  the eight most probable tokens after {''.join(vocabulary[x] for x in prefix)!r}")
    bars([(token, 100 * p) for p, token in sorted(zip(before, vocabulary), reverse=True)[:8]], " %")
    for kind, strength in RULES:
        after = probs_after(model, prefix, (kind, strength))
        cut = [p for p, left in zip(before, after) if not left]
        rows.append([f"{kind} {strength}", len(after) - len(cut), f"{sum(cut):.1%}",
                     f"{max(after):.1%}"])
    table(["left by the rule", "tokens kept", "mass cut", "top token"], *rows)

# 4. Search ----------------------------------------------------------------------------------------
# Which text is the most probable? Greedy search takes the best token each time, and may regret it.
# Beam search carries the `width` best prefixes along, all of one length. Exact search continues the
# best prefix of any length. Every token costs probability, so sums favour short texts; a penalty
# divides by length: Wu et al. 2016, equation 14. A hypothesis is (its cost -log P, its tokens).
def normalised(score, length, penalty): return score / ((5.0 + length) / 6.0) ** penalty

def continuations(step, start, eos, cost, tokens):           # -> hypotheses one token longer
    row = step([*start, *tokens])
    if not 0 <= eos < len(row): raise ValueError(f"eos {eos}, but {len(row)} log-probabilities")
    if not all(x <= 1e-9 for x in row): raise ValueError(f"not log-probabilities: {row[:5]}")
    COUNT["prefixes expanded"] += 1
    return [(cost - x, (*tokens, token)) for token, x in enumerate(row) if x > -inf]

def beam_search(step, start, eos, width, max_len, length_penalty=0.0):
    """-> at most `width` finished hypotheses, best first: [(tokens after start, total log P)].
    step(prefix) -> one log-probability per token. max_len counts generated tokens, eos included."""
    if not start or min(width, max_len) < 1: raise ValueError(f"{start=}, {width=}, {max_len=}")
    def ends(hypothesis): return hypothesis[1][-1] == eos
    def rank(hypothesis): return normalised(hypothesis[0], len(hypothesis[1]), length_penalty)
    live, finished = [(0.0, ())], []
    for length in range(1, max_len + 1):
        children = sorted(c for parent in live for c in continuations(step, start, eos, *parent))
        finished = sorted([*finished, *filter(ends, children[:width])], key=rank)[:width]
        live = [child for child in children if not ends(child)][:width]
        if not live: break
        # The cost of a live one only grows; the penalty does most for it at one of two lengths.
        hope = min(normalised(live[0][0], n, length_penalty) for n in (length + 1, max_len))
        if len(finished) == width and rank(finished[-1]) <= hope: break
    return [(list(tokens), -cost) for cost, tokens in finished]

def exact_search(step, start, eos, max_len):
    """-> (tokens after start, total log P) of the most probable text that ends, or ValueError. The
    likeliest prefix goes first; probabilities only fall: nothing can overtake a finished one."""
    if not start or max_len < 1: raise ValueError(f"{start=}, {max_len=}")
    heap = [(0.0, ())]
    while heap:
        cost, tokens = heappop(heap)
        if tokens[-1:] == (eos,): return list(tokens), -cost
        for child in continuations(step, start, eos, cost, tokens):
            if child[1][-1] == eos or len(child[1]) < max_len: heappush(heap, child)
    raise ValueError(f"no text of at most {max_len} tokens can end with token {eos}")

def show_search(model, starts):
    """Beams beside the exact maximum, the mode -> {(width, penalty): [(name, log P) by start]}"""
    def step(prefix): return [log(p) for p in probs_after(model, prefix, PLAIN)]
    COUNT.clear()
    modes = [exact_search(step, start, BOUNDARY, MAX_LEN) for start in starts]
    expanded, found, rows, highest = COUNT["prefixes expanded"], {}, [], -inf
    for width, penalty in (1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (16, 0.0), (16, 1.0):
        beams = [beam_search(step, start, BOUNDARY, width, MAX_LEN, penalty) for start in starts]
        found[width, penalty] = [beam[0] if beam else ([BOUNDARY], -inf) for beam in beams]
    found["exact", "-"] = modes
    for (width, penalty), names in found.items():
        gaps = [score - best for (_, score), (_, best) in zip(names, modes)]
        highest = max(highest, *gaps)
        letters = sum(len(name) - 1 for name, _ in names) / len(names)
        rows.append([f"{width}", f"{penalty}", f"{letters:.2f}", sum(gap < -1e-9 for gap in gaps)])
    print(f"  the best name after nothing and after every first letter: {len(starts)} starts")
    table(["beam width", "length penalty", "mean letters added", "maximum missed"], *rows)
    check("no beam is above the exact maximum", highest < 1e-9)
    limit = sum(MAX_LEN / exp(best) for _, best in modes)    # each is as probable as its mode
    check("prefixes expanded: at most max_len / P(mode)", expanded <= limit, f"{expanded:,}")
    return found

def sample(model, rule, rng):            # -> (a name, its log P under the model, in nats)
    tokens, log_p = [], 0.0
    while len(tokens) < MAX_LEN and tokens[-1:] != [BOUNDARY]:
        logits, _ = run_prefix(model, (BOUNDARY, *tokens))
        tokens.append(draw(choose(logits, rule), rng))
        log_p -= cross_entropy(logits, tokens[-1])
    return tuple(tokens), log_p

def show_curse(model, vocabulary, mode, rng):
    """The most probable name is not a typical one."""
    text = "".join(vocabulary[token] for token in mode[0])
    drawn = {"samples": [sample(model, PLAIN, rng) for _ in range(200)], f"mode {text!r}": [mode]}
    points = {kind: [(len(x) - 1, log_p) for x, log_p in drawn[kind]] for kind in drawn}
    print()
    plot("log P of whole names, in nats, over their letters", points, height=8)

# 5. Sampling quality ------------------------------------------------------------------------------
# Names should be probable, and should not repeat. Either is easy at the price of the other: greedy
# search writes one name for ever. Rules are compromises: in the chart, the best is up and right.
# Total variation: the most by which the chance of any event differs between two distributions.
def total_variation(p, q): return 0.5 * sum(abs(a - b) for a, b in zip(p, q))

def show_quality(model, names, rng, n=150):
    """n names by each rule -> {rule: (log P, distinct, memorised, TV of lengths)}"""
    known, results, curves = {tuple(name[1:]) for name in names}, {}, defaultdict(list)
    def lengths(texts): return [sum(len(x) == i for x in texts) / len(texts) for i in range(23)]
    for rule in RULES:
        drawn, scores = zip(*(sample(model, rule, rng) for _ in range(n)))
        log_p, distinct = sum(scores) / n, len(set(drawn)) / n
        memorised = sum(name in known for name in drawn) / n
        results[rule] = log_p, distinct, memorised, total_variation(lengths(drawn), lengths(known))
        curves[rule[0]].append((100 * distinct, log_p))
    print(f"  {n} names by each rule; lengths: total variation from those of the names to learn")
    table(["rule", "mean log P, nats", "distinct", "memorised", "lengths"], *(
        [f"{kind} {strength}", f"{log_p:.2f}", *(f"{share:.1%}" for share in shares)]
        for (kind, strength), (log_p, *shares) in results.items()))
    print()
    plot("mean log P, in nats, over the share of distinct names in %", curves, height=8)
    return results

# 6. Speculative decoding --------------------------------------------------------------------------
# A model reads its weights once a pass, for one token or many (microkv). So a draft model proposes
# gamma tokens, each *drawn* from its q; one pass of the target gives its p at all places. Accept x
# with probability min(1, p(x) / q(x)); at the first rejection draw from the residual max(0, p - q),
# rescaled; if all are accepted, draw one more from the last p. Exact: x is drafted and accepted
# with probability min(p, q); a rejection has 1 - Σ min(p, q) = Σ max(0, p - q), which is what
# rescales the residual, and so adds max(0, p - q): in all, p.
def residual(p, q):
    rest = [max(0.0, a - b) for a, b in zip(p, q)]
    return keep(rest, 0.0) if any(rest) else p               # if p = q, nothing is ever rejected

def speculative_step(p_rows, q_rows, drafted, rng):
    """One round -> (the accepted tokens, the next). Leviathan et al. 2022, algorithm 1.
    drafted [gamma]: drawn from the rows of q_rows [gamma][vocab_size]; p_rows: one row more."""
    require_probabilities(*p_rows, *q_rows)
    if not len(p_rows) - 1 == len(q_rows) == len(drafted):
        raise ValueError(f"{len(drafted)} tokens, {len(p_rows)} rows of p, {len(q_rows)} of q")
    COUNT["rounds"] += 1
    for i, (p, q, token) in enumerate(zip(p_rows, q_rows, drafted)):
        if not (0 <= token < len(q) and q[token]): raise ValueError(f"{token=}, not from its q")
        COUNT["tests"] += 1
        COUNT["Σ min(p, q)"] += sum(map(min, p, q))
        if rng.random() >= min(1.0, p[token] / q[token]):
            return list(drafted[:i]), draw(residual(p, q), rng)
        COUNT["accepted"] += 1
    return list(drafted), draw(p_rows[-1], rng)

def speculate(target, draft, gamma, rule, rng, start=(BOUNDARY,)):
    """Write a name -> its tokens after start. One rule for p and q; gamma = 0 is plain decoding."""
    text, target_cache, draft_cache = list(start), KVCache(target.n_layers), KVCache(draft.n_layers)
    while len(text) <= MAX_LEN and BOUNDARY not in text[1:]:
        drafted, q_rows = [], []
        for _ in range(gamma):                                               # draft
            q_rows.append(choose(read(draft, draft_cache, text + drafted)[-1], rule))
            drafted.append(draw(q_rows[-1], rng))
        logits = read(target, target_cache, text + drafted)                  # verify
        p_rows = [choose(row, rule) for row in logits[-gamma - 1:]]
        accepted, token = speculative_step(p_rows, q_rows, drafted, rng)     # accept
        text += [*accepted, token]
        for cache in target_cache, draft_cache: cache.truncate(len(text) - 1)        # roll back
    end = [*text, BOUNDARY].index(BOUNDARY, 1) + 1           # the last round may have gone too far
    return text[len(start):min(end, MAX_LEN + 1)]

def outcomes(p, q, drafts, rest):
    """-> the chance of every token to be drafted (by `drafts`) and accepted; to be from `rest`."""
    accepted = [d * min(1.0, a / b) if d else 0.0 for a, b, d in zip(p, q, drafts)]
    rejected = sum(drafts) - sum(accepted)
    return accepted, [rejected * r for r in rest]

def speculative_distribution(p, q):
    """The exact distribution of what comes out of drafting from q and testing by p: p itself."""
    require_probabilities(p, q)
    return add(*outcomes(p, q, q, residual(p, q)))

def sequence_distribution(p_of, q_of, gamma, length, text=(), n=0):
    """-> {text: probability} after `length` more tokens; n drafts of this round are accepted."""
    if length == 0: return {text: 1.0}
    p, q, result = p_of(text), q_of(text), defaultdict(float)
    accepted, rest = outcomes(p, q, q, residual(p, q)) if n < gamma else ([], p)
    for chances, n in (accepted, n + 1), (rest, 0):
        for token, chance in enumerate(chances):
            if chance == 0.0: continue
            ends = sequence_distribution(p_of, q_of, gamma, length - 1, (*text, token), n)
            for end, more in ends.items(): result[end] += chance * more
    return result

def check_one_token(models, contexts):
    pairs = [[probs_after(model, x, rule) for model in models] for x in contexts for rule in RULES]
    error = max(total_variation(speculative_distribution(p, q), p) for p, q in pairs)
    check("one token by any rule, over all drafts: the target's", error < 1e-12, f"{error:.0e}")

def check_three_tokens(target, draft):
    def p_of(text): return probs_after(target, (BOUNDARY, *text), ("top-k", 3))
    def q_of(text): return probs_after(draft, (BOUNDARY, *text), ("top-k", 3))
    error = max(abs(chance - p_of(())[a] * p_of((a,))[b] * p_of((a, b))[c]) for gamma in (1, 2, 3)
                for (a, b, c), chance in sequence_distribution(p_of, q_of, gamma, 3).items())
    check("three tokens of top-k 3, over all rounds: the target's", error < 1e-12, f"{error:.0e}")

def check_samples(p, q, rng, n=3000):
    """Chi-square of n tokens. With d degrees of freedom, d + 2 √(d x) + 2 x is exceeded with a
    probability of at most e^-x (Laurent & Massart 2000, lemma 1): here x = 14, one in a million."""
    drawn = []
    while len(drawn) < n:
        accepted, token = speculative_step([p] * 3, [q] * 2, [draw(q, rng), draw(q, rng)], rng)
        drawn += [*accepted, token]
    statistic = sum((drawn[:n].count(x) - n * a) ** 2 / (n * a) for x, a in enumerate(p) if a)
    d = sum(a > 0.0 for a in p) - 1
    limit = d + 2.0 * sqrt(d * 14.0) + 28.0
    check(f"chi-square of {n:,} tokens", statistic < limit, f"{statistic:.1f} < {limit:.1f}")

def check_greedy(target, draft, contexts, rng):
    plain, fast = ([speculate(target, draft, n, GREEDY, rng, x) for x in contexts] for n in (0, 4))
    check("greedy speculation writes the greedy text", plain == fast, f"{len(contexts)} starts")

def expected_tokens(alpha, gamma):
    """Tokens per target pass: Σ alpha^i, i = 0..gamma drafts accepted in a row. Leviathan, eq. 1.
    Only approximate: alpha varies with the context, and a mean of powers exceeds the mean's."""
    if not 0.0 <= alpha <= 1.0 or gamma < 0 or gamma % 1: raise ValueError(f"{alpha=}, {gamma=}")
    return sum(alpha ** i for i in range(int(gamma) + 1))

# Leviathan et al., theorem 3.8: a drafted token costs c passes of the target.
def speedup(alpha, gamma, c): return expected_tokens(alpha, gamma) / (gamma * c + 1.0)

def show_speculation(target, draft, rng, n_names=45):
    """Names by speculation, counted -> {gamma: (accepted, Σ min(p, q), tokens a pass, formula)}"""
    rows, results = [], {}
    for gamma in (0, 1, 2, 4, 8):
        COUNT.clear()
        n_tokens = sum(len(speculate(target, draft, gamma, PLAIN, rng)) for _ in range(n_names))
        tests, rounds, work = max(1, COUNT["tests"]), COUNT["rounds"], COUNT["multiply-adds"]
        alpha, chance = COUNT["accepted"] / tests, COUNT["Σ min(p, q)"] / tests
        results[gamma] = alpha, chance, 1.0 + alpha * tests / rounds, expected_tokens(alpha, gamma)
        rows.append([gamma, *(f"{x:.2f}" for x in results[gamma]), round(work / n_tokens)])
    print("  gamma: tokens drafted a round; multiply-adds: of both models, per token of a name")
    table(["gamma", "accepted", "Σ min(p, q)", "tokens a pass", "formula", "multiply-adds"], *rows)
    return results

def show_speedup(alpha, cost):
    gains = {c: [speedup(alpha, gamma, c) for gamma in range(11)] for c in (0.02, cost, 0.2, 0.5)}
    curves = {f"c {c:.3f}: {max(row):.2f}x": [*enumerate(row)] for c, row in gains.items()}
    plot(f"speed-up over gamma if {alpha:.0%} are accepted; c: cost of a draft", curves, height=8)

# 7. The bugs people ship --------------------------------------------------------------------------
# What a biased sampler writes looks like names, so it passes for correct. Each bug is measured by
# the total variation between the distribution it draws from and the p that it should.
def bias(p, q, drafts, rest): return total_variation(p, add(*outcomes(p, q, drafts, rest)))
# The draft takes its favourite, but the test divides by q as if it had drawn.
def drafts_greedily(p, q): return bias(p, q, keep(q, max(q)), residual(p, q))
def redraws_from_p(p, q): return bias(p, q, q, p)

def rescales_late(p, q):
    """top-p cuts both, but q is rescaled to a sum of 1 only after the test."""
    cut_p, cut_q = top_p(p, 0.8), top_p(q, 0.8)
    raw_q = [x if kept else 0.0 for x, kept in zip(q, cut_q)]
    return bias(cut_p, raw_q, cut_q, residual(cut_p, raw_q))

def keeps_rejected(model, prefix, truncate=False):
    """A rejected draft, here a second boundary, stays in the cache when decoding goes on."""
    cache = KVCache(model.n_layers)
    read(model, cache, [*prefix[:-1], BOUNDARY])
    if truncate: cache.truncate(len(prefix) - 1)
    logits = model.run(prefix[-1:], cache, len(prefix) - 1)[0]
    return total_variation(probs_after(model, prefix, PLAIN), softmax(logits))

def show_bugs(target, draft, contexts):  # -> {bug: its bias in every context}
    pairs = [(probs_after(target, x, PLAIN), probs_after(draft, x, PLAIN)) for x in contexts]
    results = {"drafts greedily, tests by p/q": [drafts_greedily(p, q) for p, q in pairs],
               "redraws from p, not the residual": [redraws_from_p(p, q) for p, q in pairs],
               "top-p, q rescaled after the test": [rescales_late(p, q) for p, q in pairs],
               "cache not rolled back": [keeps_rejected(target, x) for x in contexts]}
    check("the first two bugs bias every context", min(map(min, list(results.values())[:2])) > 1e-9)
    results["cache rolled back"] = right = [keeps_rejected(target, x, True) for x in contexts]
    check("cache rolled back: p as one by one", not any(right), f"{len(right)} contexts")
    table(["bug", "contexts", "biased", "total variation: mean", "largest"], *(
        [bug, len(tv), sum(x > 1e-9 for x in tv), f"{sum(tv) / len(tv):.3f}", f"{max(tv):.3f}"]
        for bug, tv in results.items()))
    return results

def show_unfair_beam(found):
    """By raw sums a short text that ended beats all that go on, which the penalty is to prevent."""
    fair, raw = ([normalised(x, len(name), 1.0) for name, x in found[16, n]] for n in (1.0, 0.0))
    worse = sum(map(float.__lt__, raw, fair))
    print(f"  a beam of 16 by raw sums: worse normalised score after {worse} of {len(raw)} starts")
    check("a beam by raw sums finds no better score", all(map(float.__ge__, fair, raw)))

# 8. The real world --------------------------------------------------------------------------------
# Leviathan et al. 2022, T5-XXL, English to German, greedy: gamma, alpha, speed-up: table 2, c:
# appendix. Chen et al. 2023: 14.1 ms a token, the draft 1.8; HumanEval. Its alpha is not given.
PAIRS = [("T5-small", 7, 0.75, 0.02, "3.4x"), ("T5-large", 7, 0.82, 0.11, "1.7x"),
         ("Chinchilla, alpha assumed", 4, 0.80, 1.8 / 14.1, "2.46x")]

def losing_batch(alpha, gamma, c, ridge=989e12 / 3.35e12):   # H100: FLOP/s, bytes/s
    """From here on speculation loses. Below the ridge (microkv) a pass waits for weights: decoding
    costs 1, drafting gamma c, verification (gamma + 1) batch / ridge. Caches are left out."""
    return ridge * (expected_tokens(alpha, gamma) - gamma * c) / (gamma + 1)

def show_real_world(gamma=4, c=8.03 / 70.6):                 # Llama 3.1-8B drafts for 70B
    table(["published pair", "gamma", "alpha", "c", "formula", "measured"], *(
        [name, n, f"{alpha:.2f}", f"{c:.3f}", f"{speedup(alpha, n, c):.2f}x", measured]
        for name, n, alpha, c, measured in PAIRS))
    print(f"\n  Llama 70B drafted by 8B on H100, gamma {gamma}, c {c:.3f}")
    table(["alpha", "speed-up of batch 1", "loses from a batch of"], *(
        [f"{alpha}", f"{speedup(alpha, gamma, c):.2f}x", ceil(losing_batch(alpha, gamma, c))]
        for alpha in (0.9, 0.8, 0.6)))

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
    starts = [[BOUNDARY]] + [[BOUNDARY, letter] for letter in sorted({name[1] for name in names})]
    contexts = sorted({tuple(name[:n]) for name in held_out[:25] for n in range(1, len(name))})
    section("1. Autograd", show_temperature_slope, rng)
    models, losses = section("2. Data and models", show_models, vocabulary, names, held_out, rng)
    target, draft = models
    section("3. Filters", show_filters, target, vocabulary, names[0][:3])
    found = section("4. Search", show_search, target, starts)
    show_curse(target, vocabulary, found["exact", "-"][0], rng)
    quality = section("5. Sampling quality", show_quality, target, names, rng)
    section("6. Speculative decoding", check_one_token, models, contexts)
    check_three_tokens(target, draft)
    check_samples(*(probs_after(model, (BOUNDARY,), ("top-k", 9)) for model in models), rng)
    check_greedy(target, draft, contexts, rng)
    rounds = show_speculation(target, draft, rng)
    show_speedup(rounds[4][0], len(draft.parameters()) / len(target.parameters()))
    bugs = section("7. The bugs people ship", show_bugs, target, draft, contexts)
    show_unfair_beam(found)
    section("8. The real world", show_real_world)
    return finish(started, losses=losses, found=found, quality=quality, rounds=rounds, bugs=bugs)

if __name__ == "__main__": run(main, names=read_names)
