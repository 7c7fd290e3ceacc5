"""microkv's model, gradients, optimiser and generation against the same in PyTorch, in float64."""
import random

import pytest

torch = pytest.importorskip("torch")

import microkv as kv
import torch_gpt


def random_model(seed):
    """-> (model, tokens that fit its context, rng), over the edges: one layer, one head, one token."""
    rng = random.Random(seed)
    n_heads = rng.choice([1, 2, 3, 4])
    d_model = n_heads * rng.choice([1, 2, 3, 5, 8])
    context = rng.choice([1, 2, 5, 9, 17])
    vocab_size = rng.choice([2, 3, 27])
    model = kv.GPT(vocab_size, rng, rng.choice([1, 1, 2, 3]), d_model, n_heads, context)
    for p in model.parameters():
        p.data *= rng.choice([1.0, 5.0])          # far from the tidy initialisation too
    return model, [rng.randrange(vocab_size) for _ in range(rng.randint(1, context))], rng


@pytest.mark.parametrize("seed", range(60))
def test_logits(seed):
    model, tokens, _ = random_model(seed)
    expected = torch_gpt.forward(torch_gpt.tensors(model), tokens, model.n_layers, model.n_heads)
    frozen = model.frozen()
    logits = frozen.run(tokens, kv.KVCache(model.n_layers))
    torch.testing.assert_close(torch.tensor(logits, dtype=torch.float64), expected,
                               rtol=1e-10, atol=1e-10)
    with_values = model.run(tokens, kv.KVCache(model.n_layers))
    kv.TAPE.clear()
    for row, values in zip(logits, with_values):          # one forward pass, two kinds of numbers
        assert row == pytest.approx([x.data for x in values], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(50))
def test_gradients_of_the_training_loss(seed):
    model, tokens, rng = random_model(seed)
    vocab_size = len(model.weights["token"])
    names = [tokens + [rng.randrange(vocab_size)], [0, rng.randrange(vocab_size)]]
    weights = torch_gpt.tensors(model, requires_grad=True)
    expected = torch_gpt.loss(weights, names, model.n_layers, model.n_heads)
    expected.backward()
    loss = model.loss(names)
    loss.backward()
    assert loss.data == pytest.approx(expected.item(), rel=1e-12)
    for name, matrix in model.weights.items():
        gradient = torch.tensor([[p.grad for p in row] for row in matrix], dtype=torch.float64)
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_training_is_adam_with_a_linear_rate(seed):
    """Ten steps of train() against torch.optim.Adam: every weight, to 1e-9."""
    rng = random.Random(seed)
    vocabulary, names, _ = kv.tokenize(kv.NAMES.split(), rng)
    model = kv.GPT(len(vocabulary), rng, d_model=8)
    weights = torch_gpt.tensors(model, requires_grad=True)
    adam = torch.optim.Adam(weights.values(), betas=(0.9, 0.99), eps=1e-8)
    curve, expected = kv.train(model.parameters(), lambda i: model.loss([names[i]]), 10, 0.02), []
    for step in range(10):
        adam.param_groups[0]["lr"] = 0.02 * (1.0 - step / 10)
        adam.zero_grad()
        loss = torch_gpt.loss(weights, [names[step]], 1, 2)
        loss.backward()
        adam.step()
        expected.append(loss.item())
    assert curve == pytest.approx(expected, rel=1e-9)
    # eps keeps Adam continuous, but a gradient of 1e-13 is still magnified: compare what was learned.
    for name, matrix in model.weights.items():
        learned = torch.tensor([[p.data for p in row] for row in matrix], dtype=torch.float64)
        torch.testing.assert_close(learned, weights[name].detach(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_generate_is_the_plain_loop(seed, use_cache):
    model, tokens, rng = random_model(seed)
    frozen, n_tokens = model.frozen(), model.context - len(tokens) + 1
    weights, text = torch_gpt.tensors(model), list(tokens)
    generated, logits, counts = kv.generate(frozen, tokens, n_tokens, use_cache)
    assert len(generated) == len(logits) == len(counts) == n_tokens
    for token, row in zip(generated, logits):
        expected = torch_gpt.forward(weights, text, model.n_layers, model.n_heads)[-1]
        torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), expected, rtol=1e-10, atol=1e-10)
        assert expected[token] >= expected.max() - 1e-9
        text.append(token)


@pytest.mark.parametrize("seed", range(50))
def test_vector_functions(seed):
    rng = random.Random(seed)
    n, m = rng.randint(1, 9), rng.randint(1, 9)
    scale = rng.choice([0.1, 1.0, 30.0, 1000.0])
    x = [rng.gauss(0.0, scale) for _ in range(n)]
    w = [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(m)]
    target, tx, tw = rng.randrange(n), torch.tensor(x, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)
    for ours, theirs in (
            (kv.softmax(x), torch.softmax(tx, 0)), (kv.linear([x], w)[0], tw @ tx),
            ([kv.cross_entropy(x, target)],
             torch.nn.functional.cross_entropy(tx, torch.tensor(target)).reshape(1)),
            (kv.rmsnorm(x), torch.nn.functional.rms_norm(tx, (n,), eps=1e-5)),
            (list(map(kv.relu, x)), torch.relu(tx)), ([kv.dot(x, w[0])], (tw[0] @ tx).reshape(1))):
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(50))
def test_divergence_is_kl(seed):
    rng = random.Random(seed)
    p, q = ([rng.gauss(0.0, 3.0) for _ in range(7)] for _ in "pq")
    tp, tq = (torch.log_softmax(torch.tensor(v, dtype=torch.float64), 0) for v in (p, q))
    expected = torch.nn.functional.kl_div(tq, tp, reduction="sum", log_target=True).item()
    assert kv.divergence(p, q) == pytest.approx(expected, rel=1e-9)
