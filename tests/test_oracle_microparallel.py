"""microparallel against PyTorch: outputs, gradients, and the collectives of torch.distributed (gloo)."""
import os
import random

import pytest

torch = pytest.importorskip("torch")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"      # for the processes that the script starts
import microparallel as mp
from test_microparallel import many, on_threads

CASES = 50
torch.set_num_threads(1)


def tensors(model):
    """The same nested lists, with a tensor for each matrix and each bias."""
    def tensor(x): return torch.tensor(x, dtype=torch.float64, requires_grad=True)
    return [[[tensor(x) for x in heads], [tensor(x) for x in hidden_units], tensor(bias)]
            for heads, hidden_units, bias in model]


def gradients(model):
    return [[[x.grad.tolist() for x in heads], [x.grad.tolist() for x in hidden_units],
             bias.grad.tolist()] for heads, hidden_units, bias in model]


def torch_forward(model, xs):
    """The same transformer in PyTorch's own functions."""
    F = torch.nn.functional
    n, x = len(xs), torch.tensor(xs, dtype=torch.float64)
    for (query, key, value, out), (up, down), bias in model:
        q, k, v = (F.linear(x, w).view(n, mp.N_HEADS, -1).transpose(0, 1) for w in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(0, 1).reshape(n, -1), out.T)
        x = x + F.linear(F.linear(x, up).relu(), down.T, bias)
    return x


def case(seed):
    rng = random.Random(seed)
    xs, targets = mp.new_example(rng)
    n = rng.randint(1, mp.SEQ_LEN)
    xs, targets = xs[:n], targets[:n]
    model = mp.new_model(rng, rng.randint(1, 3))
    w = tensors(model)
    logits = torch_forward(w, xs)
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets)).backward()
    return model, (xs, targets), logits.tolist(), gradients(w)


def test_one_device_against_torch():
    for seed in range(CASES):
        model, example, logits, expected = case(seed)
        grads, got, _ = mp.pass_both_ways(0, mp.World(1), model, example)
        assert mp.off(got, logits) < 1e-10 and mp.off(grads, expected) < 1e-10


@pytest.mark.parametrize("p", [2, 4])
def test_tensor_parallel_against_torch(p):
    cases = [case(1000 * p + seed) for seed in range(CASES // 2)]
    parts = [[(mp.shard(model, rank, p), example) for model, example, _, _ in cases] for rank in range(p)]
    results, _ = mp.on_ranks(many, [(mp.pass_both_ways, part) for part in parts])
    for rank, answers in enumerate(results):
        for ((grads, got, _), count), (model, _, logits, expected) in zip(answers, cases):
            assert mp.off(got, logits) < 1e-10
            assert mp.off(grads, mp.shard(expected, rank, p)) < 1e-10
            assert count["forward"] == count["backward"] == 2 * len(model)


def torch_batch(model, examples):
    """The gradients of the mean loss of all examples."""
    w = tensors(model)
    logits = torch.cat([torch_forward(w, xs) for xs, _ in examples])
    targets = torch.tensor([target for _, targets in examples for target in targets])
    torch.nn.functional.cross_entropy(logits, targets).backward()
    return gradients(w)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_pipeline_against_torch(p):
    cases = []
    for seed in range(CASES // 4):
        rng = random.Random(100 * p + seed)
        model = mp.new_model(rng, rng.randint(p, 4))
        examples = [mp.new_example(rng) for _ in range(rng.randint(1, 5))]
        cases.append((model, examples, rng.choice(["gpipe", "1f1b"])))
    stages = [[(mp.chunk(model, stage, p), examples, kind) for model, examples, kind in cases]
              for stage in range(p)]
    results, _ = mp.on_ranks(many, [(mp.run_stage, part) for part in stages])
    for i, (model, examples, _) in enumerate(cases):
        found = sum((answers[i][0][0] for answers in results), [])
        assert mp.off(found, torch_batch(model, examples)) < 1e-10


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
