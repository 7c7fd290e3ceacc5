"""A server that keeps its KV cache in small shared blocks serves several times the users.

A model keeps a key and a value, two vectors, of every token it has read: the KV cache. Nobody knows
how long a text will get before its last token. So cut memory into pages, as operating systems do:
blocks of a few tokens, found through a block table; shared, copied when written, and found again.

  Kwon et al. 2023 (2309.06180) PagedAttention, vLLM      Yu et al. OSDI 2022 (Orca) scheduling
  python micropaged.py [--seed N] [--names FILE]     needs only Python, takes two seconds

  1. Autograd              two caches, one gradient
  2. Data and model        a tiny GPT learns names; requests to continue lists of names
  3. Contiguous memory     one piece per request, and the three ways in which it wastes
  4. Paging                blocks and block tables: the same logits, hardly any waste
  5. Sharing               samples and beams share blocks until they write: copy-on-write
  6. Prefix caching        a block is found again by the hash of all that was said up to its end
  7. Continuous batching   requests come and go at every step; the youngest gives way
  8. The bugs people ship  five of them, in a scene that the correct server gets right
  9. The real world        Llama-3-8B: blocks, users, waste, a system prompt that all share
"""
import argparse, codecs, gc, hashlib, os, random, sys, time
from collections import defaultdict
from copy import copy
from math import ceil, exp, log, log2, sqrt
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
def show_autograd(vocab_size, name):     # two models of the same weights, with two kinds of cache
    one, other = (GPT(vocab_size, random.Random(0)) for _ in range(2))
    pool = BlockPool(n_blocks=len(name), block_size=2)               # section 4
    block_table, _ = pool.allocate(name)
    cross_entropy(one.run(name, KVCache(one.n_layers))[-1], BOUNDARY).backward()
    cross_entropy(run_batch(other, pool, [(block_table, 0)])[-1], BOUNDARY).backward()
    gradients = [[p.grad for p in model.parameters()] for model in (one, other)]
    print(f"  {len(gradients[0]):,} derivatives, with a cache in one piece and in {block_table=}")
    check("through a block table: the same gradient, bit for bit", gradients[0] == gradients[1])

# 2. Data and model --------------------------------------------------------------------------------
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
# A request is a prompt, here a list of names, and a number of tokens to add. Most are short; three
# of four begin alike, as chats with one system prompt do. Time is counted in steps: a step is one
# pass through the model, with a new token for each request in it.
def write(names, n, rng): return [token for name in rng.sample(names, n) for token in name[:-1]]

