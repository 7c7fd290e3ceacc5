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
from copy import copy
from heapq import heappop, heappush
from itertools import accumulate
from math import exp, inf, isfinite, log, sqrt
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
# Token 0, printed as ".", begins and ends a name. The GPT (see microkv) gives logits, softmax makes
# them probabilities. The target is the model whose names we want, the draft a cheap imitation.
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
    """The names in a text file, one a line; ValueError or OSError if it will not do."""
    lines = Path(path).read_text("utf-8-sig").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    longest, letters = max(names, key=len, default=""), set("".join(names))
    if len(names) < 20: raise ValueError(f"only {len(names)} names, at least 20 are needed")
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

class PrefixTree:
    """A model that runs each prefix, a tuple, once, on a copy of its parent's cache."""
    def __init__(self, model): self.model, self.nodes = model, {(): (None, KVCache(model.n_layers))}
    def node(self, prefix):              # -> (the logits after the prefix, its cache)
        if prefix not in self.nodes:
            cache = copy(self.node(prefix[:-1])[1])
            cache.keys, cache.values = list(map(list, cache.keys)), list(map(list, cache.values))
            self.nodes[prefix] = self.model.run(prefix[-1:], cache, len(prefix) - 1)[0], cache
        return self.nodes[prefix]
    def logits(self, prefix): return self.node(tuple(prefix))[0]
    def log_probs(self, prefix): return [log(p) for p in softmax(self.logits(prefix))]
    def score(self, name):               # log P, in nats, of the tokens after the first boundary
        return sum(self.log_probs((BOUNDARY, *name[:i]))[x] for i, x in enumerate(name))

def show_models(vocabulary, names, held_out, rng):
    """Train both models -> (the target's tree, the draft's, the losses)."""
    trees, losses = [], {"a uniform guess": log(len(vocabulary))}
    for role, d_model, steps, rate in ("target", 16, 190, 0.01), ("draft", 4, 140, 0.03):
        model = GPT(len(vocabulary), rng, d_model=d_model)
        train(model.parameters(), lambda i: model.loss([names[i % len(names)]]), steps, rate)
        trees.append(PrefixTree(model.frozen()))
        losses[f"the {role}, {len(model.parameters()):,} weights"] = trees[-1].model.loss(held_out)
    print(f"  {len(names)} names to learn, {len(held_out)} held out; nats per letter on the latter")
    bars(list(losses.items()))
    return *trees, losses

# 3. Filters ---------------------------------------------------------------------------------------
# Each token of the tail is improbable, all together are not. Filters keep what is at or above a
# floor, and rescale it to a sum of 1. The floor is set by a rank (top-k), by the mass above it
# (top-p, the nucleus) or by the top token (min-p). Ties at the floor all stay.
def require(holds, message):
    if not holds: raise ValueError(message)

def require_probabilities(*rows):
    for row in rows:
        require(row and len(row) == len(rows[0]) and min(row) >= 0.0 and abs(sum(row) - 1.0) < 1e-6,
                f"not the probabilities of {len(rows[0])} tokens: {row[:5]}")

def keep(probs, floor):
    total = sum(p for p in probs if p >= floor)
    return [p / total if p >= floor else 0.0 for p in probs]

def apply_temperature(logits, t):
    """softmax(logits / t) -> probabilities. t = 0 is the limit: all on the largest (ties share)."""
    top = max(logits, default=-inf)
    require(0.0 <= t < inf, f"temperature {t}, must be at least 0 and finite")
    require(isfinite(top) and all(z == z for z in logits), f"logits {logits[:5]}")
    return softmax([(z - top) / t if t else 0.0 if z == top else -inf for z in logits])

def top_k(probs, k):
    """Keep the k most probable tokens, and what ties with the last; k may exceed the vocabulary."""
    require_probabilities(probs)
    require(k >= 1 and k == int(k), f"top-k {k}, must be 1, 2, 3, ...")
    return keep(probs, sorted(probs)[-min(int(k), len(probs))])

