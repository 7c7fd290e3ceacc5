"""Several devices compute what one does, at the price of the numbers they must send each other.

A model that does not fit into one device is spread over several. Cut every matrix: each device does
a part of every layer, and twice a layer all add up what they have (tensor parallelism). Or give
each some of the layers: little is sent, but each waits for the one before it, unless the batch
comes in pieces (pipeline parallelism). The devices here are processes, connected by pipes.

  Shoeybi et al. 2019 (1909.08053) Megatron-LM    Huang et al. 2018 (1811.06965) GPipe
  Narayanan et al. 2021 (2104.04473) 1F1B         Pope et al. 2022 (2211.05102) inference
  python microparallel.py [--seed N]              Linux or macOS, only Python, a few seconds

  1. Autograd              derivatives of everything, in fifty lines
  2. The model             a small transformer on one device: what all others must agree with
  3. Collectives           processes, pipes, and the ring that makes a sum everybody's
  4. Tensor parallelism    every matrix in pieces: the same outputs, gradients and training
  5. Pipeline parallelism  the layers in pieces: GPipe and 1F1B, executed and drawn
  6. The bugs people ship  a sum too late, too often, not at all, or in the wrong order
  7. The real world        Llama-3.1 on eight devices, and which way of cutting it is faster
"""
import argparse, codecs, contextlib, gc, itertools, os, random, signal, sys, threading, time, timeit
import array, multiprocessing.connection, multiprocessing.resource_tracker
from collections import defaultdict
from math import exp, log, sqrt
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

def show_autograd(rng):
    x = [Value(rng.gauss(0.0, 1.0)) for _ in range(16)]
    cross_entropy(softmax(x), 0).backward()
    print(f"  Derivatives of a softmax of {len(x)} numbers sum to {sum(v.grad for v in x):.1e}.")
    check("derivatives of a softmax sum to 0", abs(sum(value.grad for value in x)) < 1e-12)

# 2. The model -------------------------------------------------------------------------------------
# Written once, as the code of a rank: a world of one is one device. enter(), leave(): section 4.
VOCAB_SIZE, SEQ_LEN, D_MODEL, N_HEADS = 8, 6, 8, 4
def each(function, tree):
    """Nested lists and dictionaries with function(leaf) in the place of every leaf."""
    if type(tree) is dict: return {name: each(function, branch) for name, branch in tree.items()}
    return [each(function, x) for x in tree] if type(tree) in (list, tuple) else function(tree)
def leaves(tree):
    found = []
    each(found.append, tree)
    return found

def new_model(rng, n_layers, d=D_MODEL):
    def matrix(m, n): return [[rng.gauss(0.0, n ** -0.5) for _ in range(n)] for _ in range(m)]
    ends = {"token": VOCAB_SIZE, "position": SEQ_LEN, "logits": VOCAB_SIZE}
    shapes = {"query": (d, d), "key": (d, d), "value": (d, d), "out": (d, d),
              "up": (4 * d, d), "down": (d, 4 * d), "bias": (1, d)}
    layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(n_layers)]
    return {"layers": layers} | {name: matrix(n, d) for name, n in ends.items()}

def new_example(rng):
    tokens = [rng.randrange(VOCAB_SIZE) for _ in range(SEQ_LEN)]     # which is the largest so far?
    return tokens, [max(tokens[:i + 1]) for i in range(SEQ_LEN)]

def add(a, b): return [x + y for x, y in zip(a, b)]
def relu_rows(rows): return [list(map(relu, row)) for row in rows]
def rmsnorm(x):
    scale = (dot(x, x) / len(x) + 1e-5) ** -0.5
    return [value * scale for value in x]

def attention(rank, world, w, xs):
    """xs [n][d_model] -> [n][d_model], with the heads that the rank owns."""
    head_dim, xs, mixed = len(xs[0]) // N_HEADS, enter(rank, world, xs), [[] for _ in xs]
    q, k, v = (linear(xs, w[name]) for name in ("query", "key", "value"))
    for start in range(0, len(q[0]), head_dim):
        head = slice(start, start + head_dim)
        keys, columns = [key[head] for key in k], list(zip(*(value[head] for value in v)))
        for i, row in enumerate(mixed):
            query = [x * head_dim ** -0.5 for x in q[i][head]]
            weights = softmax([dot(query, key) for key in keys[:i + 1]])
            row += [dot(weights, column[:i + 1]) for column in columns]
    return leave(rank, world, linear(mixed, w["out"]))
