"""microssm against PyTorch's matrix exponential and autograd, and transformers' Mamba and Mamba-2."""
import random

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import microssm as ssm


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(tensor(ours), theirs, rtol=tolerance, atol=tolerance)


def matrix(rng, rows, columns, low=-2.0, high=2.0):
    return [[rng.uniform(low, high) for _ in range(columns)] for _ in range(rows)]


@pytest.fixture
def in_float64(monkeypatch):
    """transformers casts to float32 here and there; without that the comparison is exact to 1e-10."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize("seed", range(60))
def test_zoh_of_a_full_matrix(seed):
    """exp(Δ [[A, B], [0, 0]]) of a full symmetric A against ZOH of its eigenvalues, one by one."""
    rng = random.Random(seed)
    n, delta = rng.randint(1, 5), rng.choice([1e-4, 0.1, 1.0, 7.0]) * rng.uniform(0.5, 1.0)
    root = tensor(matrix(rng, n, n))
    A, B = -root @ root.T, tensor(matrix(rng, n, 1))
    block = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    block[:n, :n], block[:n, n:] = A, B
    expected = torch.linalg.matrix_exp(delta * block)
    values, vectors = torch.linalg.eigh(A)
    rates, inputs = values.tolist(), (vectors.T @ B)[:, 0].tolist()
    steps = [ssm.discretize(a, b, delta, "zoh") for a, b in zip(rates, inputs)]
    a_bar, b_bar = tensor([a for a, _ in steps]), tensor([[b] for _, b in steps])
    torch.testing.assert_close(vectors @ torch.diag(a_bar) @ vectors.T, expected[:n, :n],
                               rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(vectors @ b_bar, expected[:n, n:], rtol=1e-9, atol=1e-10)
    one = torch.eye(n, dtype=torch.float64)
    for method, full in (("euler", (one + delta * A, delta * B)), ("bilinear", (
            torch.linalg.solve(one - delta / 2 * A, one + delta / 2 * A),
            torch.linalg.solve(one - delta / 2 * A, delta * B)))):
        steps = [ssm.discretize(a, b, delta, method) for a, b in zip(rates, inputs)]
        torch.testing.assert_close(vectors @ torch.diag(tensor([a for a, _ in steps])) @ vectors.T,
                                   full[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(vectors @ tensor([[b] for _, b in steps]), full[1],
                                   rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_selective_scan_and_its_gradients(seed, in_float64):
    """Against transformers' mamba_selective_scan, gradients of every input by torch's autograd."""
    rng = random.Random(seed)
    n, d_inner, d_state = rng.choice([1, 2, 5, 9]), rng.choice([1, 3, 4]), rng.choice([1, 2, 5])
    floats = [matrix(rng, n, d_inner), matrix(rng, n, d_inner, 0.01, 2.0),
              matrix(rng, d_inner, d_state, -3.0, -0.1), matrix(rng, n, d_state),
              matrix(rng, n, d_state), matrix(rng, 1, d_inner)]
    u, delta, A, B, C, D = leaves = [tensor(x).requires_grad_() for x in floats]
    expected = modeling_mamba.mamba_selective_scan(u.T[None], delta.T[None], A, B.T[None], C.T[None],
                                                   D[0])[0].T
    close(ssm.selective_scan(*floats[:5], floats[5][0]), expected.detach())
    weight = tensor(matrix(rng, n, d_inner))
    (expected * weight).sum().backward()
    values = [[list(map(ssm.Value, row)) for row in x] for x in floats]
    y = sum(ssm.selective_scan(*values[:5], values[5][0]), [])
    ssm.dot(y, weight.flatten().tolist()).backward()
    for ours, theirs in zip(values, leaves):
        close([[x.grad for x in row] for row in ours], theirs.grad)


@pytest.mark.parametrize("seed", range(50))
def test_mamba_block(seed, in_float64):
    """A whole MambaMixer with our weights; dt_proj x_proj[:rank] is our W_delta."""
    rng = random.Random(seed)
    d_model, d_state = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 4])
    d_conv, n = rng.choice([1, 2, 4]), rng.choice([1, 2, 3, 7])
    d_inner = d_model * rng.choice([1, 2])
    config = transformers.MambaConfig(
        hidden_size=d_model, state_size=d_state, conv_kernel=d_conv, expand=d_inner // d_model,
        time_step_rank=d_inner, num_hidden_layers=1, use_mambapy=False)
    mixer = modeling_mamba.MambaMixer(config, layer_idx=0).eval()
    w = ssm.mamba_weights(rng, d_model, d_inner, d_state, d_conv)
    w["A_log"] = matrix(rng, d_inner, d_state, -1.0, 1.0)
    w["D"] = matrix(rng, 1, d_inner)
    with torch.no_grad():
        mixer.in_proj.weight.copy_(tensor(w["project"]))
        mixer.conv1d.weight.copy_(tensor(w["conv"])[:, None])
        mixer.conv1d.bias.copy_(tensor(w["conv_bias"])[0])
        mixer.x_proj.weight.copy_(tensor(w["W_delta"] + w["W_B"] + w["W_C"]))
        mixer.dt_proj.weight.copy_(torch.eye(d_inner))
        mixer.dt_proj.bias.copy_(tensor(w["delta_bias"])[0])
        mixer.A_log.copy_(tensor(w["A_log"]))
        mixer.D.copy_(tensor(w["D"])[0])
        mixer.out_proj.weight.copy_(tensor(w["out"]))
        xs = matrix(rng, n, d_model)
        close(ssm.mamba_block(xs, w), mixer(tensor(xs)[None])[0])


@pytest.mark.parametrize("seed", range(50))
def test_ssd_is_the_chunk_scan_of_mamba_2(seed, in_float64):
    rng = random.Random(seed)
    n, n_heads, head_dim, d_state = (rng.choice(sizes) for sizes in (
        [1, 2, 5, 9], [1, 2, 3], [1, 3], [1, 4]))
    x, delta = [matrix(rng, n_heads, head_dim) for _ in range(n)], matrix(rng, n, n_heads, 0.01, 1.0)
    A, B, C = matrix(rng, 1, n_heads, -2.0, -0.1)[0], matrix(rng, n, d_state), matrix(rng, n, d_state)
    expected = modeling_mamba2.mamba2_chunk_scan(
        tensor(x)[None], tensor(delta)[None], tensor(A), tensor(B)[None, :, None],
        tensor(C)[None, :, None], chunk_size=rng.choice([1, 2, 4, 16]))[0]
    for size in (None, 1, 3, 20):
        close(ssm.ssd(x, delta, A, B, C, size), expected)


@pytest.mark.parametrize("seed", range(50))
def test_mamba_2_block(seed, in_float64):
    """A whole Mamba2Mixer in which our ssd() takes the place of the scan. Its norm is float32."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n_heads, head_dim, d_state, n = (rng.choice(sizes) for sizes in (
        [1, 2, 3], [2, 4], [1, 4], [1, 2, 7]))
    config = transformers.Mamba2Config(
        hidden_size=n_heads * head_dim, num_heads=n_heads, head_dim=head_dim, expand=1, n_groups=1,
        state_size=d_state, conv_kernel=3, chunk_size=4, num_hidden_layers=1)
    mixer = modeling_mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    d_inner = n_heads * head_dim
    with torch.no_grad():
        hidden = torch.randn(1, n, d_inner)
        expected = mixer(hidden)[0]
        gate, mixed, raw = mixer.in_proj(hidden)[0].split([d_inner, d_inner + 2 * d_state, n_heads], -1)
        rows, kernels = mixed.tolist(), mixer.conv1d.weight[:, 0].tolist()
        padded, bias = [[0.0] * len(kernels)] * 2 + rows, mixer.conv1d.bias.tolist()
        convolved = [[ssm.silu(ssm.dot(list(c), k) + b) for c, k, b in
                      zip(zip(*padded[t:t + 3]), kernels, bias)] for t in range(n)]
        delta = [[ssm.softplus(v + b) for v, b in zip(row, mixer.dt_bias.tolist())] for row in raw.tolist()]
        A = [ssm.negative_exp(a) for a in mixer.A_log.tolist()]
        x = [[row[i:i + head_dim] for i in range(0, d_inner, head_dim)] for row in convolved]
        B, C = ([row[start:start + d_state] for row in convolved] for start in (d_inner, d_inner + d_state))
        y = tensor(ssm.ssd(x, delta, A, B, C, rng.choice([None, 1, 2, 5])))
        y += mixer.D[:, None] * tensor(x)
        ours = mixer.out_proj(mixer.norm(y.reshape(1, n, -1), gate[None]).to(torch.float64))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(50))
def test_pointwise_and_attention(seed):
    rng = random.Random(seed)
    x, t = rng.gauss(0.0, 10.0), None
    for ours, theirs in ((ssm.softplus, torch.nn.functional.softplus), (ssm.silu, torch.nn.functional.silu),
                         (ssm.negative_exp, lambda t: -torch.exp(t))):
        t, value = tensor(x).requires_grad_(), ssm.Value(x)
        expected = theirs(t)
        expected.backward()
        y = ours(value)
        y.backward()
        assert y.data == pytest.approx(expected.item(), rel=1e-8, abs=1e-12)
        assert value.grad == pytest.approx(t.grad.item(), rel=1e-8, abs=1e-8)
    d, n = rng.randint(1, 5), rng.randint(1, 6)
    q, k, v = (matrix(rng, n, d) for _ in range(3))
    keys, values = [], []
    ours = [ssm.attention_step(*token, keys, values) for token in zip(q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        tensor(q), tensor(k), tensor(v), is_causal=True)
    close(ours, expected)