def top_p(probs, p):
    """Keep the fewest tokens of mass p or more, and ties with the last. Holtzman, section 3.1."""
    require_probabilities(probs)
    require(0.0 <= p <= 1.0, f"top-p {p}, must be in 0..1")
    falling = sorted(probs, reverse=True)                    # 1e-12: in floats, 0.7 + 0.2 < 0.9
    nucleus = [x for x, mass in zip(falling, accumulate(falling)) if mass - x < p - 1e-12]
    return keep(probs, 0.0 if p == 1.0 else min(nucleus, default=falling[0]))

def min_p(probs, p):
    """Keep what has at least p times the probability of the top token."""
    require_probabilities(probs)
    require(0.0 <= p <= 1.0, f"min-p {p}, must be in 0..1")
    return keep(probs, p * max(probs))

def show_filters(tree, vocabulary, prefix):
    """The distribution after a prefix as bars, then what each strategy leaves of it."""
    p = softmax(logits := tree.logits(prefix))
    new = {f"temperature {t}": apply_temperature(logits, t) for t in (2.0, 0.5, 0.0)}
    new |= {"top-k 5": top_k(p, 5), "top-p 0.8": top_p(p, 0.8), "min-p 0.3": min_p(p, 0.3)}
    print(f"  the ten most probable tokens after {''.join(vocabulary[i] for i in prefix)!r}")
    bars([(c, 100 * x) for x, c in sorted(zip(p, vocabulary), reverse=True)[:10]], " %")
    table(["choosing by", "tokens kept", "mass cut", "top token"], *(
        [name, sum(x > 0.0 for x in row), f"{sum(a for a, x in zip(p, row) if not x):.1%}",
         f"{max(row):.1%}"] for name, row in new.items()))
    return new

# 4. Search ----------------------------------------------------------------------------------------
# Beam search carries the `width` best prefixes along, all of one length. Finished texts differ in
# length, and every token costs probability: sums favour the short, so a penalty divides by length.
def normalised(score, length, length_penalty):               # Wu et al. 2016, equation 14
    return score / ((5.0 + length) / 6.0) ** length_penalty

def continuations(step, start, eos, cost, tokens):
    """All texts one token longer -> [(cost, tokens)]. A cost is -log P of what follows start."""
    row = step([*start, *tokens])
    require(0 <= eos < len(row), f"eos {eos}, but {len(row)} log-probabilities")
    require(all(x <= 1e-9 for x in row), f"not log-probabilities: {row[:5]}")
    COUNT["prefixes expanded"] += 1
    return [(cost - x, (*tokens, token)) for token, x in enumerate(row) if x > -inf]

def beam_search(step, start, eos, width, max_len, length_penalty=0.0):
    """-> the finished hypotheses, best first, at most `width`: [(tokens after start, total log P)].
    step(prefix) -> one log-probability per token. max_len counts generated tokens, eos included. Of
    each round's continuations, those among the first `width` that end are finished."""
    require(start and width >= 1 <= max_len, f"start {start}, width {width}, length {max_len}")
    def rank(hypothesis): return normalised(hypothesis[0], len(hypothesis[1]), length_penalty)
    live, finished = [(0.0, ())], []
    for length in range(1, max_len + 1):
        children = sorted(c for parent in live for c in continuations(step, start, eos, *parent))
        finished += [child for child in children[:width] if child[1][-1] == eos]
        finished = sorted(finished, key=rank)[:width]
        live = [child for child in children if child[1][-1] != eos][:width]
        if not live: break
        # The cost of a live one only grows; the penalty does most for it at one of two lengths.
        hope = min(normalised(live[0][0], n, length_penalty) for n in (length + 1, max_len))
        if len(finished) == width and rank(finished[-1]) <= hope: break
    return [(list(tokens), -cost) for cost, tokens in finished]

def exact_search(step, start, eos, max_len):
    """-> (tokens after start, total log P) of the most probable text that ends, or ValueError. The
    likeliest prefix goes first; probabilities only fall: nothing can overtake a finished one."""
    require(start and max_len >= 1, f"start {start}, max_len {max_len}")
    heap = [(0.0, ())]
    while heap:
        cost, tokens = heappop(heap)
        if tokens[-1:] == (eos,): return list(tokens), -cost
        for child in continuations(step, start, eos, cost, tokens):
            if child[1][-1] == eos or len(child[1]) < max_len: heappush(heap, child)
    raise ValueError(f"no text of at most {max_len} tokens can end with token {eos}")

