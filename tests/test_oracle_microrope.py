"""microrope against transformers: its rope utilities, its Llama and GPT-J rotations."""
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

import microrope as rope


@pytest.fixture
def in_float64(monkeypatch):
    """transformers computes its frequencies in float32, by name: give the name another meaning."""
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)


def frequencies_of(kind, head_dim, base, max_positions=4096, seq_len=None, **parameters):
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
                         max_position_embeddings=max_positions,
                         rope_parameters={"rope_type": kind, "rope_theta": base, **parameters})
    if kind == "default":
        return modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, None, **({"seq_len": seq_len} if seq_len else {}))


def agree(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs.double(),
                               rtol=1e-10, atol=1e-300)


def sizes(seed):
    """-> (head_dim from one pair on, base, factor, original context, rng)"""
    rng = random.Random(seed)
    return (2 * rng.choice([1, 2, 3, 5, 16, 32, 64]), rng.choice([100.0, 1e4, 123456.7, 5e5]),
            rng.choice([0.5, 1.0, 2.0, 8.0, rng.uniform(1.0, 40.0)]),
            rng.choice([64, 512, 4096, 8192, rng.randint(300, 30000)]), rng)


@pytest.mark.parametrize("seed", range(50))
def test_inverse_frequencies_and_linear(seed, in_float64):
    head_dim, base, factor, _, _ = sizes(seed)
    plain = rope.inverse_frequencies(head_dim, base)
    agree(plain, frequencies_of("default", head_dim, base)[0])
    theirs, attention_factor = frequencies_of("linear", head_dim, base, factor=factor)
    agree(rope.scale_linear(plain, factor), theirs)
    assert attention_factor == 1.0


@pytest.mark.parametrize("seed", range(50))
def test_ntk(seed, in_float64):
    """transformers' dynamic NTK with a factor of 1, at `factor` times its context, is ours."""
    head_dim, base, factor, _, rng = sizes(seed)
    head_dim, factor = max(head_dim, 4), float(rng.randint(1, 40))
    theirs, _ = frequencies_of("dynamic", head_dim, base, 1000, int(factor * 1000), factor=1.0)
    agree(rope.scale_ntk(head_dim, base, factor), theirs)


@pytest.mark.parametrize("seed", range(80))
def test_yarn(seed, in_float64):
    head_dim, base, factor, context, rng = sizes(seed)
    fast, slow = rng.choice([(32.0, 1.0), (16.0, 2.0), (8.0, 8.0), (rng.uniform(5, 60), rng.uniform(0.5, 5))])
    parameters = {"factor": factor, "original_max_position_embeddings": context,
                  "beta_fast": fast, "beta_slow": slow}
    theirs, attention_factor = frequencies_of("yarn", head_dim, base, **parameters)
    ours, ours_factor = rope.scale_yarn(head_dim, base, factor, context, fast, slow)
    agree(ours, theirs)
    assert ours_factor == pytest.approx(attention_factor, rel=1e-14)


@pytest.mark.parametrize("seed", range(80))
def test_llama3(seed, in_float64):
    head_dim, base, factor, context, rng = sizes(seed)
    low, high = rng.choice([(1.0, 4.0), (0.5, 2.0), (rng.uniform(0.5, 3), rng.uniform(3.5, 40))])
    parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                  "original_max_position_embeddings": context}
    theirs, _ = frequencies_of("llama3", head_dim, base, **parameters)
    agree(rope.scale_llama3(rope.inverse_frequencies(head_dim, base), factor, low, high, context), theirs)


def test_llama3_defaults_are_those_of_the_model(in_float64):
    theirs, _ = frequencies_of("llama3", 128, 500000.0, factor=8.0, low_freq_factor=1.0,
                               high_freq_factor=4.0, original_max_position_embeddings=8192)
    agree(rope.scale_llama3(rope.inverse_frequencies(128, 500000.0)), theirs)


def random_vectors(seed):
    rng = random.Random(seed)
    head_dim, n = 2 * rng.choice([1, 2, 3, 8, 32]), rng.choice([1, 2, 7])
    positions = [rng.choice([0, 1, rng.randrange(5000)]) for _ in range(n)]
    xs = [rope.gaussian(rng, head_dim, rng.choice([0.1, 1.0, 30.0])) for _ in range(n)]
    frequencies = rope.inverse_frequencies(head_dim, rng.choice([1e4, 5e5]))
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64),
                         torch.tensor(frequencies, dtype=torch.float64))
    return xs, positions, frequencies, torch.tensor(xs, dtype=torch.float64), angles