def mlp(rank, world, w, xs, early_bias=False):
    ys = linear(relu_rows(linear(enter(rank, world, xs), w["up"])), w["down"])
    if early_bias: return leave(rank, world, [add(y, w["bias"][0]) for y in ys])   # bug
    return [add(y, w["bias"][0]) for y in leave(rank, world, ys)]

def forward(rank, world, w, xs):
    """Tokens -> logits, or, if w has only layers from the midst of a model, [n][d_model] both."""
    if "token" in w: xs = [add(w["token"][x], w["position"][i]) for i, x in enumerate(xs)]
    for layer in w["layers"]:
        xs = list(map(add, xs, attention(rank, world, layer, list(map(rmsnorm, xs)))))
        xs = list(map(add, xs, mlp(rank, world, layer, list(map(rmsnorm, xs)))))
    return linear(list(map(rmsnorm, xs)), w["logits"]) if "logits" in w else xs
def mean_loss(logits, targets, share=1.0):
    return dot(list(map(cross_entropy, logits, targets)), [share / len(targets)] * len(targets))
def train_rank(rank, world, weights, examples):
    """A rank's whole training, one example a step -> the losses."""
    weights = each(Value, weights)
    def loss(i): return mean_loss(forward(rank, world, weights, examples[i][0]), examples[i][1])
    return train(leaves(weights), loss, len(examples), 0.03)

def show_model(rng, n_steps=90, n=10):
    """Train on one device -> (the weights before, the examples, the losses)."""
    weights, examples = new_model(rng, 2), [new_example(rng) for _ in range(n_steps)]
    losses = train_rank(0, World(1), weights, examples)
    means = [(i, sum(losses[i - n:i]) / n) for i in range(n, n_steps + 1)]
    plot("nats per token over steps", {f"training loss, means of {n}": means}, height=8)
    return weights, examples, losses

# 3. Collectives -----------------------------------------------------------------------------------
# What all ranks call together is a collective: only the order of calls tells what a message is.
PATIENCE = 10.0                          # seconds without a message until a rank gives up
class World:
    """What a rank sees of the others: how many ranks there are, and a pipe to each."""
    def __init__(self, size, pipes=(), patience=PATIENCE):
        self.size, self.pipes, self.patience, self.sum_gradients = size, pipes, patience, True
    def send(self, peer, vector, kind):
        message = array.array("d", vector).tobytes()
        COUNT["bytes " + kind] += len(message)               # every byte that is sent
        self.pipes[peer].send_bytes(message)
    def receive(self, peer, kind):
        if not self.pipes[peer].poll(self.patience):
            raise TimeoutError(f"waited {self.patience:g} s for rank {peer} in {kind}")
        return list(array.array("d", self.pipes[peer].recv_bytes()))