def draw(probs, rng): return rng.choices(range(len(probs)), probs)[0]

def sample(tree, choose, rng):           # choose(logits) -> the probabilities to draw from
    tokens = []
    while len(tokens) < MAX_LEN and tokens[-1:] != [BOUNDARY]:
        tokens.append(draw(choose(tree.logits((BOUNDARY, *tokens))), rng))
    return tokens

def show_search(tree, vocabulary, names, rng):
    """Beams beside the exact maximum, after the boundary alone and after every first letter."""
    starts = [[BOUNDARY]] + [[BOUNDARY, first] for first in sorted({name[1] for name in names})]
    COUNT.clear()
    modes = [exact_search(tree.log_probs, start, BOUNDARY, MAX_LEN) for start in starts]
    expanded, errors, rows = COUNT["prefixes expanded"], {}, []
    def beam(*arguments):                # or nothing, if no name has ended within MAX_LEN
        return (beam_search(tree.log_probs, *arguments) or [([BOUNDARY], -inf)])[0]
    searches = {(width, penalty): [beam(x, BOUNDARY, width, MAX_LEN, penalty) for x in starts]
                for penalty, widths in ((0.0, (1, 2, 4, 8, 16)), (1.0, (8,))) for width in widths}
    for key, found in (searches | {("exact", "-"): modes}).items():
        errors[key] = [best - score for (_, best), (_, score) in zip(modes, found)]
        rows.append([*map(str, key), "".join(vocabulary[token] for token in found[0][0]),
                     f"{found[0][1]:.3f}", f"{sum(len(x) - 1 for x, _ in found) / len(found):.2f}",
                     sum(x > 1e-9 for x in errors[key])])
    table(["beam width", "length penalty", "found", "log P", "mean letters",
           f"errors in {len(starts)}"], *rows)
    texts = {"samples": [sample(tree, softmax, rng) for _ in range(200)],
             "names to learn": [name[1:] for name in names], "the mode": [modes[0][0]]}
    points = {name: [(len(x) - 1, tree.score(x)) for x in texts[name]] for name in texts}
    plot("log P of whole names over their letters", points, height=9)
    check("no beam is above the exact maximum", min(map(min, errors.values())) > -1e-9)
    check("prefixes expanded: at most max_len / P(mode)",    # as probable as the mode or more
          expanded <= sum(MAX_LEN / exp(best) for _, best in modes), f"{expanded:,}")
    return {"modes": modes, "expanded": expanded, "points": points, "errors": errors}

# 5. Sampling quality ------------------------------------------------------------------------------
def total_variation(p, q):               # TV: the most by which the chance of any event differs
    return 0.5 * sum(abs(a - b) for a, b in zip(p, q))

def show_quality(tree, names, rng, n=150):
    """n names each: log P under the target tells how probable, the distinct share how diverse."""
    known, results = {tuple(name[1:]) for name in names}, {}
    def lengths(texts): return [sum(len(x) == i for x in texts) / len(texts) for i in range(22)]
    families = {"temperature": (apply_temperature, (1.5, 1.0, 0.7, 0.4, 0.0)),
                "top-k": (lambda z, k: top_k(softmax(z), k), (12, 6, 3)),
                "top-p": (lambda z, p: top_p(softmax(z), p), (0.95, 0.8, 0.5)),
                "min-p": (lambda z, p: min_p(softmax(z), p), (0.02, 0.1, 0.3))}
    for family, rule, value in [(f, rule, x) for f, (rule, xs) in families.items() for x in xs]:
        drawn = [tuple(sample(tree, lambda z: rule(z, value), rng)) for _ in range(n)]
        results[family, value] = [
            sum(map(tree.score, drawn)) / n, len({*drawn}) / n, sum(x in known for x in drawn) / n,
            sum(len(x) - 1 for x in drawn) / n, total_variation(lengths(drawn), lengths(known))]
    table([f"{n} names each", "log P", "distinct", "memorised", "letters", "lengths: TV"], *(
        [f"{family} {value}", f"{a:.2f}", f"{b:.1%}", f"{c:.1%}", f"{d:.2f}", f"{e:.1%}"]
        for (family, value), (a, b, c, d, e) in results.items()))
    curves = {f: [(x[1], x[0]) for key, x in results.items() if key[0] == f] for f in families}
    plot("log P over the share of distinct names", curves, height=9)
    return results