def show_model(vocabulary, names, rng, most=20):     # -> the trained model, a trace of requests
    model = GPT(len(vocabulary), rng, d_model=8, context=64)
    def loss_at(step): return model.loss([write(names, 2, rng) + [BOUNDARY]])
    losses = train(model.parameters(), loss_at, 80, 0.04)
    start, trace = write(names, 4, rng)[:18], []
    for i in range(12):
        prompt = write(names, min(4, int(rng.paretovariate(1.0))), rng)[:most] + [BOUNDARY]
        if i % 4 < 3: prompt = start + prompt
        trace.append((prompt, min(most, int(4 * rng.paretovariate(1.2))), 3 * i // 4, i))
    print(f"  loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per letter; prompts begin with",
          "".join(vocabulary[token] for token in start))
    return model.frozen(), trace

# 3. Contiguous memory -----------------------------------------------------------------------------
# A cache in one piece must be as long as the request may get, and wastes memory in three ways (Kwon
# et al. 2023, section 3.1): RESERVATION, slots to be filled later; INTERNAL fragmentation, slots
# never filled; EXTERNAL fragmentation, slots that are free and enough, but not next to each other.
def first_fit(memory, n): return memory.find("·" * n)    # the first n free slots in a row, or -1

def show_contiguous(n=18):
    memory = "".join(letter * n for letter in "·B·D·")
    free, refused = memory.count("·"), first_fit(memory, n + 1) == -1
    print(f"  A, C and E have left: {free} slots are free. F needs {n + 1} in a row.\n  {memory}")
    check("in one piece: refused with enough free", refused and free > n, f"{free} free")

# 4. Paging ----------------------------------------------------------------------------------------
# Block i of a sequence holds its positions i * block_size and following; its block table tells
# where in the pool that block lies. Only the last block can be partly empty, so a request wastes
# less than a block however long it gets; and any free block will do: nothing is external.
class OutOfBlocks(Exception): pass       # too little memory is free; nothing has been changed
class BlockTable(list): pass             # the blocks of a sequence; its tokens: what they hold

class BlockPool:
    """memory[block][slot][layer]: (key, value). A block is in use by references[block] tables, or
    by none: then it is in free_blocks, the next to be taken first. Kwon et al. 2023, section 4."""
    n_to_run, copy_on_write = 1, True    # what two bugs of section 8 change
    n_free = property(lambda self: len(self.free_blocks))            # cached ones included
    def ref_count(self, block): return self.references[block]

    def __init__(self, n_blocks, block_size, prefix_caching=True):
        if min(n_blocks, block_size) < 1: raise ValueError(f"{n_blocks} blocks of {block_size}")
        self.n_blocks, self.block_size, self.prefix_caching = n_blocks, block_size, prefix_caching
        self.memory = [[{} for _ in range(block_size)] for _ in range(n_blocks)]
        self.references, self.digests = [0] * n_blocks, [None] * n_blocks    # digests: section 6
        self.free_blocks, self.tables = list(range(n_blocks)), {}            # tables in use, by id

    def allocate(self, token_ids):
        """Room for a prompt -> (block_table, n_cached: tokens at its start that need no run)."""
        cached = self.find(token_ids)
        n_in_use = sum(block not in self.free_blocks for block in cached)
        self.demand(token_ids, ceil(len(token_ids) / self.block_size) - n_in_use)
        n_cached = len(cached) * self.block_size
        block_table = self.refer(cached, token_ids[:n_cached])
        self.write(block_table, token_ids[n_cached:])
        return block_table, n_cached

    def append(self, block_table, token_ids):
        """Room for more tokens; a last block that is shared is copied first."""
        self.verify(block_table)
        length, last = len(block_table.tokens), block_table[-1]
        shared = self.copy_on_write and length % self.block_size > 0 and self.references[last] > 1
        n_blocks = ceil((length + len(token_ids)) / self.block_size)
        self.demand(token_ids, n_blocks - len(block_table) + int(shared))
        if shared:
            block_table[-1] = self.take()
            self.memory[block_table[-1]] = [dict(slot) for slot in self.memory[last]]
            self.references[last] -= 1
            COUNT["copied"] += 1
        self.write(block_table, token_ids)

    def fork(self, block_table):
        """A second table of the same blocks; nothing is copied yet."""
        self.verify(block_table)
        return self.refer(block_table, block_table.tokens)

    def free(self, block_table):
        """Take a table out of use. Its last block goes first: without the others it is no use."""
        self.verify(block_table)
        self.tables.pop(id(block_table), None)
        for block in reversed(block_table):
            self.references[block] -= 1
            if self.references[block] == 0: self.free_blocks.append(block)

    def verify(self, block_table):       # the guards come before any change: all or nothing
        if id(block_table) not in self.tables: raise ValueError(f"not in use: {list(block_table)}")
    def demand(self, token_ids, n):
        if not token_ids: raise ValueError("room for 0 tokens: at least 1 is needed")
        if n > self.n_free: raise OutOfBlocks(f"{n} blocks, {self.n_free} of {self.n_blocks} free")

    def refer(self, blocks, tokens):     # a new table of blocks that hold the tokens already
        block_table = BlockTable(blocks)
        block_table.tokens, self.tables[id(block_table)] = list(tokens), block_table
        for block in blocks:
            if self.references[block] == 0: self.free_blocks.remove(block)
            self.references[block] += 1
        return block_table
    def take(self):                      # a free block; what it held can be found no more
        block = self.free_blocks.pop(0)
        self.references[block], self.digests[block] = 1, None
        return block

    def write(self, block_table, token_ids):
        tokens, size = block_table.tokens, self.block_size
        for token in token_ids:
            if len(tokens) % size == 0: block_table.append(self.take())
            tokens.append(token)
            if len(tokens) % size == 0 and self.prefix_caching:
                parent = self.digests[block_table[-2]] if len(block_table) > 1 else None
                self.digests[block_table[-1]] = self.digest(parent, tokens[-size:])

    # For section 6. Whoever could make digests collide would be served another's text: no hash().
    def digest(self, parent, block): return hashlib.sha256(repr((parent, block)).encode()).digest()
    def find(self, token_ids):           # cached blocks; the last token must run, for its logits
        blocks, digest, size = [], None, self.block_size
        for end in range(size, len(token_ids) - self.n_to_run + 1, size):
            digest = self.digest(digest, list(token_ids[end - size:end]))
            if digest not in self.digests: break         # production looks it up in a dictionary
            blocks.append(self.digests.index(digest))
        return blocks

class PagedCache:                        # for GPT.forward(); production reads blocks in place
    def __init__(self, pool, block_table, position):
        self.slots = [slot for block in block_table for slot in pool.memory[block]][:position + 1]
    def append(self, layer, key, value):
        self.slots[-1][layer] = key, value
        return zip(*(slot[layer] for slot in self.slots))

def run_batch(model, pool, batch):
    """batch: [(block_table, n_cached)], the rest to run -> the logits behind each, in one pass."""
    rows, ends = [], []
    for table, n_cached in batch:
        for i in range(n_cached, len(table.tokens)):
            rows.append((table.tokens[i], i, PagedCache(pool, table, i)))
        ends.append(len(rows) - 1)
    COUNT["run"] += len(rows)
    logits = model.forward(rows)
    return [logits[end] for end in ends]

def error(model, tokens, logits):        # the largest of the last logits, against the text alone
    truth = model.run(tokens, KVCache(model.n_layers))[-len(logits):]
    return max(abs(x - y) for row, right in zip(logits, truth) for x, y in zip(row, right))

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"   # the requests in pictures
def show_paging(model, trace, n_blocks=80, block_size=4):
    engine = Engine(model, BlockPool(n_blocks, block_size, prefix_caching=False))    # section 7
    requests = [engine.submit(*request) for request in trace]
    print(f"  the pool, one character a block of {block_size} tokens, one letter a request, · free")
    while engine.waiting or engine.running:
        engine.step()
        owner = {i: LETTERS[requests.index(r)] for r in engine.running for i in r.block_table}
        picture = "".join(owner.get(block, "·") for block in range(n_blocks))
        if engine.clock in (3, 7, 11, 15): print(f"  after step {engine.clock:2} {picture}")
    check("in blocks: the logits of every request, bit for bit, as alone in one piece",
          all(error(model, r.tokens[:-1], r.logits) == 0.0 for r in requests))
    return requests

def show_waste(rng):
    def length(): return min(256, int(16 * rng.paretovariate(1.0)))          # a heavy tail
    uses = defaultdict(lambda: [0, 0, 0])                # policy: tokens, reservation, internal
    for prompt, output in [(length(), length()) for _ in range(60)]:
        end = prompt + output
        for now in range(prompt, end):
            slots = {"the maximum": 512, "a power of two": prompt + 2 ** ceil(log2(output)),
                     "the true length": end, "blocks of 64": ceil(now / 64) * 64,
                     "blocks of 16": ceil(now / 16) * 16}
            for policy, n in slots.items():
                uses[policy] = add(uses[policy], [now, min(n, end) - now, max(0, n - end)])
    uses = {policy: [100 * n / sum(use) for n in use] for policy, use in uses.items()}
    paper = (20.4, 26.8, 38.2, "-", 96.3)            # Kwon et al., figure 2, with external waste
    print("\n  what the slots that 60 requests reserve are used for, in % over all steps")
    table(["reserve", "tokens", "reservation", "internal", "tokens in the paper"],
          *([policy, *(f"{x:.1f}" for x in uses[policy]), x] for policy, x in zip(uses, paper)))
    return uses

# 5. Sharing ---------------------------------------------------------------------------------------
# Texts with one beginning share its blocks: fork() only counts them again. Who writes into a shared
# block copies it first, and the last to write is alone in it: of k samples, k - 1 copy the last
# block of a prompt that does not fill it. Beams share more: they are forks of forks.
def branch(model, pool, prompt, n_tokens, choose, n_branches=1):
    """Grow several texts, which stay in the pool -> [(tokens, [logits behind them])]
    choose(log p of each branch, logits of each) -> [(branch, token)] to go on with."""
    first, n_cached = pool.allocate(prompt)
    logits = run_batch(model, pool, [(first, n_cached)]) * n_branches
    tables = [first] + [pool.fork(first) for _ in range(n_branches - 1)]
    log_ps = [0.0] * n_branches
    for _ in range(n_tokens):
        chosen = choose(log_ps, logits)
        log_ps = [log_ps[i] - cross_entropy(logits[i], token) for i, token in chosen]
        parents, tables = tables, [pool.fork(tables[i]) for i, _ in chosen]
        for parent in parents: pool.free(parent)
        for child, (_, token) in zip(tables, chosen): pool.append(child, [token])
        logits = run_batch(model, pool, [(child, len(child.tokens) - 1) for child in tables])
    return [(child.tokens, [row]) for child, row in zip(tables, logits)]

def likeliest(log_ps, logits, width=4):  # beam search: the most probable continuations (microbeam)
    losses = [(cross_entropy(row, token) - log_ps[i], i, token)
              for i, row in enumerate(logits) for token in range(len(row))]
    return [(i, token) for _, i, token in sorted(losses)[:width]]

def show_sharing(model, prompt, rng, n_tokens=10, block_size=4):
    def sample(log_ps, logits):
        return [(i, rng.choices(range(len(row)), softmax(row))[0]) for i, row in enumerate(logits)]
    rows, errors, (full, part) = [], [], divmod(len(prompt), block_size)
    for what, choose, n in ("samples", sample, 2), ("samples", sample, 8), ("beams", likeliest, 1):
        COUNT["copied"], pool = 0, BlockPool(99, block_size)
        texts = branch(model, pool, prompt, n_tokens, choose, n)
        errors += [error(model, *text) for text in texts]
        n, used = len(texts), pool.n_blocks - pool.n_free
        alone = n * ceil((len(prompt) + n_tokens) / block_size)
        formula = alone - (n - 1) * full     # the prompt's full blocks, once; one in part is copied
        rows.append([f"{n} {what}", alone, used, formula, COUNT["copied"], (n - 1) * (part > 0)])
    print(f"  blocks in use for texts of {len(prompt)} + {n_tokens} tokens; formulas: for samples")
    table(["", "alone", "shared", "formula", "copied", "formula"], *rows)
    check("samples: blocks shared and copied = formula; beams: no more blocks shared than that",
          all(row[2::2] == row[3::2] for row in rows[:-1]) and rows[-1][2] <= rows[-1][3])
    check("branches that share: the logits of the same text alone, bit for bit", not any(errors))
    return rows

# 6. Prefix caching --------------------------------------------------------------------------------
# Thousands of requests begin alike. A freed block keeps its content until it is taken, the least
# recently used first (LRU); until then a prompt finds it by the digest of all text up to its end.
def show_prefix_caching(model, prompts, size=4):
    COUNT["run"], pool, rows, errors = 0, BlockPool(200, size), [], []
    for i, prompt in enumerate(prompts):
        block_table, n_cached = pool.allocate(prompt)
        logits = run_batch(model, pool, [(block_table, n_cached)])
        errors.append(error(model, prompt, logits))
        pool.free(block_table)
        alike = max(len(os.path.commonprefix([prompt[:-1], other])) for other in [[], *prompts[:i]])
        rows.append([LETTERS[i], len(prompt), n_cached, alike // size * size])
    table(["prompt (F is A again)", "tokens", "in the cache", "full blocks seen before"], *rows)
    print(f"  hit rate, prefill saved: {1 - COUNT['run'] / sum(map(len, prompts)):.0%} of tokens")
    check("with the prefix cache: the same logits, bit for bit", not any(errors))
    check("cached: the full blocks seen before, never all", all(r[2] == r[3] < r[1] for r in rows))
    return rows

# 7. Continuous batching ---------------------------------------------------------------------------
# A pass reads all weights, for one request or for many: a batch is nearly free. A static batch ends
# with its longest member; scheduled at every step (Orca), a request comes in when its prompt fits,
# runs it in one pass (prefill) and then a token a step (decode). If blocks run out, the youngest is
# preempted: it frees its blocks and heads the queue. The oldest never gives way: somebody finishes.
class Request:
    """A prompt to continue by n_tokens tokens; the server does not look ahead to where it stops."""
    def __init__(self, prompt, n_tokens, arrival=0, seed=0):
        self.prompt, self.n_tokens, self.arrival = list(prompt), n_tokens, arrival
        self.rng, self.tokens, self.logits = random.Random(seed), list(prompt), []
        self.n_cached, self.history = 0, ""              # history: a character for each step
    def take(self, logits):              # draws the next token, at temperature 0.6 -> the last?
        self.tokens += self.rng.choices(range(len(logits)), softmax([x / 0.6 for x in logits]))
        self.logits.append(logits)
        return len(self.logits) == self.n_tokens

class Engine:
    """Serves requests in the order of arrival, one pass a step. In vLLM: v1/core/sched."""
    def __init__(self, model, pool, max_batch=8, static=False):
        self.model, self.pool, self.max_batch, self.static = model, pool, max_batch, static
        self.waiting, self.running, self.finished, self.clock = [], [], [], 0

    def submit(self, prompt, n_tokens, arrival=0, seed=0):
        """Queue a request that comes at step `arrival` -> Request; ValueError if it never fits."""
        n, room = len(prompt), min(self.model.context, self.pool.n_blocks * self.pool.block_size)
        if min(n, n_tokens, self.max_batch) < 1 or n + n_tokens - 1 > room:  # the last is not run
            raise ValueError(f"{n} + {n_tokens} tokens; room for {room}, batch of {self.max_batch}")
        request = Request(prompt, n_tokens, max(arrival, self.clock), seed)
        self.waiting = sorted(self.waiting + [request], key=lambda waiting: waiting.arrival)
        return request

    def make_room(self):
        """A slot for the last token of everyone running, the oldest first."""
        for request in list(self.running):
            while request in self.running:
                try: self.pool.append(request.block_table, request.tokens[-1:])
                except OutOfBlocks:
                    self.waiting.insert(0, self.running.pop())       # the youngest
                    self.pool.free(self.waiting[0].block_table)
                else: break

    def admit(self):
        """Let in those who wait, in their order, while batch and pool have room -> who came in."""
        n = len(self.running)
        if self.static and self.running: return []
        while self.waiting and len(self.running) < self.max_batch:
            if self.waiting[0].arrival > self.clock: break
            try: self.place(self.waiting[0])
            except OutOfBlocks: break
            self.running.append(self.waiting.pop(0))
        return self.running[n:]
    def place(self, r): r.block_table, r.n_cached = self.pool.allocate(r.tokens)

    def step(self):
        """Schedule, run one pass, draw a token for everyone in it -> the requests that are done."""
        self.make_room()
        admitted = self.admit()
        for r in self.running: r.history += "▒" if r in admitted else "█"
        for r in self.waiting:
            if r.arrival <= self.clock: r.history += "x" if r.logits else "·"
        batch = [(r.block_table, r.n_cached) for r in self.running]
        logits = run_batch(self.model, self.pool, batch)
        for r in self.running: r.n_cached = len(r.tokens)
        done = [r for r, row in zip(self.running, logits) if r.take(row)]
        for r in done: self.pool.free(r.block_table)
        self.running = [r for r in self.running if r not in done]
        self.finished, self.clock = self.finished + done, self.clock + 1
        return done

    def run(self):
        while self.waiting or self.running: self.step()
        return self.finished             # in the order in which they were done

def serve(engine, trace):                # -> the finished requests, in the order of the trace
    requests = [engine.submit(*request) for request in trace]
    engine.run()
    return requests

def show_batching(vocabulary, model, trace, expected, block_size=4):
    n_blocks = 2 * max(ceil((len(prompt) + n - 1) / block_size) for prompt, n, *_ in trace)
    rows, same, n = [], True, len(trace)
    for name, options in (("one at a time", {"max_batch": 1}), ("static batches", {"static": True}),
                          ("continuous", {})):
        COUNT.clear()
        engine = Engine(model, BlockPool(n_blocks, block_size), **options)
        requests = serve(engine, trace)
        same = same and engine.pool.n_free == n_blocks and all(
            (r.tokens, r.logits) == (e.tokens, e.logits) for r, e in zip(requests, expected))
        firsts = [r.history.index("▒") + 1 for r in requests]
        lasts = sorted(len(r.history) for r in requests)
        means = sum(r.n_tokens for r in requests) / engine.clock, sum(firsts) / n, sum(lasts) / n
        rows.append([name, engine.clock, COUNT["run"], *(f"{x:.1f}" for x in means),
                     lasts[ceil(0.95 * n) - 1], sum(r.history.count("▒") - 1 for r in requests)])
    print(f"  {n_blocks} blocks; steps from arrival to first and last token: means, p95 of last")
    table(["", "steps", "tokens run", "mean batch", "first", "last", "p95", "preempted"], *rows)
    print("\n  continuous, one column a step:   · waiting   ▒ prefill   █ decode   x preempted")
    for letter, r in zip(LETTERS, requests):
        text = "".join(vocabulary[token] for token in r.tokens[len(r.prompt):])
        print(f"  {letter} {' ' * r.arrival}{r.history} {text}"[:100])
    check("any scheduler: the same tokens and logits, bit for bit, and no block lost", same)
    return rows

# 8. The bugs people ship --------------------------------------------------------------------------
# None of these need crash: the keys of another text are numbers too. So each subclass serves the
# same scene as the correct server, and every text is compared with the same text run alone.
class NothingToRun(BlockPool):           # all of a prompt may come from the cache
    n_to_run = 0
class HashAlone(BlockPool):              # a block is hashed without what comes before it
    def digest(self, parent, block): return super().digest(None, block)
class NeverCopies(BlockPool):            # forks write where they share
    copy_on_write = False
class FreesTwice(BlockPool):             # two parts of a server free the same table, unnoticed
    def verify(self, block_table): pass
    def free(self, block_table):
        for _ in range(2): super().free(block_table)
class StaleCount(Engine):                # a preempted request keeps its count of cached tokens
    def place(self, r): r.block_table, _ = self.pool.allocate(r.tokens)

def show_bugs(model, a):
    b = [(token + 1) % len(model.weights["token"]) for token in a]       # differs everywhere
    def scene(pool_class=BlockPool, engine_class=Engine):            # -> [(tokens, logits)]
        requests = serve(engine_class(model, pool_class(6, 4)), [
            (a[:9], 1),                  # leaves at once, and frees blocks that the next one shares
            (a[:8], 9),                  # its prompt is in the cache as a whole
            (b[:9], 9),                  # will be preempted
            (b[:8] + a[:8], 4)])         # two halves that were there before, but not as neighbours
        beams = branch(model, pool_class(9, 8), a[:2], 6, likeliest)
        return beams + [(r.tokens[:-1], r.logits) for r in requests]
    texts = {"none": scene(), "no token left to run": scene(NothingToRun),
             "a block hashed alone": scene(HashAlone), "no copy-on-write": scene(NeverCopies),
             "a table freed twice": scene(FreesTwice), "stale count": scene(BlockPool, StaleCount)}
    errors = {bug: max(error(model, *text) for text in texts[bug]) for bug in texts}
    print("  the largest error of any logit, against the same text run alone in one piece")
    table(["bug", "error"], *([bug, f"{x:.3f}"] for bug, x in errors.items()))
    check("each bug changes the logits", [bug for bug in errors if not errors[bug]] == ["none"])
    return errors

# 9. The real world --------------------------------------------------------------------------------
# Llama-3-8B's public config file: layers, key/value heads, head_dim, weights, context. 16 bits.
N_LAYERS, N_KV_HEADS, HEAD_DIM, N_WEIGHTS, CONTEXT = 32, 8, 128, 8.03e9, 8192
MEMORY = {"RTX 4090": 24e9, "A100 80GB": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9}  # bytes
def show_real_world(block_size=16, mean=1000, users=1000, system=2048):
    token, rows = 2 * N_LAYERS * N_KV_HEADS * HEAD_DIM * 2, []       # key and value, 2 bytes each
    for device, memory in MEMORY.items():
        n = int((memory - 2 * N_WEIGHTS) // (block_size * token))
        rows.append([device, n, n * block_size // CONTEXT, n // ceil(mean / block_size)])
    table(["Llama-3-8B", "blocks", f"users, {CONTEXT:,} reserved", f"users, {mean:,} used"], *rows)
    print(f"\n  blocks of {block_size} waste at most {(block_size - 1) * token / 2 ** 20:.2f} MiB "
          f"a request; tables add {4 / block_size / token:.1e}\n  {system:,} tokens for {users:,} "
          f"users: {users * system * token / 1e9:.0f} GB, shared {system * token / 1e9:.2f} GB")
    return {"rows": rows, "token": token}

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
    vocabulary, names, _ = tokenize(names or NAMES.split(), rng)
    section("1. Autograd", show_autograd, len(vocabulary), names[0])
    model, trace = section("2. Data and model", show_model, vocabulary, names, rng)
    section("3. Contiguous memory", show_contiguous)
    served = section("4. Paging", show_paging, model, trace)
    prompts = [r.prompt for r in served]
    return finish(started, memory=show_waste(rng),
        branches=section("5. Sharing", show_sharing, model, prompts[0][:19], rng),
        prompts=section("6. Prefix caching", show_prefix_caching, model, prompts[:5] + prompts[:1]),
        batching=section("7. Continuous batching", show_batching, vocabulary, model, trace, served),
        symptoms=section("8. The bugs people ship", show_bugs, model, prompts[0]),
        real_world=section("9. The real world", show_real_world))

if __name__ == "__main__": run(main, names=read_names)