@pytest.mark.parametrize("seed", range(60))
def test_half_is_the_rotation_of_llama(seed):
    xs, positions, frequencies, tensors, angles = random_vectors(seed)
    angles = torch.cat((angles, angles), dim=-1)[None]
    theirs, _ = modeling_llama.apply_rotary_pos_emb(tensors[None, None], tensors[None, None],
                                                    angles.cos(), angles.sin())
    ours = [rope.apply_rope(x, p, frequencies, "half") for x, p in zip(xs, positions)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs[0, 0], rtol=1e-10, atol=1e-10)
    assert ours == [rope.apply_rope(x, p, frequencies) for x, p in zip(xs, positions)]


@pytest.mark.parametrize("seed", range(60))
def test_interleaved_is_the_rotation_of_gptj(seed):
    xs, positions, frequencies, tensors, angles = random_vectors(seed)
    theirs = modeling_gptj.apply_rotary_pos_emb(tensors[None, :, None], angles.sin()[None],
                                                angles.cos()[None])
    ours = [rope.apply_rope(x, p, frequencies, "interleaved") for x, p in zip(xs, positions)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs[0, :, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(50))
def test_gradients_through_both_layouts(seed):
    xs, positions, frequencies, tensors, angles = random_vectors(seed)
    rng = random.Random(seed)
    gs = [rope.gaussian(rng, len(x)) for x in xs]
    for layout in "half", "interleaved":
        leaf = tensors.clone().requires_grad_()
        if layout == "half":
            both = torch.cat((angles, angles), dim=-1)[None]
            turned = modeling_llama.apply_rotary_pos_emb(leaf[None, None], leaf[None, None],
                                                         both.cos(), both.sin())[0][0, 0]
        else:
            turned = modeling_gptj.apply_rotary_pos_emb(leaf[None, :, None], angles.sin()[None],
                                                        angles.cos()[None])[0, :, 0]
        (turned * torch.tensor(gs, dtype=torch.float64)).sum().backward()
        for x, p, g, expected in zip(xs, positions, gs, leaf.grad):
            values = [rope.Value(value) for value in x]
            rope.dot(rope.apply_rope(values, p, frequencies, layout), g).backward()
            gradient = torch.tensor([v.grad for v in values], dtype=torch.float64)
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(50))
def test_permute_rows_is_the_conversion_of_checkpoints(seed):
    """The reshape and transpose with which interleaved checkpoints are converted to the half layout."""
    rng = random.Random(seed)
    n_heads, half, width = rng.choice([1, 2, 5]), rng.choice([1, 2, 3, 8]), rng.choice([1, 4])
    weight = [rope.gaussian(rng, width) for _ in range(n_heads * 2 * half)]
    tensor = torch.tensor(weight, dtype=torch.float64)
    theirs = tensor.view(n_heads, half, 2, width).transpose(1, 2).reshape(-1, width)
    assert torch.equal(torch.tensor(rope.permute_rows(weight, n_heads), dtype=torch.float64), theirs)


@pytest.mark.parametrize("seed", range(50))
def test_the_head_against_torch_attention(seed):
    """project and attend with rotation against scaled_dot_product_attention over rotated inputs."""
    rng = random.Random(seed)
    weights, n = rope.random_head(rng), rng.choice([1, 2, 9])
    xs = [rope.gaussian(rng, rope.D_MODEL) for _ in range(n)]
    start = rng.choice([0, 1000])
    frequencies = rope.inverse_frequencies(rope.HEAD_DIM)
    ours = rope.attend(*rope.project(weights, xs, range(start, start + n), turn=rope.rotary(frequencies)))
    q, k, v = (torch.tensor(xs, dtype=torch.float64) @ torch.tensor(weights[part], dtype=torch.float64).T
               for part in ("query", "key", "value"))
    angles = torch.outer(torch.arange(start, start + n, dtype=torch.float64),
                         torch.tensor(frequencies, dtype=torch.float64))
    both = torch.cat((angles, angles), dim=-1)[None]
    q, k = modeling_llama.apply_rotary_pos_emb(q[None, None], k[None, None], both.cos(), both.sin())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v[None, None], is_causal=True)[0, 0]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-10, atol=1e-10)