# 6. Speculative decoding --------------------------------------------------------------------------
# A model reads its weights once a pass, for one token or many (microkv). So a draft model proposes
# gamma tokens, each *drawn* from its q; one pass of the target gives its p at all places. Accept x
# with probability min(1, p(x) / q(x)); at the first rejection draw from the residual max(0, p - q),
# rescaled; if all are accepted, draw one more from the last p. Exact: x is drafted and accepted
# with probability min(p, q). A rejection has 1 - Σ min(p, q) = Σ max(0, p - q), which is what
# rescales the residual: so it adds max(0, p - q) to x, in all p.
def residual(p, q):
    rest = [max(0.0, a - b) for a, b in zip(p, q)]
    total = sum(rest)                    # 0 if p = q, and then nothing is ever rejected
    return [x / total for x in rest] if total else p

def speculative_step(p_rows, q_rows, drafted, rng):
    """One round -> (the accepted tokens, the next). Leviathan et al. 2022, algorithm 1.
    drafted [gamma]: drawn from the rows of q_rows [gamma][vocab_size]; p_rows: one row more."""
    require_probabilities(*p_rows, *q_rows)
    require(len(p_rows) - 1 == len(q_rows) == len(drafted),
            f"{len(drafted)} tokens, {len(p_rows)} rows of p, {len(q_rows)} of q")
    for i, (p, q, token) in enumerate(zip(p_rows, q_rows, drafted)):
        require(0 <= token < len(q) and q[token], f"token {token} at {i}: its draft rules it out")
        if rng.random() >= min(1.0, p[token] / q[token]):
            return list(drafted[:i]), draw(residual(p, q), rng)
    return list(drafted), draw(p_rows[-1], rng)

def outcomes(p, q, drafts, rest):
    """-> the chance of every token to be drafted (by `drafts`) and accepted; to be from `rest`."""
    accepted = [d * min(1.0, a / b) if d else 0.0 for a, b, d in zip(p, q, drafts)]
    rejected = sum(d - a for d, a in zip(drafts, accepted))
    return accepted, [rejected * r for r in rest]

def speculative_distribution(p, q):
    """The exact distribution of what comes out of drafting from q and testing by p: p itself."""
    require_probabilities(p, q)
    return add(*outcomes(p, q, q, residual(p, q)))

def sequence_distribution(p_of, q_of, gamma, length, text=(), n=0):
    """-> {text: probability} after `length` more tokens; n drafts of this round are accepted."""
    if not length: return {text: 1.0}
    p, q, result = p_of(text), q_of(text), defaultdict(float)
    accepted, rest = outcomes(p, q, q, residual(p, q)) if n < gamma else ([], p)
    for chances, n in (accepted, n + 1), (rest, 0):
        for x in [x for x, chance in enumerate(chances) if chance]:
            ends = sequence_distribution(p_of, q_of, gamma, length - 1, (*text, x), n)
            for end, more in ends.items(): result[end] += chances[x] * more
    return result

def expected_tokens(alpha, gamma):
    """Tokens per target pass: Σ alpha^i, i = 0..gamma drafts accepted in a row. Leviathan, eq. 1.
    Only approximate: alpha varies with the context, and a mean of powers exceeds the mean's."""
    require(0.0 <= alpha <= 1.0 and gamma >= 0 == gamma % 1, f"alpha {alpha}, gamma {gamma}")
    return gamma + 1.0 if alpha == 1.0 else (1.0 - alpha ** (gamma + 1)) / (1.0 - alpha)

def speedup(alpha, gamma, c):            # drafting costs c target passes a token: theorem 3.8
    return expected_tokens(alpha, gamma) / (gamma * c + 1.0)