def chunk(vector, i, n): return vector[len(vector) * i // n:len(vector) * (i + 1) // n]

def pass_on(rank, world, vector, kind):
    """Send to the next rank of the ring, receive from the one before -> what it sent."""
    if rank % 2 == 0: world.send((rank + 1) % world.size, vector, kind)
    received = world.receive((rank - 1) % world.size, kind)  # A pipe holds little: if all were to
    if rank % 2: world.send((rank + 1) % world.size, vector, kind)     # send first, all might wait.
    return received
def broadcast(rank, world, vector, root=0, kind="broadcast"):
    """The root's vector on every rank: each passes it on. (A tree needs fewer steps.)"""
    if rank != root: vector = world.receive((rank - 1) % world.size, kind)
    if (rank + 1) % world.size != root: world.send((rank + 1) % world.size, vector, kind)
    return vector
def all_gather(rank, world, part, kind="all-gather"):
    parts = {rank: part}
    for step in range(1, world.size):
        parts[(rank - step) % world.size] = part = pass_on(rank, world, part, kind)
    return [x for i in range(world.size) for x in parts[i]]
def reduce_scatter(rank, world, vector, kind="reduce-scatter"):
    """Chunk `rank` of the sum. Chunk c starts at rank c + 1, and each rank adds its own to it."""
    total = chunk(vector, (rank - 1) % world.size, world.size)
    for step in range(2, world.size + 1):
        received = pass_on(rank, world, total, kind)
        own = chunk(vector, (rank - step) % world.size, world.size)
        if len(own) != len(received): raise ValueError(f"{len(own)} numbers meet {len(received)}")
        total = add(received, own)
    return total

def ring_all_reduce(rank, world, vector, kind="all-reduce"):
    """vector [n] of floats -> the sum of all ranks' vectors, [n]. A rank sends 2 (p - 1) / p n of
    them. ValueError if there is no such rank, or if n is not the same on all."""
    if not 0 <= rank < world.size: raise ValueError(f"rank {rank} in a world of {world.size}")
    COUNT[kind] += 1
    return all_gather(rank, world, reduce_scatter(rank, world, vector, kind), kind)
def naive_all_reduce(rank, world, vector, kind="naive"):
    """All send to rank 0, which adds up and sends the sum to all."""
    if rank: world.send(0, vector, kind)
    for peer in range(1, 1 if rank else world.size): vector = add(vector, world.receive(peer, kind))
    for peer in range(1, 1 if rank else world.size): world.send(peer, vector, kind)
    return world.receive(0, kind) if rank else vector

def worker(control, pipes):
    """The life of a process: do what the parent commands, report the result and what it counted."""
    parent = multiprocessing.parent_process()                # end with it, even if it is killed
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    gc.disable()
    globals()["progress"] = lambda *_: None                  # the terminal belongs to the parent
    with contextlib.suppress(EOFError, ConnectionError):                # until the parent hangs up
        while True:
            job, rank, size, patience, arguments = control.recv()
            for store in (TAPE, COUNT): store.clear()
            try: answer = "", job(rank, World(size, pipes, patience), *arguments)
            except (EOFError, ConnectionError): answer = "lost its peer", None
            except Exception as error: answer = f"{type(error).__name__}: {error}", None
            control.send((*answer, COUNT))

class Devices:
    """n processes that wait for jobs: see run(), and do not forget close()."""
    def __init__(self, n):
        if not os.path.exists(globals().get("__file__", "")):
            raise RuntimeError("processes start from a file: save this as one, and import it")
        spawn = multiprocessing.get_context("spawn")         # a new interpreter: nothing is shared
        self.controls, theirs = zip(*(spawn.Pipe() for _ in range(n)))
        pipes = [{} for _ in range(n)]
        for i in range(n):
            for j in range(i): pipes[i][j], pipes[j][i] = spawn.Pipe()
        self.processes = [spawn.Process(target=worker, args=ends, daemon=True)
                          for ends in zip(theirs, pipes)]
        multiprocessing.resource_tracker.ensure_running()    # its own start would end the mask:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})     # no Ctrl-C in between,
        try:                                                 # and none for the children, ever
            for process in self.processes: process.start()
        finally: signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for end in [*theirs, *leaves(pipes)]: end.close()    # or nobody would notice a worker's end
    def close(self):                     # whatever they are doing; twice does no harm
        for process in self.processes: process.kill()
        for process in self.processes: process.join()
    def run(self, job, arguments, patience=None):
        """job(rank, world, *arguments[rank]) on len(arguments) ranks -> (results, counts)."""
        patience, size, failed, answers = patience or PATIENCE, len(arguments), {}, {}
        waiting, give_up = dict(zip(self.controls, range(size))), patience + PATIENCE
        for control, rank in waiting.items():
            with contextlib.suppress(ConnectionError):       # if it is dead, recv() will notice
                control.send((job, rank, size, patience, arguments[rank]))
        while waiting and (ready := multiprocessing.connection.wait(waiting, give_up)):
            for rank in map(waiting.pop, ready):
                try: failure, *answers[rank] = self.controls[rank].recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(1.0)
                    failure = f"died, exit code {self.processes[rank].exitcode}"
                if failure: failed[rank], give_up = failure, 1.0       # for the others' reports
        if not waiting and not failed: return zip(*(answers[rank] for rank in range(size)))
        self.close()
        stuck = len(failed) == size and all("TimeoutError" in text for text in failed.values())
        failed |= dict.fromkeys(waiting.values(), "does not answer")
        reasons = "; ".join(f"rank {rank} {failed[rank]}" for rank in sorted(failed))
        raise RuntimeError("deadlock: " * stuck + reasons)
def ring_numbers(n, p): return 2 * (p - 1) / p * n           # that a rank sends to all-reduce n
def off(a, b): return max(abs(x - y) for x, y in zip(leaves(a), leaves(b)))

def show_collectives(rng, devices, n=1200, p=4):
    vectors = [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(p)]
    half, sent, rows, found = [4 * ring_numbers(n, p)] * p, {}, [], {}
    for job, formula in ((broadcast, [8 * n] * (p - 1) + [0]),
                         (all_gather, half), (reduce_scatter, half),
                         (naive_all_reduce, [(p - 1) * 8 * n] + [8 * n] * (p - 1)),
                         (ring_all_reduce, add(half, half))):
        given, name = n // p if job is all_gather else n, job.__name__
        found[name], counts = devices.run(job, [(vector[:given],) for vector in vectors])
        sent[name] = [sum(c[kind] for kind in c if "bytes" in kind) for c in counts]
        rows.append([name.replace("_", " "), *sent[name], f"{max(formula):,.0f}"])
        check(f"{rows[-1][0]}: bytes = formula", sent[name] == formula)
    table([f"bytes sent, {n} numbers", *(f"rank {i}" for i in range(p)), "busiest, formula"], *rows)
    naive, ring = found["naive_all_reduce"], found["ring_all_reduce"]
    check("ring: rank 0's sum to rounding, bit for bit the same on all ranks",
          off(naive, ring) < 1e-12 and leaves(ring) == p * ring[0], f"{off(naive, ring):.1e}")
    return sent

# 4. Tensor parallelism ----------------------------------------------------------------------------
# An MLP is y = B relu(A x). Give a rank some of the hidden units: their rows of A, their columns of
# B. It computes its part of relu(A x) alone, and from it a summand of y: one all-reduce for two
# matrices. (Megatron writes x A, and so says: A by columns, then B by rows.) Attention is the same
# with heads. Backward, a rank has a summand of d loss / d x: forward identity, backward all-reduce.
def enter(rank, world, xs):
    """xs [n][d_model], replicated -> xs: all-reduce of their gradients, backward. Megatron's f."""
    def sum_gradients():                 # runs when the backward pass asks for the inputs
        grads = ring_all_reduce(rank, world, [x.grad for x in leaves(xs)], "backward")
        for x, x.grad in zip(leaves(xs), grads): yield from ()
    if world.size > 1 and type(xs[0][0]) is Value and world.sum_gradients:
        Value(0.0, sum_gradients()).grad = 1.0               # is on the tape now
    return xs

def leave(rank, world, ys):
    """ys [n][d_model], summands -> their sum, replicated: all-reduce forward. Megatron's g."""
    if world.size == 1: return ys
    n, own = len(ys[0]), leaves(ys)
    total = ring_all_reduce(rank, world, floats(own), "forward")
    if type(own[0]) is Value: total = [Value(x, (y,), (1.0,)) for x, y in zip(total, own)]
    return [total[i:i + n] for i in range(0, len(total), n)]
def shard(model, rank, size):
    """What a rank owns. All have the bias, which is added after the all-reduce."""
    def cut(name, rows):
        if name in ("query", "key", "value", "up"): return chunk(rows, rank, size)
        return rows if name == "bias" else [chunk(row, rank, size) for row in rows]
    def part(layer): return {name: cut(name, rows) for name, rows in layer.items()}
    return model | {"layers": list(map(part, model["layers"]))}
def pass_both_ways(rank, world, weights, example, bug=False):   # -> gradients, logits, Values alive
    world.sum_gradients, weights = not bug, each(Value, weights)
    logits = forward(rank, world, weights, example[0])
    loss, alive = mean_loss(logits, example[1]), len(TAPE)
    loss.backward()
    return each(lambda w: w.grad, weights), list(map(floats, logits)), alive

def ms_per_token(rank, world, seed, d_model):    # best of eight, in a wide layer
    weights = shard(new_model(random.Random(seed), 1, d_model), rank, world.size)
    return 1e3 * min(timeit.repeat(lambda: forward(rank, world, weights, [0]), number=1, repeat=8))

def show_tensor_parallelism(rng, devices, weights, examples, losses, wide=160):
    gradients, logits, _ = pass_both_ways(0, World(1), weights, examples[0])
    n_layers, rows, far, exact = len(weights["layers"]), [], {}, True
    for p in (1, 2, 4):
        parts, wanted = ([shard(tree, i, p) for i in range(p)] for tree in (weights, gradients))
        results, counts = devices.run(pass_both_ways, [(part, examples[0]) for part in parts])
        grads, outputs, values = zip(*results)
        far[p] = off(outputs, [logits] * p), off(grads, wanted)
        formula = [len(leaves(weights)) - n_layers * 12 * D_MODEL ** 2 * (p - 1) // p,
                   (p > 1) * 2 * n_layers, 16 * n_layers * ring_numbers(SEQ_LEN * D_MODEL, p)]
        exact = exact and all([len(leaves(part)), c[way], c["bytes " + way]] == formula
                              for part, c in zip(parts, counts) for way in ("forward", "backward"))
        rows.append([f"{p}", values[0], *map(int, formula), *map("{:.1e}".format, far[p])])
    table(["ranks", "Values", "weights", "sums forward", "bytes", "logits off", "grads off"], *rows)
    runs, _ = devices.run(train_rank, [(shard(weights, i, 2), examples) for i in (0, 1)])
    far["training"] = off(runs, [losses] * 2)
    times = [max(next(devices.run(ms_per_token, [(rng.random(), wide)] * p))) for p in (1, 2)]
    print("  A layer {} wide, per token: {:.2f} ms on 1 rank, {:.2f} ms on 2.".format(wide, *times))
    check("one device's logits and gradients, to rounding", max(max(far[2]), max(far[4])) < 1e-10)
    check("two all-reduces a layer each way; bytes, and weights of a rank = formula", exact)
    check(f"training, {len(losses)} steps: one device's losses, and on both ranks the same bits",
          far["training"] < 1e-6 and runs[0] == runs[1], f"off by {far['training']:.1e}")
    return far

# 5. Pipeline parallelism --------------------------------------------------------------------------
# A rank owns some of the layers: a stage. Lest the others wait, a batch comes in m microbatches,
# whose gradients add up. GPipe runs all forward, then all backward, and keeps the activations of m.
# In 1F1B a stage turns to a backward as soon as it can: stage s of p keeps only min(p - s, m).
def pipeline_schedule(n_stages, n_microbatches, kind):
    """kind: gpipe or 1f1b -> the work of each stage, in order: [("F" or "B", microbatch), ...]."""
    bubble_fraction(n_stages, n_microbatches)
    if kind not in ("gpipe", "1f1b"): raise ValueError(f"no schedule {kind!r}: gpipe or 1f1b")
    forwards, backwards = ([(way, i) for i in range(n_microbatches)] for way in "FB")
    schedule = []
    for stage in range(n_stages):
        ahead = n_microbatches if kind == "gpipe" else min(n_microbatches, n_stages - 1 - stage)
        in_turn = [work for pair in zip(forwards[ahead:], backwards) for work in pair]
        schedule.append(forwards[:ahead] + in_turn + backwards[n_microbatches - ahead:])
    return schedule
def bubble_fraction(n_stages, n_microbatches):
    """The share of the stages' time spent waiting. ValueError if one of the numbers is below 1."""
    if n_stages < 1 or n_microbatches < 1: raise ValueError(
        f"{n_stages} stages, {n_microbatches} microbatches: 1 at least")
    return (n_stages - 1) / (n_microbatches + n_stages - 1)

def run_stage(rank, world, weights, examples, kind):
    """One training step of a stage -> (gradients, [(way, microbatch, begin, end)], most kept).
    A forward takes 1 tick, a backward 2, and nothing begins before its message was ready."""
    weights, log, kept, most, clock = each(Value, weights), [], {}, 0, 0
    for way, i in pipeline_schedule(world.size, len(examples), kind)[rank]:
        source, target = (rank - 1, rank + 1) if way == "F" else (rank + 1, rank - 1)
        first, last = (not 0 <= peer < world.size for peer in (source, target))
        ready, *received = [0.0] if first else world.receive(source, way)
        begin = max(clock, int(ready))
        clock = begin + (1 if way == "F" else 2)
        log.append((way, i, begin, clock))
        if way == "F":
            inputs = list(map(Value, received))
            rows = [inputs[at:at + D_MODEL] for at in range(0, len(inputs), D_MODEL)]
            xs = forward(0, World(1), weights, examples[i][0] if first else rows)
            if last: xs = [mean_loss(xs, examples[i][1], 1.0 / len(examples))]
            kept[i] = inputs, leaves(xs), TAPE[:]            # the graph is put away ...
            TAPE.clear()
            most, result = max(most, len(kept)), floats(leaves(xs))
        else:
            inputs, outputs, tape = kept.pop(i)
            TAPE.extend(tape)                                # ... and laid back: received is
            dot(outputs, received or [1.0]).backward()       # d loss / d outputs
            result = [x.grad for x in inputs]
        if not last: world.send(target, [clock, *result], way)
    return each(lambda w: w.grad, weights), log, most
def stage_of(model, stage, p):
    """What a stage owns: some layers, the first the embeddings too, the last the logits."""
    ends = (stage == 0) * ["token", "position"] + (stage == p - 1) * ["logits"]
    return {name: model[name] for name in ends} | {"layers": chunk(model["layers"], stage, p)}

def show_pipeline(rng, devices, p=4, m=8):
    model, examples, found = new_model(rng, p), [new_example(rng) for _ in range(m)], {}
    formula, sent = bubble_fraction(p, m), [8 * m * (1 + SEQ_LEN * D_MODEL)] * (p - 1)
    print("  ░ forward, ▓ backward, · waiting; beside a stage, how many microbatches it kept")
    for kind, most in ("gpipe", [m] * p), ("1f1b", [min(p - s, m) for s in range(p)]):
        whole, _, _ = run_stage(0, World(1), model, examples, kind)
        stages, wanted = ([stage_of(tree, s, p) for s in range(p)] for tree in (model, whole))
        results, counts = devices.run(run_stage, [(stage, examples, kind) for stage in stages])
        gradients, logs, kept = map(list, zip(*results))
        ticks = max(end for log in logs for *_, end in log)
        found[kind] = bubble, _ = 1.0 - 3 * m / ticks, kept
        print(f"\n  {kind}: bubble {bubble:.1%}, formula {formula:.1%}; {sent[0]:,} bytes each way")
        for stage, log in enumerate(logs):
            line = ["··"] * ticks
            for way, i, begin, end in log:
                line[begin:end] = ["░" + str(i)] if way == "F" else ["▓▓", "▓" + str(i)]
            print(f"  {kept[stage]} {''.join(line)}")
        check(f"{kind}: one device's gradients, bit for bit", gradients == wanted)
        moved = [[c["bytes " + way] for c in counts] for way in "FB"]
        check(f"{kind}: bubble = (p - 1) / (m + p - 1); activations kept and bytes = formula",
              abs(bubble - formula) < 1e-12 and (kept, moved) == (most, [[*sent, 0], [0, *sent]]))
    return found

# 6. The bugs people ship --------------------------------------------------------------------------
def cut_by_inputs(rank, world, up, x, bug):
    """Hidden units of an MLP cut the other way: a rank knows only some of the inputs."""
    summands = relu_rows(linear(x, up)) if bug else linear(x, up)
    return relu_rows(leave(rank, world, summands))           # relu(a) + relu(b) is not relu(a + b)
def token_gradients(*arguments): return pass_both_ways(*arguments)[0]["token"]

def show_bugs(devices, weights, example):
    found, parts = {}, [shard(weights, i, 2) for i in (0, 1)]
    x, layer = weights["token"][:1], weights["layers"][0]
    halves = [[[chunk(row, i, 2) for row in rows] for rows in (layer["up"], x)] for i in (0, 1)]
    for bug, job, mine, alone in (
            ("relu before all-reduce", cut_by_inputs, halves, (layer["up"], x)),
            ("bias on both ranks", mlp, [(w["layers"][0], x) for w in parts], (layer, x)),
            ("gradients not summed", token_gradients, [(w, example) for w in parts],
                (weights, example))):
        right = job(0, World(1), *alone, False)
        runs = [next(devices.run(job, [(*w, wrong) for w in mine])) for wrong in (True, False)]
        found[bug] = [off(run[0], right) for run in runs]
    table(["on 2 ranks", "off by", "without the bug"],
          *([bug, *map("{:.1e}".format, errors)] for bug, errors in found.items()))
    check("with a bug wrong, without right", all(b < 1e-10 < 1e-6 < a for a, b in found.values()))
    try: devices.run(broadcast, [([1.0], 1), ([1.0], 0)], patience=0.3)
    except RuntimeError as error: found["deadlock"] = str(error).replace("; ", ";\n    ")
    print("  A broadcast, and each rank takes the other for the root:\n   ", found["deadlock"])
    check("a deadlock ends in an error that says so", "deadlock" in found["deadlock"])
    return found

# 7. The real world --------------------------------------------------------------------------------
# Public config files: layers, d_model, key/value heads, head_dim, parameters.
MODELS = {"Llama-3.1-70B": (80, 8192, 8, 128, 70.6e9),
          "Llama-3.1-405B": (126, 16384, 8, 128, 405e9)}
# Data sheet of H200: 16-bit FLOP/s, memory in bytes/s and bytes; NVLink 4 and NDR, bytes/s one way.
PEAK, BANDWIDTH, MEMORY, LINKS = 989e12, 4.8e12, 141e9, {"NVLink": 450e9, "InfiniBand": 50e9}

def show_real_world(p=8, context=8192, prompt=1024):
    """Decoding is bound by reading weights and caches, prefill by arithmetic, 2 FLOP per weight and
    token. In a pipeline, a decoding batch is p microbatches; in prefill, a prompt is one."""
    seconds, rows = {}, []
    for model, (n_layers, d_model, n_kv_heads, head_dim, n_weights) in MODELS.items():
        cache, weights = 4 * n_layers * n_kv_heads * head_dim / p, 2 * n_weights / p
        print(f"  {model}, each of {p} H200: {weights / 1e9:.1f} GB of weights; per token "
              f"{cache / 1024:.0f} KiB of KV\n  ({(MEMORY - weights) / cache:,.0f} fit), "
              f"{2 * n_layers} all-reduces of {2 * ring_numbers(d_model, p):,.0f} B")
        part, whole = ((weights + n * context * cache) / BANDWIDTH for n in (64 / p, 64))
        compute = 2 * n_weights * prompt / p / PEAK                    # for one prompt
        work = {"decode 64": (64, p, whole, p, part),
                f"prefill {p}": (p * prompt, p, p * compute, 2 * p - 1, compute)}
        for (name, (tokens, m, alone, turns, turn)), link in itertools.product(work.items(), LINKS):
            sums = 2 * n_layers * 2 * ring_numbers(tokens * d_model, p) / LINKS[link]
            times = alone + sums, turns * (turn + 2 * tokens / m * d_model / LINKS[link])
            seconds[model, name, link] = times
            rows.append([f"{model[10:]}, {name}, {link}", f"{sums / times[0]:.1%}",
                         *(f"{1e3 * t:,.1f}" for t in times), "TP PP".split()[times[0] > times[1]]])
    table(["sequences", "all-reduces", "tensor (TP), ms", "pipeline (PP), ms", "faster"], *rows)
    return seconds

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
    started, rng = begin(), random.Random(seed)
    with contextlib.closing(Devices(4)) as devices:          # starting while the model trains
        section("1. Autograd", show_autograd, rng)
        weights, examples, losses = section("2. The model", show_model, rng)
        sent = section("3. Collectives", show_collectives, rng, devices)
        far = section("4. Tensor parallelism", show_tensor_parallelism, rng, devices, weights,
                      examples, losses)
        pipeline = section("5. Pipeline parallelism", show_pipeline, rng, devices)
        bugs = section("6. The bugs people ship", show_bugs, devices, weights, examples[0])
    seconds = section("7. The real world", show_real_world)
    return finish(started, losses=losses, bytes_sent=sent, tensor_off=far, pipeline=pipeline,
                  bugs=bugs, seconds=seconds)

if __name__ == "__main__":
    try: run(main)
    except RuntimeError as error: sys.exit(f"microparallel.py: {error}")      # a worker died
