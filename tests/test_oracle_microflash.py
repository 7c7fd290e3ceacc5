"""microflash against PyTorch in float64: attention, logsumexp, gradients, merging."""
import random

import pytest

torch = pytest.importorskip("torch")

import microflash as mf

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def case(seed):
    """Random shapes with the edges, logits from mild to hard -> (q, k, v, grad_out, block_q, block_k, causal)."""
    rng = random.Random(seed)
    n_q, n_k, d = rng.choice([1, 2, 3, 8, 13]), rng.choice([1, 2, 5, 8, 17]), rng.choice([1, 2, 3, 8])
    q, k, v, grad_out = mf.matrices(rng, (n_q, d), (n_k, d), (n_k, d), (n_q, d))
    scale = rng.choice([0.1, 1.0, 1.0, 30.0])
    q = [[x * scale for x in row] for row in q]
    return q, k, v, grad_out, rng.choice([1, 2, 3, 7, 20]), rng.choice([1, 2, 3, 7, 20]), rng.random() < 0.5


def tensor(rows, **options): return torch.tensor(rows, dtype=torch.float64, **options)


def mask_of(n_q, n_k, causal):
    """True where a query sees a key, aligned to the end."""
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q) if causal else torch.ones(n_q, n_k, dtype=torch.bool)


def sdpa(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


@pytest.mark.parametrize("seed", range(80))
def test_forward_and_logsumexp(seed):
    q, k, v, _, block_q, block_k, causal = case(seed)
    mask = mask_of(len(q), len(k), causal)
    expected = sdpa(tensor(q), tensor(k), tensor(v), mask)
    expected[~mask.any(-1)] = 0.0                        # the convention, in every version of PyTorch
    scores = tensor(q) @ tensor(k).T / len(q[0]) ** 0.5
    lse = torch.logsumexp(scores.masked_fill(~mask, float("-inf")), -1)
    out, logsumexp = mf.flash_attention(q, k, v, block_q, block_k, causal)
    torch.testing.assert_close(tensor(out), expected, **CLOSE)
    torch.testing.assert_close(tensor(logsumexp), lse, **CLOSE)
    torch.testing.assert_close(tensor(mf.standard_attention(q, k, v, causal)), expected, **CLOSE)


@pytest.mark.parametrize("seed", range(100, 180))
def test_backward(seed):
    q, k, v, grad_out, block_q, block_k, causal = case(seed)
    mask = mask_of(len(q), len(k), causal)
    leaves = [tensor(x, requires_grad=True) for x in (q, k, v)]
    rows = mask.any(-1)                                  # a row that sees no key has no gradient
    if rows.any():
        sdpa(leaves[0][rows], *leaves[1:], mask[rows]).backward(tensor(grad_out)[rows])
    out, lse = mf.flash_attention(q, k, v, block_q, block_k, causal)
    grads = mf.flash_attention_backward(q, k, v, out, lse, grad_out, block_q, block_k, causal)
    values, _ = mf.gradients(q, k, v, grad_out, causal)
    for ours, referee, leaf in zip(grads, values, leaves):
        torch.testing.assert_close(tensor(ours), leaf.grad, **CLOSE)
        torch.testing.assert_close(tensor(referee), leaf.grad, **CLOSE)


@pytest.mark.parametrize("seed", range(200, 260))
def test_merge(seed):
    q, k, v, _, block_q, block_k, _ = case(seed)
    k, v = k + [[x + 1.0 for x in k[0]]], v + [[-x for x in v[0]]]        # at least two keys
    cut = random.Random(seed).randint(1, len(k) - 1)
    a, b = (mf.flash_attention(q, k[part], v[part], block_q, block_k)
            for part in (slice(cut), slice(cut, None)))
    out, lse = mf.merge_partials(*a, *b)
    torch.testing.assert_close(tensor(out), sdpa(tensor(q), tensor(k), tensor(v), None), **CLOSE)
    torch.testing.assert_close(tensor(lse), torch.logsumexp(tensor([a[1], b[1]]), 0), **CLOSE)


@pytest.mark.parametrize("seed", range(300, 350))
def test_online_softmax(seed):
    rng = random.Random(seed)
    n, scale = rng.choice([1, 2, 7, 20]), rng.choice([1.0, 1000.0])
    scores, values = [rng.gauss(0.0, scale) for _ in range(n)], mf.matrices(rng, (n, 3))[0]
    state, block = [float("-inf"), 0.0, 0.0, 0.0, 0.0], rng.randint(1, n)
    for j in range(0, n, block):
        state = mf.fold(state, scores[j:j + block], values[j:j + block])
    lse, *out = mf.normalized(state)
    torch.testing.assert_close(tensor(out), torch.softmax(tensor(scores), 0) @ tensor(values), **CLOSE)
    torch.testing.assert_close(tensor(lse), torch.logsumexp(tensor(scores), 0), **CLOSE)