def speculate(target, draft, gamma, choose, rng, start=(BOUNDARY,), truncate=True):
    """-> (a name, its p rows, [(n_accepted, [Σ min(p, q) of each test])]). gamma 0: plain decoding.
    choose(logits) -> probabilities, alike for target and draft: p and q are what is drawn from."""
    require(target is not draft, "target and draft are one object, and would share a cache")
    text, used, rounds = list(start), [], []
    caches = {model: KVCache(model.n_layers) for model in (target, draft)}
    n_read = dict.fromkeys(caches, 0)    # how many tokens of the text a model has run
    def read(model, text):               # run what is new, in one pass -> the logits after each
        first, n_read[model] = n_read[model], len(text)
        return model.run(text[first:], caches[model], first)
    while len(text) <= MAX_LEN and BOUNDARY not in text[1:]:
        drafted, q_rows = [], []
        for _ in range(gamma):
            q_rows.append(choose(read(draft, text + drafted)[-1]))
            drafted.append(draw(q_rows[-1], rng))
        p_rows = [choose(logits) for logits in read(target, text + drafted)[-gamma - 1:]]
        accepted, token = speculative_step(p_rows, q_rows, drafted, rng)
        n, chances = len(accepted) + 1, [sum(map(min, p, q)) for p, q in zip(p_rows, q_rows)]
        rounds.append((n - 1, chances[:n]))
        used, text = used + p_rows[:n], [*text, *accepted, token][:MAX_LEN + 1]
        for model, cache in caches.items():      # roll back what was rejected
            n_read[model] = min(n_read[model], len(text) - 1)
            if truncate: cache.truncate(n_read[model])
    end = text.index(BOUNDARY, 1) + 1 if BOUNDARY in text[1:] else len(text)
    return text[len(start):end], used[:end - len(start)], rounds

def contexts(texts, target, draft, choose=softmax):          # (p, q) after every prefix of texts
    prefixes = sorted({tuple(text[:n]) for text in texts for n in range(1, len(text))})
    return [(choose(target.logits(prefix)), choose(draft.logits(prefix))) for prefix in prefixes]

def show_exactness(target, draft, texts, rng, n=3000):
    """The output distribution by enumeration: one token, then three; and by a test on n samples."""
    def cool(logits): return top_p(apply_temperature(logits, 0.7), 0.9)
    pairs = contexts(texts, target, draft) + contexts(texts, target, draft, cool)
    error = max(total_variation(speculative_distribution(p, q), p) for p, q in pairs)
    check("one token, plain and cut, over all drafts: the target's", error < 1e-12, f"{error:.0e}")
    p_of, q_of = (lambda text, tree=tree: top_k(softmax(tree.logits((BOUNDARY, *text))), 3)
                  for tree in (target, draft))
    error = max(abs(chance - p_of(())[a] * p_of((a,))[b] * p_of((a, b))[c]) for gamma in (1, 2, 3)
                for (a, b, c), chance in sequence_distribution(p_of, q_of, gamma, 3).items())
    check("three tokens of top-k 3, over all rounds: the target's", error < 1e-12, f"{error:.0e}")
    p, q, drawn = top_k(pairs[0][0], 9), top_k(pairs[0][1], 9), []
    while len(drawn) < n:
        accepted, token = speculative_step([p] * 3, [q] * 2, [draw(q, rng), draw(q, rng)], rng)
        drawn += [*accepted, token]
    counts = [(drawn[:n].count(x), n * p_x) for x, p_x in enumerate(p) if p_x]
    # Laurent & Massart 2000, lemma 1: chi-square of d degrees of freedom exceeds d + 2 sqrt(d x)
    # + 2 x with a probability of at most e^-x. x = 14: a false alarm in over a million runs.
    df, statistic = len(counts) - 1, sum((k - mean) ** 2 / mean for k, mean in counts)
    limit = df + 2.0 * sqrt(df * 14.0) + 28.0
    check(f"chi-square of {n:,} tokens", statistic < limit, f"{statistic:.1f} < {limit:.1f}")

