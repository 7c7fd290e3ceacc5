"""microattention's functions against PyTorch's and transformers' attention, in float64."""
import random

import pytest

torch = pytest.importorskip("torch")

import microattention as ma

sdpa = torch.nn.functional.scaled_dot_product_attention
close = dict(rtol=1e-10, atol=1e-10)


def tensor(array, requires_grad=False):
    return torch.tensor(array, dtype=torch.float64, requires_grad=requires_grad)


def random_case(seed):
    """-> (q, k, v, causal, window, the mask): also one head, one position, width 1, wide windows."""
    rng = random.Random(seed)
    n_kv_heads, n, width = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 5, 9, 16]), rng.choice([1, 3, 4, 8])
    n_heads = n_kv_heads * rng.choice([1, 2, 3, 4])
    q, k = ma.vectors(rng, n_heads, n, width), ma.vectors(rng, n_kv_heads, n, width)
    q = [[[x * rng.choice([1.0, 10.0]) for x in row] for row in head] for head in q]
    v = ma.vectors(rng, n_kv_heads, n, rng.choice([width, 2 * width]))
    causal, window = rng.choice([(True, None), (False, None), (True, rng.randint(1, n + 2))])
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    mask = (j <= i) & (j > i - window) if window else (j <= i) | torch.tensor(not causal)
    return q, k, v, causal, window, mask


@pytest.mark.parametrize("seed", range(80))
def test_attention(seed):
    q, k, v, causal, window, mask = random_case(seed)
    expected = sdpa(tensor(q)[None], tensor(k)[None], tensor(v)[None], attn_mask=mask, enable_gqa=True)[0]
    torch.testing.assert_close(tensor(ma.attention(q, k, v, causal, window)), expected, **close)
    if window is None:
        built_in = sdpa(tensor(q)[None], tensor(k)[None], tensor(v)[None], is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(expected, built_in[0], **close)


@pytest.mark.parametrize("seed", range(50))
def test_gradients(seed):
    q, k, v, causal, window, mask = random_case(seed)
    leaves = [ma.leaves(array) for array in (q, k, v)]
    out = [x for head in ma.attention(*leaves, causal, window) for row in head for x in row]
    weights = [random.Random(seed + i).gauss(0.0, 1.0) for i in range(len(out))]
    ma.dot(out, weights).backward()
    inputs = [tensor(array, True) for array in (q, k, v)]
    expected = sdpa(*(x[None] for x in inputs), attn_mask=mask, enable_gqa=True)[0]
    (expected.flatten() * tensor(weights)).sum().backward()
    for ours, theirs in zip(leaves, inputs):
        gradients = [[[x.grad for x in row] for row in head] for head in ours]
        torch.testing.assert_close(tensor(gradients), theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(50))
def test_rotation(seed):
    """At any position, against transformers' GPT-J rotation."""
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rng = random.Random(seed)
    rope, n, start = rng.choice([2, 4, 6, 8]), rng.choice([1, 2, 7]), rng.choice([0, 3, 50, 4000])
    still, base = rng.choice([0, 1, 4]), rng.choice([10000.0, 500000.0])
    rows = ma.vectors(rng, n, still + rope)
    angles = torch.outer(torch.arange(start, start + n, dtype=torch.float64),
                         base ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope))
    turned = gptj.apply_rotary_pos_emb(tensor(rows)[None, :, None, still:], angles.sin()[None], angles.cos()[None])
    expected = torch.cat([tensor(rows)[:, :still], turned[0, :, 0]], -1)
    ours = [ma.rotate(row, start + i, rope, base) for i, row in enumerate(rows)]
    torch.testing.assert_close(tensor(ours), expected, **close)


