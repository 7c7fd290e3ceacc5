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
import argparse, array, codecs, contextlib, gc, os, random, signal, sys, threading, time, timeit
import multiprocessing.resource_tracker
from collections import defaultdict, namedtuple
from itertools import combinations
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

def show_autograd(x):
    (x * x).backward()
    (x * 3.0).backward()                 # a second graph, as when a batch comes in pieces
    print(f"  gradients of x² and 3x add up to {x.grad:.9f}; 2x + 3 is {2.0 * x.data + 3.0:.9f}")
    check("gradients of two graphs add up", abs(x.grad - 2.0 * x.data - 3.0) < 1e-12)

# 2. The model -------------------------------------------------------------------------------------
# The task: at each position of a sequence of tokens, numbers from 0 to 7, name the largest so far.
# A token is a vector, 1 at its place and else 0. In a layer, attention lets a position take
# something over from those before it, in several searches side by side, the heads; then an MLP, two
# matrices with relu in between, works on each position by itself. Both add to the vector, which in
# the end scores every token. (A real model has look-up tables, positions and norms, too.) The code
# is that of a rank: one device of a world. Alone, enter() and leave() (section 4) do nothing.
SEQ_LEN, D_MODEL, N_HEADS = 6, 8, 4
def each(f, tree): return [each(f, x) for x in tree] if type(tree) in (list, tuple) else f(tree)
def leaves(tree): return sum(map(leaves, tree), []) if type(tree) in (list, tuple) else [tree]
def off(a, b): return max(abs(x - y) for x, y in zip(leaves(a), leaves(b), strict=True))
def add(a, b): return [x + y for x, y in zip(a, b, strict=True)]
def chunk(vector, i, n): return vector[len(vector) * i // n:len(vector) * (i + 1) // n]
def rows_of(vector, width): return [vector[i:i + width] for i in range(0, len(vector), width)]
def relu_rows(rows): return [[relu(x) for x in row] for row in rows]
def mean_loss(logits, targets): return sum(map(cross_entropy, logits, targets)) / len(targets)
def mlp(xs, up, down): return linear(relu_rows(linear(xs, up)), list(zip(*down)))

def attention(xs, query, key, value, out):
    """xs [n][d_model], some heads' rows of the matrices -> [n][d_model]"""
    queries, keys, values = linear(xs, query), linear(xs, key), linear(xs, value)
    head_dim, mixed = len(xs[0]) // N_HEADS, [[] for _ in xs]
    for start in range(0, len(query), head_dim):
        head = slice(start, start + head_dim)
        columns = list(zip(*(row[head] for row in values)))
        for i, q in enumerate(queries):
            weights = softmax([dot(q[head], k[head]) * head_dim ** -0.5 for k in keys[:i + 1]])
            mixed[i] += [dot(weights, column[:i + 1]) for column in columns]
    return linear(mixed, list(zip(*out)))

def forward(rank, world, model, xs):
    """xs [n][d_model] -> [n][d_model], through all layers of the model."""
    for heads, hidden_units, bias in model:
        for part, weights in (attention, heads), (mlp, hidden_units):
            ys = leave(rank, world, part(enter(rank, world, xs), *weights))
            xs = list(map(add, xs, ys))
        xs = [add(x, bias) for x in xs]                      # after the sum over the ranks
    return xs

def new_model(rng, n_layers, d=D_MODEL):
    """-> [[query, key, value, out], [up, down], bias] a layer; `out` and `down` are transposed."""
    def rows(n): return [[rng.gauss(0.0, 0.5 * d ** -0.5) for _ in range(d)] for _ in range(n)]
    def layer(): return [[rows(d) for _ in range(4)], [rows(4 * d), rows(4 * d)], rows(1)[0]]
    return [layer() for _ in range(n_layers)]
def new_example(rng):
    tokens = [rng.randrange(D_MODEL) for _ in range(SEQ_LEN)]
    vectors = [[float(i == token) for i in range(D_MODEL)] for token in tokens]
    return vectors, [max(tokens[:i + 1]) for i in range(SEQ_LEN)]

def train_rank(rank, world, model, examples):
    model, examples = each(Value, model), [(each(Value, xs), targets) for xs, targets in examples]
    def loss_at(i): return mean_loss(forward(rank, world, model, examples[i][0]), examples[i][1])
    return train(leaves(model), loss_at, len(examples), 0.03)

def show_model(rng, n_steps=90, n=10):
    model, examples = new_model(rng, 2), [new_example(rng) for _ in range(n_steps)]
    losses = train_rank(0, World(1), model, examples)
    means = [(i, sum(losses[i - n:i]) / n) for i in range(n, n_steps + 1)]
    plot("nats per token over steps", {f"training loss, means of {n}": means}, height=8)
    return model, examples, losses

# 3. Collectives -----------------------------------------------------------------------------------
# Each rank is a process with its own memory, and a pipe to each other rank. What all do together is
# a collective: all must call it, and in one order, for only the order tells what a message is. The
# main one is the all-reduce: each has a vector, and each gets the sum. Naively, all send to rank 0,
# which has p - 1 sums to send back. Better is a ring: each of p chunks of a vector goes around, and
# all add their own (reduce-scatter); then the sums go around, to be known to all (all-gather).
World = namedtuple("World", "size pipes patience", defaults=((), 10.0))      # as a rank sees it

def send(world, peer, vector, kind):
    message = array.array("d", vector).tobytes()
    COUNT["bytes " + kind] += len(message)                   # every byte that is sent
    world.pipes[peer % world.size].send_bytes(message)
def receive(world, peer, kind):
    pipe = world.pipes[peer % world.size]
    if pipe.poll(world.patience): return list(array.array("d", pipe.recv_bytes()))
    raise TimeoutError(f"waited {world.patience:g} s for rank {peer % world.size} in {kind}")

def pass_on(rank, world, vector, kind):
    """Send to the next rank of the ring, receive from the one before -> what it sent."""
    if rank % 2 == 0: send(world, rank + 1, vector, kind)    # A pipe holds little: if all sent
    received = receive(world, rank - 1, kind)                # first, all might wait for a reader.
    if rank % 2 == 1: send(world, rank + 1, vector, kind)
    return received

def broadcast(rank, world, vector, root=0, kind="broadcast"):
    """The root's vector on every rank: each passes it on. (A tree needs fewer steps.)"""
    if rank != root: vector = receive(world, rank - 1, kind)
    if (rank + 1) % world.size != root: send(world, rank + 1, vector, kind)
    return vector

def all_gather(rank, world, part, kind="all-gather"):
    """All ranks' parts in a row, on every rank. Each passes on the part that it got last."""
    parts = {rank: part}
    for step in range(1, world.size):
        part = pass_on(rank, world, part, kind)
        parts[(rank - step) % world.size] = part
    return [x for owner in range(world.size) for x in parts[owner]]

def reduce_scatter(rank, world, vector, kind="reduce-scatter"):
    """Chunk `rank` of the sum. Chunk c starts at rank c + 1, and each rank adds its own to it."""
    total = chunk(vector, (rank - 1) % world.size, world.size)
    for step in range(2, world.size + 1):
        received = pass_on(rank, world, total, kind)
        total = add(received, chunk(vector, (rank - step) % world.size, world.size))
    return total

def ring_all_reduce(rank, world, vector, kind="ring all-reduce"):
    """vector [n] of floats -> the sum of all ranks' vectors, [n]. A rank sends 2 (p - 1) / p n of
    them. ValueError if there is no such rank, or if n is not the same on all."""
    if not 0 <= rank < world.size: raise ValueError(f"rank {rank} in a world of {world.size}")
    COUNT[kind] += 1
    return all_gather(rank, world, reduce_scatter(rank, world, vector, kind), kind)

def naive_all_reduce(rank, world, vector, kind="naive all-reduce"):
    if rank > 0:
        send(world, 0, vector, kind)
        return receive(world, 0, kind)
    for peer in range(1, world.size): vector = add(vector, receive(world, peer, kind))
    for peer in range(1, world.size): send(world, peer, vector, kind)
    return vector

# A process may die, hang, or stay behind. Who reads from a pipe whose other end is closed gets an
# error, unless someone else has that end open: so the parent closes its copies of the workers'
# ends. Who hangs is noticed by those who wait: they give up. Ctrl-C goes to all processes of a
# terminal, unless they block it, and that is inherited: so the parent does while it starts them.
def worker(job, rank, world, arguments):
    """The life of a process: do the job, send a failure, or the result and what it counted."""
    def end_with_parent():               # even if that is killed while this rank waits in a send
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    parent, failure, result = world.pipes["parent"], "", None
    try: result = job(rank, world, *arguments)
    except (EOFError, ConnectionError): failure = "lost its peer"
    except Exception as error: failure = f"{type(error).__name__}: {error}"
    with contextlib.suppress(ConnectionError):               # the parent has gone
        parent.send(failure or (result, COUNT))
        if "TimeoutError" in failure: parent.poll(None)      # stay: the others shall time out, too

def on_ranks(job, arguments, patience=10.0):
    """job(rank, world, *arguments[rank]) in a process for each rank -> (results, counts).
    RuntimeError if a rank fails, dies or does not answer. No process is left in any case."""
    if not os.path.exists(globals().get("__file__", "")):
        raise RuntimeError("processes start from a file: save this as one, and import it")
    spawn = multiprocessing.get_context("spawn")             # a new interpreter: nothing is shared
    mine, theirs = zip(*(spawn.Pipe() for _ in arguments))   # the parent's ends, and the workers'
    pipes = [{"parent": end} for end in theirs]              # pipes[i][j]: of rank i, to rank j
    for i, j in combinations(range(len(pipes)), 2): pipes[i][j], pipes[j][i] = spawn.Pipe()
    multiprocessing.resource_tracker.ensure_running()        # later, its start would unblock
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    processes, answers, seconds = [], [], patience + 10.0
    try:
        for rank, ends in enumerate(pipes):
            life = job, rank, World(len(pipes), ends, patience), arguments[rank]
            process = spawn.Process(target=worker, args=life, daemon=True)
            process.start()
            processes.append(process)
        for end in leaves([list(ends.values()) for ends in pipes]): end.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process, pipe in zip(processes, mine):
            try: answers.append(pipe.recv() if pipe.poll(seconds) else "does not answer")
            except (EOFError, ConnectionError):
                process.join(1.0)
                answers.append(f"died, exit code {process.exitcode}")
            if type(answers[-1]) is str: seconds = 3.0       # the others will fail soon as well
    finally:
        for process in processes: process.kill()
        for process in processes: process.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    failures = [f"rank {rank} {text}" for rank, text in enumerate(answers) if type(text) is str]
    if not failures: return list(zip(*answers))
    stuck = len(failures) == len(pipes) and all("TimeoutError" in text for text in failures)
    raise RuntimeError(("deadlock: " if stuck else "") + "; ".join(failures))

def all_collectives(rank, world, vector):
    for job in (broadcast, reduce_scatter): job(rank, world, vector)
    all_gather(rank, world, chunk(vector, rank, world.size))
    return naive_all_reduce(rank, world, vector), ring_all_reduce(rank, world, vector)

def show_collectives(rng, n=1200, p=4):
    vectors = [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(p)]
    results, counts = on_ranks(all_collectives, [(vector,) for vector in vectors])
    whole, once = 8 * n, 8 * n * (p - 1) // p                # bytes: a vector, all chunks but one
    formulas = {"broadcast": [whole] * (p - 1) + [0], "all-gather": [once] * p,
                "reduce-scatter": [once] * p, "ring all-reduce": [2 * once] * p,
                "naive all-reduce": [whole * (p - 1)] + [whole] * (p - 1)}
    sent = {kind: [count["bytes " + kind] for count in counts] for kind in formulas}
    table([f"bytes sent, {n} numbers", *(f"rank {i}" for i in range(p)), "busiest, formula"],
          *([kind, *sent[kind], max(formulas[kind])] for kind in sent))
    naive, ring = zip(*results)
    check("bytes of all collectives, on all ranks = formula", sent == formulas)
    check("ring: rank 0's sum to rounding, bit for bit the same on all ranks",
          off(naive, ring) < 1e-12 and list(ring) == [ring[0]] * p, f"{off(naive, ring):.1e}")
    return sent

# 4. Tensor parallelism ----------------------------------------------------------------------------
# An MLP is y = B relu(A x). Give a rank some of the hidden units, a shard: their rows of A, their
# columns of B. It computes its part of relu(A x) alone, and from it a summand of y: one all-reduce
# for two matrices. (Megatron writes x A, and so says: A by columns, then B by rows.) Attention is
# the same with heads. Backward, the summands are at the other end: all have used x, and each has a
# part of d loss / d x. Both are sums in another order than on one device, so the last bits differ.
class GradientSum:
    """On the tape, where all ranks receive a vector: adds up its gradients over the ranks.
    backward() asks each node for its inputs, the last node first. When it asks this one, it is done
    with all that was computed from the vector, so this rank's gradients of it are complete."""
    grad, partials = 1.0, ()             # as backward() expects of a node
    def __init__(self, rank, world, xs): self.rank, self.world, self.xs = rank, world, xs

    @property
    def inputs(self):
        total = ring_all_reduce(self.rank, self.world, [x.grad for x in self.xs], "backward")
        for x, gradient in zip(self.xs, total): x.grad = gradient
        return ()

def enter(rank, world, xs):
    """xs [n][d_model], replicated -> a copy, its gradients to be summed backward. Megatron's f."""
    if world.size == 1 or type(xs[0][0]) is not Value: return xs
    copy = each(lambda x: x + 0.0, xs)   # xs also goes around the layer; that is no summand
    TAPE.append(GradientSum(rank, world, leaves(copy)))
    return copy
def leave(rank, world, ys):
    """ys [n][d_model], summands -> their sum, replicated: all-reduce forward. Megatron's g."""
    if world.size == 1: return ys
    total = ring_all_reduce(rank, world, floats(leaves(ys)), "forward")
    if type(ys[0][0]) is Value: total = [Value(x, (y,), (1.0,)) for x, y in zip(total, leaves(ys))]
    return rows_of(total, len(ys[0]))

def cut(matrices, i, n): return [chunk(rows, i, n) for rows in matrices]
def shard(model, i, n): return [[cut(a, i, n), cut(b, i, n), bias] for a, b, bias in model]

def pass_both_ways(rank, world, model, example, bug=False):
    """-> (gradients like the model, logits, nodes on the tape in between)"""
    model, xs = each(Value, model), each(Value, example[0])
    logits = forward(rank, world, model, xs)
    loss, alive = mean_loss(logits, example[1]), len(TAPE)
    if bug: TAPE[:] = [node for node in TAPE if type(node) is Value]     # without GradientSums
    loss.backward()
    return each(lambda w: w.grad, model), each(lambda x: x.data, logits), alive

def ms_per_token(rank, world, d_model):          # best of eight, in a wide layer
    model, xs = shard(new_model(random.Random(1), 1, d_model), rank, world.size), [[1.0] * d_model]
    return 1e3 * min(timeit.repeat(lambda: forward(rank, world, model, xs), number=1, repeat=8))

def show_tensor_parallelism(model, examples, losses, wide=160):
    gradients, logits, _ = pass_both_ways(0, World(1), model, examples[0])
    rows, far = [], {}
    for p in (1, 2, 4):
        parts = [shard(model, i, p) for i in range(p)]
        wanted = [shard(gradients, i, p) for i in range(p)]
        results, counts = on_ranks(pass_both_ways, [(part, examples[0]) for part in parts])
        found, outputs, alive = zip(*results)
        far[p] = off(outputs, [logits] * p), off(found, wanted)
        rows.append([f"{p}", len(leaves(parts[0])), alive[0], counts[0]["forward"],
                     counts[0]["bytes forward"], *(f"{x:.1e}" for x in far[p])])
    table(["ranks", "weights", "Values", "all-reduces", "bytes", "logits off", "grads off"], *rows)
    runs, _ = on_ranks(train_rank, [(shard(model, rank, 2), examples) for rank in (0, 1)])
    far["training"] = off(runs, [losses] * 2)
    one, two = [max(on_ranks(ms_per_token, [(wide,)] * p)[0]) for p in (1, 2)]
    print(f"  A layer {wide} wide: {one:.2f} ms per token on 1 rank, {two:.2f} ms on 2.")
    check("one device's logits and gradients, to rounding", max(far[2] + far[4]) < 1e-10)
    check("two all-reduces a layer forward, two backward",
          all(count["forward"] == count["backward"] == 2 * len(model) for count in counts))
    check(f"training, {len(losses)} steps: one device's losses, and on both ranks the same bits",
          far["training"] < 1e-6 and runs[0] == runs[1], f"off by {far['training']:.1e}")
    return far

# 5. Pipeline parallelism --------------------------------------------------------------------------
# A rank owns some of the layers, a stage: vectors come from the stage before and go to the one
# behind, derivatives go back. Lest all others wait for the one that works, a batch comes in m
# microbatches, whose gradients add up. Waiting remains while the pipeline fills and empties: the
# bubble. GPipe runs all forward, then all backward, and keeps m graphs. In 1F1B (one forward, one
# backward) a stage turns back as soon as it can, and stage s of p keeps only min(p - s, m).
def bubble_fraction(n_stages, n_microbatches):
    """The share of the stages' time spent waiting. ValueError if one of the numbers is below 1."""
    if n_stages < 1 or n_microbatches < 1:
        raise ValueError(f"{n_stages} stages, {n_microbatches} microbatches: 1 at least")
    return (n_stages - 1) / (n_microbatches + n_stages - 1)

def pipeline_schedule(n_stages, n_microbatches, kind):
    """kind: gpipe or 1f1b -> the work of each stage, in order: [("F" or "B", microbatch), ...]."""
    bubble_fraction(n_stages, n_microbatches)                # refuses bad numbers
    if kind not in ("gpipe", "1f1b"): raise ValueError(f"no schedule {kind!r}: gpipe or 1f1b")
    schedule = []
    for stage in range(n_stages):
        ahead = n_microbatches if kind == "gpipe" else min(n_microbatches, n_stages - 1 - stage)
        turn = {("F", i): i for i in range(n_microbatches)}
        turn |= {("B", i): ahead + i + 0.5 for i in range(n_microbatches)}
        schedule.append(sorted(turn, key=turn.get))
    return schedule

def stage_forward(model, received, targets):
    """received: a microbatch's vectors in a row -> (inputs, outputs, the graph between them)."""
    inputs = [Value(x) for x in received]
    outputs = forward(0, World(1), model, rows_of(inputs, D_MODEL))
    if targets: outputs = mean_loss(outputs, targets)        # the last stage
    tape, TAPE[:] = TAPE[:], []          # put away until the derivatives arrive
    return inputs, leaves(outputs), tape
def stage_backward(inputs, outputs, tape, received):
    TAPE.extend(tape)
    dot(outputs, received).backward()    # received: d loss / d outputs
    return [x.grad for x in inputs]

def run_stage(rank, world, model, examples, kind):
    """One training step of a stage -> (gradients, [(way, microbatch, begin, end)], most kept)."""
    model, log, kept, most, clock, last = each(Value, model), [], {}, 0, 0, world.size - 1
    for way, i in pipeline_schedule(world.size, len(examples), kind)[rank]:
        source, target = (rank - 1, rank + 1) if way == "F" else (rank + 1, rank - 1)
        ready, received = 0, leaves(examples[i][0]) if way == "F" else [1.0 / len(examples)]
        if 0 <= source <= last: ready, *received = receive(world, source, way)
        begin = max(clock, int(ready))   # nothing begins before its message was ready
        clock = begin + (1 if way == "F" else 2)             # a backward takes two ticks
        log.append((way, i, begin, clock))
        if way == "F":
            kept[i] = stage_forward(model, received, examples[i][1] if rank == last else None)
            most, result = max(most, len(kept)), floats(kept[i][1])
        else: result = stage_backward(*kept.pop(i), received)
        if 0 <= target <= last: send(world, target, [clock, *result], way)
    return each(lambda w: w.grad, model), log, most

def show_pipeline(rng, p=4, m=8):
    model, examples, found = new_model(rng, p), [new_example(rng) for _ in range(m)], {}
    whole, _, _ = run_stage(0, World(1), model, examples, "gpipe")
    bounds = {"gpipe": [m] * p, "1f1b": [min(p - stage, m) for stage in range(p)]}
    print("  ░ forward, ▓ backward, · waiting; beside a stage, how many microbatches it kept")
    for kind, bound in bounds.items():
        results, counts = on_ranks(run_stage, [([layer], examples, kind) for layer in model])
        gradients, logs, kept = map(list, zip(*results))
        n_ticks = max(log[-1][-1] for log in logs)
        bubble, formula, sent = 1.0 - 3 * m / n_ticks, bubble_fraction(p, m), counts[0]["bytes F"]
        print(f"\n  {kind}: bubble {bubble:.1%}, formula {formula:.1%}; {sent:,} bytes each way")
        for log, n_kept in zip(logs, kept):
            line = ["··"] * n_ticks      # two columns a tick
            for way, i, begin, end in log:
                line[begin:end] = [f"░{i}"] if way == "F" else ["▓▓", f"▓{i}"]
            print(f"  {n_kept} {''.join(line)}")
        check(f"{kind}: one device's gradients, bit for bit", sum(gradients, []) == whole)
        check(f"{kind}: bubble = (p - 1) / (m + p - 1)", abs(bubble - formula) < 1e-12)
        check(f"{kind}: microbatches kept = formula", kept == bound, kept)
        found[kind] = bubble, kept
    return found

# 6. The bugs people ship --------------------------------------------------------------------------
# Three wrong results without an error, and a deadlock. A layer relu(W x + b) cut by its inputs
# leaves a summand on each rank. If all add b, it counts p times; a sum of relus is not the relu of
# a sum, so Megatron cuts the first matrix otherwise. A replicated weight has its gradient in parts.
def cut_by_inputs(rank, world, weight, bias, xs):
    """Matrix and xs cut by inputs, one part on each rank -> {bug: (outputs with it, without)}."""
    part = [chunk(row, rank, world.size) for row in weight]
    summands = linear([chunk(x, rank, world.size) for x in xs], part)
    ys = leave(rank, world, summands)
    def biased(rows): return [add(row, bias) for row in rows]
    return {"relu before all-reduce": (leave(rank, world, relu_rows(summands)), relu_rows(ys)),
            "bias on both ranks": (leave(rank, world, biased(summands)), biased(ys))}

def show_bugs(model, example, gradients_off):
    (query, key, _, _), _, bias = model[0]
    right = cut_by_inputs(0, World(1), query, bias, key)     # any vectors will do as inputs
    runs, _ = on_ranks(cut_by_inputs, [(query, bias, key)] * 2)
    found = {bug: [off(outputs, right[bug][1]) for outputs in runs[0][bug]] for bug in right}
    right, _, _ = pass_both_ways(0, World(1), model, example)
    runs, _ = on_ranks(pass_both_ways, [(shard(model, i, 2), example, True) for i in (0, 1)])
    found["gradients not summed"] = [off(runs[0][0], shard(right, 0, 2)), gradients_off]
    table(["on 2 ranks", "off one device by", "without the bug"],
          *([bug, *(f"{far:.1e}" for far in pair)] for bug, pair in found.items()))
    check("with a bug wrong, without right", all(a > 1e-6 and b < 1e-10 for a, b in found.values()))
    try: on_ranks(broadcast, [([1.0], 1), ([1.0], 0)], patience=0.3)
    except RuntimeError as error: found["deadlock"] = str(error).replace("; ", ";\n    ")
    print("  a broadcast, and each rank takes the other for the root:\n   ", found["deadlock"])
    check("a deadlock ends in an error that says so", "deadlock" in found["deadlock"])
    return found

# 7. The real world --------------------------------------------------------------------------------
# Decoding waits for memory: weights, and keys and values of the context (KV). The prefill of a
# prompt waits for arithmetic. With tensor parallelism (TP) a device does a p-th of each layer, and
# two all-reduces. In a pipeline (PP) p microbatches take turns, p to decode a token, 2 p - 1 in
# prefill, bubble included; each turn reads the weights again. (Data sheets of H200, NVLink 4, NDR)
MODELS = {"70B": (80, 8192, 8, 128, 70.6e9), "405B": (126, 16384, 8, 128, 405e9)}    # config files
PEAK, BANDWIDTH, LINKS = 989e12, 4.8e12, {"NVLink": 450e9, "InfiniBand": 50e9}   # FLOP/s, bytes/s
def show_real_world(p=8, batch=64, context=8192, prompt=1024):
    print("  GB and KV a token on a device; bytes sent a token and all-reduce, share of decode TP;")
    print(f"  ms on {p} H200: decode {batch} at {context:,}, prefill {p} prompts of {prompt:,}")
    rows, seconds = [], {}
    for model, (n_layers, d_model, n_kv_heads, head_dim, n_weights) in MODELS.items():
        weights, cache = 2 * n_weights / p, 4 * n_layers * n_kv_heads * head_dim / p
        ring = 2 * 2 * (p - 1) / p * d_model                 # bytes a token, in an all-reduce
        compute = weights * prompt / PEAK                    # a weight: 2 bytes, 2 FLOP per token
        def read(n): return (weights + n * context * cache) / BANDWIDTH
        for link, speed in LINKS.items():
            sums, hop = 2 * n_layers * ring / speed, 2 * d_model / speed         # seconds a token
            decode = read(batch) + batch * sums, p * read(batch / p) + batch * hop
            prefill = p * compute + p * prompt * sums, (2 * p - 1) * (compute + prompt * hop)
            seconds[model, link] = decode, prefill
            sizes = f"{weights / 1e9:.1f}", f"{cache / 1024:.0f}", int(ring)
            ms = [f"{1e3 * x:,.1f}" for x in decode + prefill]
            rows.append([f"{model}, {link}", *sizes, f"{batch * sums / decode[0]:.0%}", *ms])
    table(["Llama", "GB", "KV KiB", "sent", "share", "decode TP", "PP", "prefill TP", "PP"], *rows)
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
    section("1. Autograd", show_autograd, Value(rng.gauss(0.0, 1.0)))
    model, examples, losses = section("2. The model", show_model, rng)
    sent = section("3. Collectives", show_collectives, rng)
    far = section("4. Tensor parallelism", show_tensor_parallelism, model, examples, losses)
    pipeline = section("5. Pipeline parallelism", show_pipeline, rng)
    bugs = section("6. The bugs people ship", show_bugs, model, examples[0], far[2][1])
    seconds = section("7. The real world", show_real_world)
    return finish(started, losses=losses, bytes_sent=sent, tensor_off=far, pipeline=pipeline,
                  bugs=bugs, seconds=seconds)

if __name__ == "__main__":
    try: run(main)
    except RuntimeError as error: sys.exit(f"microparallel.py: {error}")      # a worker died