def show_speculation(target, draft, texts, rng, n_names=45):
    """Names by speculation, for several gamma: tokens and costs, counted beside the formulas."""
    models, rows, results, exact = (target.model, draft.model), [], {}, True
    large, small = (sum(len(m) * len(m[0]) for m in list(model.weights.values())[2:])
                    for model in models)         # all matrices but the two look-up tables
    for gamma in (0, 1, 2, 4, 8):
        COUNT.clear()
        names = [speculate(*models, gamma, softmax, rng) for _ in range(n_names)]
        work, weights = COUNT["multiply-adds"], COUNT["weights read"]
        n, rounds = sum(len(name) for name, _, _ in names), sum((x for *_, x in names), [])
        accepted, tests = sum(k for k, _ in rounds), sum((x for _, x in rounds), [])
        exact = exact and weights == len(rounds) * (large + gamma * small)
        alpha, chance = (x / max(1, len(tests)) for x in (accepted, sum(tests)))
        results[gamma] = alpha, 1.0 + accepted / len(rounds), expected_tokens(alpha, gamma)
        rows.append([f"{gamma}", *(f"{x:.2f}" for x in (alpha, chance, *results[gamma][1:])),
                     round(work / n), round(weights / n), f"{large * n / weights:.2f}x",
                     f"{speedup(alpha, gamma, small / large):.2f}x"])
    table(["gamma", "accepted", "Σ min(p, q)", "tokens a pass", "formula", "multiply-adds",
           "weights read", "gain", "formula"], *rows)
    print("  costs and gain per token up to a name's end; formula: one alpha for all contexts\n")
    alpha, ratios = results[4][0], (0.02, small / large, 0.2, 0.5)
    gains = {c: [speedup(alpha, gamma, c) for gamma in range(11)] for c in ratios}
    plot(f"speed-up over gamma by the formula for {alpha:.1%} accepted, and its maximum",
         {f"c {c:.3f}: {max(row):.2f}x": [*enumerate(row)] for c, row in gains.items()}, height=9)
    check("weights read = rounds x (target + gamma x draft)", exact, f"{small:,} : {large:,}")
    def greedy(logits): return apply_temperature(logits, 0.0)
    plain, fast = ([speculate(*models, n, greedy, rng, x[:2])[0] for x in texts] for n in (0, 4))
    check("greedy speculation writes the greedy text", plain == fast, f"{len(texts)} starts")
    return results

# 7. The bugs people ship --------------------------------------------------------------------------
def show_bugs(target, draft, texts, rng):
    """The bias of every bug. The names it writes look like names, so it passes for correct."""
    results = defaultdict(list)          # {bug: the total variation from the right p, by context}
    rejected = False                     # has a round gone on after a rejection?
    for p, q in contexts(texts, target, draft):
        favourite = [float(x == q.index(max(q))) for x in range(len(q))]
        cut_p, cut_q = top_p(p, 0.8), top_p(q, 0.8)
        raw = [x if kept else 0.0 for x, kept in zip(q, cut_q)]      # cut, but not rescaled
        runs = {"drafts greedily, tests by p/q": (p, q, favourite, residual(p, q)),
                "redraws from p, not the residual": (p, q, q, p),
                "top-p, q rescaled after the test": (cut_p, raw, cut_q, residual(cut_p, raw))}
        for bug, x in runs.items(): results[bug] += [total_variation(add(*outcomes(*x)), x[0])]
    for bug, truncate in 25 * [("caches not rolled back", False), ("caches rolled back", True)]:
        text, used, rounds = speculate(target.model, draft.model, 4, softmax, rng, (0,), truncate)
        rejected = rejected or not truncate and any(n < 4 for n, _ in rounds[:-1])
        results[bug] += [total_variation(p, softmax(target.logits([BOUNDARY, *text[:i]])))
                         for i, p in enumerate(used)]
    table(["bug", "contexts", "biased", "total variation: mean", "largest"], *(
        [bug, len(tv), sum(x > 1e-9 for x in tv), f"{sum(tv) / len(tv):.3f}", f"{max(tv):.3f}"]
        for bug, tv in results.items()))
    # By raw sums a short text that ended beats all that go on, which the penalty was to prevent.
    starts, scores = sorted({tuple(text[:2]) for text in texts})[:8], []
    for compared, penalty in ("normalised", 1.2), ("raw", 0.0):
        best = [beam_search(target.log_probs, x, BOUNDARY, 16, MAX_LEN, penalty)[0] for x in starts]
        scores.append([normalised(score, len(tokens), 1.2) for tokens, score in best])
        print(f"  beam of 16 by {compared} sums: mean score {sum(scores[-1]) / len(starts):.3f}")
    *wrong, stale, right = results.values()
    check("every bug biases the distribution, a stale cache once a token was rejected",
          min(map(max, wrong)) > 1e-3 and (max(stale) > 1e-9) == rejected)
    check("caches rolled back: p as one by one", not any(right), f"{len(right)} contexts")
    check("a beam by raw sums finds no better score", all(map(float.__ge__, *scores)))
    return dict(results) | {"scores": scores}

