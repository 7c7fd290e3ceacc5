"""microparallel against PyTorch: outputs, gradients, and the collectives of torch.distributed (gloo)."""
import os
import random

import pytest

torch = pytest.importorskip("torch")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"      # for the processes that the script starts
import microparallel as mp
from test_microparallel import on_threads

CASES = 50
torch.set_num_threads(1)


def tensors(tree):
    return mp.each(lambda x: x, tree) if not isinstance(tree, dict) else {
        name: [tensors(layer) for layer in value] if name == "layers" else torch.tensor(
            value, dtype=torch.float64, requires_grad=True) for name, value in tree.items()}


def torch_forward(w, tokens):
    """The same transformer in PyTorch's own functions."""
    F = torch.nn.functional
    def norm(x): return F.rms_norm(x, x.shape[-1:], eps=1e-5)
    n, x = len(tokens), w["token"][tokens] + w["position"][:len(tokens)]
    for layer in w["layers"]:
        q, k, v = (F.linear(norm(x), layer[name]).view(n, mp.N_HEADS, -1).transpose(0, 1)
                   for name in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(0, 1).reshape(n, -1), layer["out"])
        x = x + F.linear(F.linear(norm(x), layer["up"]).relu(), layer["down"], layer["bias"][0])
    return F.linear(norm(x), w["logits"])


def gradients(w):
    return {name: [gradients(layer) for layer in value] if name == "layers" else value.grad.tolist()
            for name, value in w.items()}


def case(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(mp.VOCAB_SIZE) for _ in range(rng.randint(1, mp.SEQ_LEN))]
    targets = [rng.randrange(mp.VOCAB_SIZE) for _ in tokens]
    weights = mp.new_model(rng, rng.randint(1, 3))
    w = tensors(weights)
    logits = torch_forward(w, tokens)
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).backward()
    return weights, (tokens, targets), logits.tolist(), gradients(w)


def test_one_device_against_torch():
    for seed in range(CASES):
        weights, example, logits, expected = case(seed)
        grads, got, _ = mp.pass_both_ways(0, mp.World(1), weights, example)
        assert mp.off(got, logits) < 1e-10
        assert mp.off([grads[name] for name in expected], list(expected.values())) < 1e-10


@pytest.fixture(scope="module")
def devices():
    pool = mp.Devices(4)
    yield pool
    pool.close()


def test_tensor_parallel_against_torch(devices):
    for seed in range(CASES):
        p = (2, 4)[seed % 2]
        weights, example, logits, expected = case(1000 + seed)
        results, _ = devices.run(mp.pass_both_ways, [
            (mp.shard(weights, rank, p), example) for rank in range(p)])
        for rank, (grads, got, _) in enumerate(results):
            wanted = mp.shard(expected, rank, p)
            assert mp.off(got, logits) < 1e-10
            assert mp.off([grads[name] for name in wanted], list(wanted.values())) < 1e-10


def test_pipeline_against_torch(devices):
    for seed in range(CASES):
        rng = random.Random(seed)
        p, m, kind = rng.randint(1, 4), rng.randint(1, 4), rng.choice(["gpipe", "1f1b"])
        weights, examples = mp.new_model(rng, 4), [mp.new_example(rng) for _ in range(m)]
        w = tensors(weights)
        logits = torch_forward_batch(w, examples)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([t for _, ts in examples for t in ts]))
        loss.backward()
        expected = gradients(w)
        results, _ = devices.run(mp.run_stage, [
            (mp.stage_of(weights, stage, p), examples, kind) for stage in range(p)])
        for stage, (grads, _, _) in enumerate(results):
            wanted = mp.stage_of(expected, stage, p)
            assert grads.keys() == wanted.keys()
            assert mp.off([grads[name] for name in wanted], list(wanted.values())) < 1e-10


def torch_forward_batch(w, examples):
    return torch.cat([torch_forward(w, tokens) for tokens, _ in examples])


def gloo_rank(rank, p, path, vectors, queue):
    import torch.distributed as dist
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=p)
    answers = []
    for n, columns in vectors:
        mine = torch.tensor(columns[rank], dtype=torch.float64)
        total, copy, gathered = mine.clone(), mine.clone(), [torch.empty_like(mine) for _ in range(p)]
        dist.all_reduce(total)
        dist.broadcast(copy, src=n % p)
        dist.all_gather(gathered, mine)
        answers.append((total.tolist(), copy.tolist(), torch.cat(gathered).tolist()))
    queue.put((rank, answers))
    dist.destroy_process_group()


def test_collectives_against_gloo(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    rng = random.Random(1)
    p, context = 3, torch.multiprocessing.get_context("spawn")
    vectors = [(n, [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(p)])
               for n in [1, 2, 3] + [rng.randint(1, 40) for _ in range(CASES - 3)]]
    queue = context.Queue()
    ranks = [context.Process(target=gloo_rank, args=(rank, p, tmp_path / "store", vectors, queue),
                             daemon=True) for rank in range(p)]
    for rank in ranks:
        rank.start()
    answers = dict(queue.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    for i, (n, columns) in enumerate(vectors):
        results = [on_threads(mp.ring_all_reduce, [(column,) for column in columns]),
                   on_threads(mp.broadcast, [(column, n % p) for column in columns]),
                   on_threads(mp.all_gather, [(column,) for column in columns])]
        scattered = on_threads(mp.reduce_scatter, [(column,) for column in columns])
        for rank in range(p):
            total, copy, gathered = answers[rank][i]
            assert results[0][rank] == pytest.approx(total, abs=1e-10)
            assert results[1][rank] == copy and results[2][rank] == gathered
        assert sum(scattered, []) == pytest.approx(total, abs=1e-10)