@pytest.mark.parametrize("seed", range(50))
def test_layers_with_rotary_positions(seed):
    """Layer.run against transformers' GPT-J rotation and SDPA, over GQA and windows."""
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rng = random.Random(seed)
    n_heads, n, rope = rng.choice([1, 2, 4]), rng.choice([1, 2, 7, 12]), rng.choice([2, 4, 6])
    head_dim, d_model = rope + rng.choice([0, 1, 4]), rng.choice([5, 8])
    n_kv_heads, window = rng.choice([h for h in (1, 2, 4) if n_heads % h == 0]), rng.choice([None, 1, 3])
    w = {name: ma.vectors(rng, heads, head_dim, d_model) for name, heads in
         (("query", n_heads), ("key", n_kv_heads), ("value", n_kv_heads))}
    w["out"] = ma.vectors(rng, d_model, n_heads * head_dim)
    xs = ma.vectors(rng, n, d_model)
    angles = torch.outer(torch.arange(n, dtype=torch.float64),
                         10000.0 ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope))
    sin, cos = angles.sin()[None], angles.cos()[None]
    t = {name: torch.einsum("nd,hkd->nhk", tensor(xs), tensor(w[name]))[None] for name in ("query", "key", "value")}
    for name in ("query", "key"):
        turned = gptj.apply_rotary_pos_emb(t[name][..., head_dim - rope:], sin, cos)
        t[name] = torch.cat([t[name][..., :head_dim - rope], turned], -1)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    mask = (j <= i) & (j > i - (window or n))
    mixed = sdpa(*(x.transpose(1, 2) for x in t.values()), attn_mask=mask, enable_gqa=True)
    expected = mixed.transpose(1, 2).reshape(n, -1) @ tensor(w["out"]).T
    layer = ma.Layer(rope, w, window)
    torch.testing.assert_close(tensor(layer.run(xs)), expected, **close)


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("seed", range(50))
def test_mla_is_deepseek_v3(seed, absorbed):
    """Against transformers' module, its norm of the latent vector (that we leave out) removed."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    rng = random.Random(seed)
    n_heads, n, rope = rng.choice([1, 2, 3]), rng.choice([1, 2, 6, 11]), rng.choice([2, 4, 6])
    nope, value_dim, rank, d_model = rng.choice([1, 4, 5]), rng.choice([1, 3, 6]), rng.choice([1, 4, 7]), 6
    config = deepseek.DeepseekV3Config(
        hidden_size=d_model, num_attention_heads=n_heads, num_key_value_heads=n_heads, q_lora_rank=None,
        kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value_dim,
        rope_interleave=True, attention_bias=False, attn_implementation="sdpa")      # eager rounds to float32
    torch.manual_seed(seed)
    module = deepseek.DeepseekV3Attention(config, layer_idx=0).double().eval()
    module.kv_a_layernorm = torch.nn.Identity()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    xs = ma.vectors(rng, n, d_model)
    angles = torch.outer(torch.arange(n, dtype=torch.float64),
                         10000.0 ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope))
    angles = torch.cat([angles, angles], -1)[None]
    hidden = torch.full((n, n), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected = module(tensor(xs)[None], (angles.cos(), angles.sin()), hidden)[0][0]
    compress = module.kv_a_proj_with_mqa.weight
    ups = module.kv_b_proj.weight.reshape(n_heads, nope + value_dim, rank)
    weights = {"query": module.q_proj.weight.reshape(n_heads, nope + rope, d_model),
               "down": compress[None, :rank], "rope": compress[None, rank:],
               "up_key": ups[:, :nope], "up_value": ups[:, nope:], "out": module.o_proj.weight}
    layer = ma.MLA(rope, {name: weight.tolist() for name, weight in weights.items()})
    look = layer.look if absorbed else layer.look_decompressed
    queries, cached = layer.project("query", xs), layer.remember(xs)
    ours = ma.linear(ma.join_heads(look(queries, *cached)), layer.weights["out"])
    torch.testing.assert_close(tensor(ours), expected, **close)
    last = ma.linear(ma.join_heads(look([head[-1:] for head in queries], *cached)), layer.weights["out"])
    torch.testing.assert_close(tensor(last), expected[-1:], **close)             # decoding, too
    if absorbed:
        ma.COUNT.clear()
        torch.testing.assert_close(tensor(layer.run(xs)), expected, **close)
        assert ma.COUNT["cached"] == n * (rank + rope) == n * sum(layer.cache_shape()[1:])
