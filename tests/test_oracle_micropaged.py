"""micropaged's memory against PyTorch: the model over scattered blocks, and attention by a gather."""
import random

import pytest

torch = pytest.importorskip("torch")

import micropaged as paged
import torch_gpt


def random_model(seed):
    """-> (a model over the edges: one layer, one head, odd sizes, one token; tokens; rng)"""
    rng = random.Random(seed)
    n_heads = rng.choice([1, 2, 3])
    context = rng.choice([1, 2, 5, 9, 17])
    model = paged.GPT(rng.choice([2, 3, 27]), rng, rng.choice([1, 1, 2, 3]),
                      n_heads * rng.choice([1, 2, 3, 5]), n_heads, context)
    for p in model.parameters():
        p.data *= rng.choice([1.0, 5.0])
    vocab_size = len(model.weights["token"])
    return model, [rng.randrange(vocab_size) for _ in range(rng.randint(1, context))], rng


@pytest.mark.parametrize("seed", range(60))
def test_logits_through_a_shuffled_pool(seed):
    """A prompt, then token by token, beside a fork that writes other tokens."""
    model, tokens, rng = random_model(seed)
    expected = torch_gpt.forward(torch_gpt.tensors(model), tokens, model.n_layers, model.n_heads)
    frozen, size = model.frozen(), rng.choice([1, 2, 3, 4, 16])
    pool = paged.BlockPool(60, size)
    pool.free_blocks = rng.sample(range(60), 60)
    n = rng.randint(1, len(tokens))
    table, _ = pool.allocate(tokens[:n])
    logits = paged.run_batch(frozen, pool, [(table, 0)])
    twin = pool.fork(table)
    for end in range(n + 1, len(tokens) + 1):
        pool.append(twin, [(tokens[end - 1] + 1) % len(model.weights["token"])])
        pool.append(table, tokens[end - 1:end])
        logits.append(paged.run_batch(frozen, pool, [(twin, end - 1), (table, end - 1)])[1])
    torch.testing.assert_close(torch.tensor(logits, dtype=torch.float64), expected[n - 1:],
                               rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_attention_over_a_block_table(seed):
    """PagedCache and attend() against scaled_dot_product_attention on keys gathered by index."""
    rng = random.Random(seed)
    n_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 8])
    size, n = rng.choice([1, 2, 3, 4, 16]), rng.choice([1, 2, 3, 7, 16, 17])
    pool = paged.BlockPool(40, size)
    pool.free_blocks = rng.sample(range(40), 40)
    table, _ = pool.allocate([0] * n)
    keys, values = torch.zeros(40, size, n_heads * head_dim).double(), torch.zeros(
        40, size, n_heads * head_dim).double()
    for i in range(n):
        query, key, value = ([rng.gauss(0, 2) for _ in range(n_heads * head_dim)] for _ in range(3))
        mixed = paged.attend(query, *paged.PagedCache(pool, table, i).append(0, key, value), n_heads)
        keys[table[i // size], i % size] = torch.tensor(key, dtype=torch.float64)
        values[table[i // size], i % size] = torch.tensor(value, dtype=torch.float64)
    index = torch.tensor(list(table))
    k, v = (memory[index].reshape(-1, n_heads, head_dim)[:n].transpose(0, 1)
            for memory in (keys, values))
    q = torch.tensor(query, dtype=torch.float64).reshape(n_heads, 1, head_dim)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).reshape(-1)
    torch.testing.assert_close(torch.tensor(mixed, dtype=torch.float64), expected,
                               rtol=1e-10, atol=1e-10)
