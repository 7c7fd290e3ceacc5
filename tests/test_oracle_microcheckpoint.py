"""microcheckpoint's gradients against PyTorch, with and without torch.utils.checkpoint, in float64."""
import random

import pytest

torch = pytest.importorskip("torch")
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import microcheckpoint as cp


@pytest.mark.parametrize("how", ["plain", "checkpoint", "checkpoint_sequential"])
@pytest.mark.parametrize("seed", range(20))
def test_gradients(seed, how):
    rng = random.Random(seed)
    n_layers, d_model = rng.choice([1, 2, 5, 9, 16]), rng.choice([1, 2, 3, 7])
    layers, x, _ = cp.random_network(n_layers, d_model, rng)
    target = [rng.gauss(0.0, 1.0) for _ in range(d_model)]
    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in layers]
    steps = [lambda y, w=w: y + torch.tanh(w @ y) for w in weights]
    start = y = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    if how == "checkpoint_sequential":
        y = checkpoint_sequential(steps, min(n_layers, rng.randint(1, 4)), y, use_reentrant=False)
    else:
        for step in steps:
            y = step(y) if how == "plain" else checkpoint(step, y, use_reentrant=False)
    expected = 0.5 * ((y - torch.tensor(target, dtype=torch.float64)) ** 2).sum()
    expected.backward()
    strategy = rng.choice([("keep",), ("sqrt",), ("every", 3), ("halve",), ("recompute",),
                           ("revolve", None, 3)])
    loss, grads, stats = cp.gradients(layers, x, target, *strategy)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for grad, weight in zip(grads, weights):
        torch.testing.assert_close(torch.tensor(grad, dtype=torch.float64), weight.grad,
                                   rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.tensor(stats["input_gradient"], dtype=torch.float64), start.grad,
                               rtol=1e-10, atol=1e-10)