# 8. The real world --------------------------------------------------------------------------------
# Leviathan et al. 2022, T5-XXL, English to German, greedy: gamma, alpha, speed-up: table 2, c:
# appendix. Chen et al. 2023: 14.1 ms a token, the draft 1.8; HumanEval. Its alpha is not given.
PAIRS = [("T5-small", 7, 0.75, 0.02, "3.4x"), ("T5-large", 7, 0.82, 0.11, "1.7x"),
         ("Chinchilla, alpha assumed", 4, 0.80, 1.8 / 14.1, "2.46x")]
# 3.1-70B and 3-8B, public config files: layers, width of heads, of key/value heads, weights.
LLAMA = {"target": (80, 8192, 1024, 70.6e9), "draft": (32, 4096, 1024, 8.03e9)}

def pass_seconds(name, batch, tokens, context=1024, peak=8 * 989e12, bandwidth=8 * 3.35e12):
    """The roofline (microkv) of eight H100, FLOP/s and bytes/s, in 16 bits, no communication."""
    n_layers, width, kv_width, weights = LLAMA[name]
    flop = batch * tokens * (2 * weights + 4 * n_layers * width * context)
    return max(flop / peak, (2 * weights + batch * 4 * n_layers * kv_width * context) / bandwidth)

def show_real_world(gamma=4, alphas=(0.9, 0.8, 0.6)):
    """Published pairs beside the formula; the gain over the batch -> the batches that lose."""
    table(["published pair", "gamma", "alpha", "c", "formula", "measured"], *(
        [name, n, f"{alpha:.2f}", f"{c:.3f}", f"{speedup(alpha, n, c):.2f}x", measured]
        for name, n, alpha, c, measured in PAIRS))
    def gain(alpha, batch):
        seconds = gamma * pass_seconds("draft", batch, 1) + pass_seconds("target", batch, gamma + 1)
        return expected_tokens(alpha, gamma) * pass_seconds("target", batch, 1) / seconds
    losing = {a: next(n for n in range(1, 9999) if gain(a, n) < 1.0) for a in alphas}
    curves = {f"alpha {a}: loses from {losing[a]}": [(2 ** i, gain(a, 2 ** i)) for i in range(11)]
              for a in alphas}
    plot("Llama 70B drafted by 8B, 8 H100: speed-up over batch (log)", curves, True, height=8)
    return losing

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
    section("1. Autograd", show_temperature_slope, rng)
    target, draft, losses = section("2. Data and models", show_models, vocabulary, names, held_out,
                                    rng)
    filters = section("3. Filters", show_filters, target, vocabulary, names[0][:3])
    search = section("4. Search", show_search, target, vocabulary, names, rng)
    quality = section("5. Sampling quality", show_quality, target, names, rng)
    section("6. Speculative decoding", show_exactness, target, draft, held_out, rng)
    speculation = show_speculation(target, draft, held_out, rng)
    bugs = section("7. The bugs people ship", show_bugs, target, draft, held_out, rng)
    losing_batch = section("8. The real world", show_real_world)
    return finish(started, losses=losses, filters=filters, search=search, quality=quality,
                  speculation=speculation, bugs=bugs, losing_batch=losing_batch)

if __name__ == "__main__": run(main, names=read_names)
