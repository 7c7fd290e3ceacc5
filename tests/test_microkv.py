"""microkv: the cache, the counts, the formulas and the bugs."""
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

import microkv as kv

SEEDS = st.integers(0, 10 ** 6)


def tiny(seed, n_layers=1, context=12):
    """-> (a small random model with float weights, rng)"""
    rng = random.Random(seed)
    model = kv.GPT(6, rng, n_layers, 6, 2, context)
    for p in model.parameters():
        p.data *= 6.0                    # so that predictions differ visibly from uniform
    return model.frozen(), rng


@given(SEEDS, st.integers(1, 3), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_cache_changes_nothing_but_the_work(seed, n_layers, n_prompt):
    model, rng = tiny(seed, n_layers)
    prompt = [rng.randrange(6) for _ in range(n_prompt)]
    n_tokens = 12 - n_prompt + 1
    tokens, logits, counts = kv.generate(model, prompt, n_tokens)
    naive_tokens, naive_logits, naive_counts = kv.generate(model, prompt, n_tokens, use_cache=False)
    assert (tokens, logits) == (naive_tokens, naive_logits)
    assert naive_counts == [sum(kv.position_cost(model, i + 1) for i in range(n_prompt + step))
                            for step in range(n_tokens)]
    assert counts == naive_counts[:1] + [kv.position_cost(model, n_prompt + step)
                                         for step in range(1, n_tokens)]


@given(SEEDS, st.lists(st.integers(1, 5), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_any_chunks_and_any_mixture_give_the_same_bits(seed, sizes):
    """Two sequences, each cut into chunks of its own, both in every pass."""
    model, rng = tiny(seed, n_layers=2)
    texts = [[rng.randrange(6) for _ in range(12)] for _ in "ab"]
    whole = [model.run(text, kv.KVCache(2)) for text in texts]
    caches, seen, logits = [kv.KVCache(2), kv.KVCache(2)], [0, 0], [[], []]
    sizes = iter(sizes + [12, 12])
    while min(seen) < 12:
        rows, owners = [], []
        for which in (0, 1):
            end = min(12, seen[which] + next(sizes, 12))
            rows += [(texts[which][i], i, caches[which]) for i in range(seen[which], end)]
            owners += [which] * (end - seen[which])
            seen[which] = end
        for which, row in zip(owners, model.forward(rows)):
            logits[which].append(row)
    assert logits == whole


@given(SEEDS, st.integers(1, 6), st.integers(1, 11))
@settings(deadline=None, max_examples=40)
def test_truncate_forgets_without_trace(seed, keep, junk):
    model, rng = tiny(seed, n_layers=2)
    text = [rng.randrange(6) for _ in range(12)]
    cache, clean = kv.KVCache(2), kv.KVCache(2)
    model.run(text[:keep], cache)
    model.run([rng.randrange(6) for _ in range(min(junk, 12 - keep))], cache, keep)
    cache.truncate(keep)
    assert cache.length == keep
    model.run(text[:keep], clean)
    assert model.run(text[keep:], cache, keep) == model.run(text[keep:], clean, keep)
    assert (cache.keys, cache.values, cache.length) == (clean.keys, clean.values, 12)


def test_fork_shares_nothing():
    model, _ = tiny(0)
    cache = kv.KVCache(1)
    model.run([1, 2, 3], cache)
    twin = kv.fork(cache)
    model.run([4], twin, 3)
    assert (cache.length, twin.length) == (3, 4)


@given(SEEDS, st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_paged_cache_is_a_cache(seed, block_size):
    model, rng = tiny(seed, n_layers=2)
    text = [rng.randrange(6) for _ in range(12)]
    n_blocks = math.ceil(12 / block_size)
    pool = [[[None] * block_size for _ in range(n_blocks)] for _ in range(2)]
    free = rng.sample(range(n_blocks), n_blocks)
    paged = kv.PagedKVCache(pool, free, block_size)
    assert model.run(text, paged) == model.run(text, kv.KVCache(2))
    assert free == [] and sorted(paged.block_table) == list(range(n_blocks))


def test_forward_sees_only_the_past():
    model, _ = tiny(3)
    one, other = ([1, 2, 3, last] for last in (4, 5))
    assert model.run(one, kv.KVCache(1))[:3] == model.run(other, kv.KVCache(1))[:3]
    assert model.run(one, kv.KVCache(1))[3] != model.run(other, kv.KVCache(1))[3]


def test_generate_refuses_what_it_cannot_do():
    model, _ = tiny(0)
    with pytest.raises(ValueError, match="empty"):
        kv.generate(model, [], 3)
    with pytest.raises(ValueError, match="13 positions, but the context is 12"):
        kv.generate(model, [1, 2], 12)
    assert len(kv.generate(model, [1, 2], 11)[0]) == 11


def test_kv_bytes_of_published_models():
    """Figures that the papers and vendors state themselves."""
    assert kv.kv_bytes_per_token(40, 40, 128) == 800 * 1024                  # OPT-13B, vLLM paper
    assert kv.kv_bytes_per_token(80, 8, 128) * 4096 == pytest.approx(1.34e9, rel=2e-3)
    assert kv.kv_bytes_per_token(126, 8, 128) == 504 * 1024                  # Llama-3.1-405B
    assert kv.kv_bytes_per_token(32, 8, 128, 1) == 64 * 1024                 # Llama-3-8B in 8 bits
    figures = {"Llama-3-8B (GQA)": 128 * 1024, "Falcon-7B (MQA)": 8 * 1024, "DeepSeek-V3 (MLA)": 70272}
    for name, size in figures.items():
        n_layers, _, n_kv_heads, head_dim, _ = kv.MODELS[name]
        assert kv.kv_bytes_per_token(n_layers, n_kv_heads, head_dim) == size


def test_roofline():
    assert kv.decode_tokens_per_second(10.0, 100.0, 4, 10.0, 10.0) == (0.4, "memory")
    assert kv.decode_tokens_per_second(100.0, 10.0, 4, 10.0, 10.0) == (0.4, "compute")
    ridges = {name: round(peak / bandwidth) for name, (peak, bandwidth, _) in kv.DEVICES.items()}
    assert ridges == {"A100 80GB": 153, "H100": 295, "H200": 206, "B200": 281, "RTX 4090": 164}


def test_step_cost_counts_weights_once_and_caches_per_request():
    (flop, read), (flops, reads) = (kv.step_cost("Llama-3-8B (GQA)", n, 1000) for n in (1, 5))
    assert flops == 5 * flop
    assert reads - read == 4 * 131072 * 1000 and read == 2 * 8.03e9 + 131072 * 1000
    # The tiny model's counters agree with the same formula, apart from the norms.
    assert flop - kv.step_cost("Llama-3-8B (GQA)", 1, 0)[0] == 4 * 32 * 4096 * 1000


def test_fitting_is_the_most_that_fits():
    for name in kv.MODELS:
        for memory in (24e9, 80e9, 180e9):
            n = kv.fitting(name, 8192, memory)
            if n:
                assert kv.step_cost(name, n, 8192)[1] <= memory
            assert kv.step_cost(name, n + 1, 8192)[1] > memory


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_exhibits(seed, measured):
    stale, restart, late, rejected = measured("microkv", seed)["divergences"].values()
    assert stale[0] > 1e-4               # wrong at once
    for kl in (restart, late, rejected):
        assert kl[0] == 0.0 and max(kl[1:]) > 1e-3
    assert max(restart) > 0.1


def test_the_correct_run_shows_no_symptom():
    model, rng = tiny(5, context=20)
    prompt = [rng.randrange(6) for _ in range(5)]
    right = kv.generate(model, prompt, 10)[:2]
    assert kv.prefill_then_decode(model, prompt, 10, kv.greedy) == right
    for mistake in ({"stale": [1, 2, 3]}, {"shift": -5}, {"shift": 1}, {"rejected": [1, 2, 3]}):
        assert kv.prefill_then_decode(model, prompt, 10, kv.greedy, **mistake)[1] != right[1]


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_key_figures(seed, measured):
    results = measured("microkv", seed)
    losses = results["losses"]
    assert losses["the tiny GPT"] < losses["a uniform guess"] - 0.5          # it learned something
    naive, cached = (results["multiply_adds"][key] for key in ("without", "with"))
    assert naive[0] == cached[0] and naive[-1] > 25 * cached[-1]
    prefill, decode = results["traffic"]["prefill"], results["traffic"]["decode"]
    flops = [cost[0] for cost in prefill.values()]
    assert len(set(flops)) == 1                                              # chunks cost no arithmetic
    assert prefill[1][1] == 24 * prefill[24][1]                              # but weight reads
    assert decode[256][0] == 256 * decode[1][0] and decode[256][1] == decode[1][1]
    assert decode[256][2] == 256 * decode[1][2]
    shares = list(results["reserved_share"].values())
    assert shares == sorted(shares) and 0.0 < shares[0] and shares[-1] < 1.0


def test_bigram_loss_by_hand():
    """Names "a", "a" in the vocabulary {., a}: after "." comes "a" in 3 of 4, after "a" "." in 3 of 4."""
    assert kv.bigram_loss([[0, 1, 0]] * 2, [[0, 1, 0]], 2) == pytest.approx(-math.log(3 / 4))


def test_tokenize_loses_no_name_and_holds_out_a_tenth():
    names = kv.NAMES.split()
    assert 200 <= len(names) == len(set(names)) and all(name.isalpha() for name in names)
    vocabulary, train, held_out = kv.tokenize(names, random.Random(1))
    assert len(held_out) == len(names) // 10 and len(vocabulary) == len(set(vocabulary))
    texts = ["".join(vocabulary[t] for t in name) for name in train + held_out]
    assert sorted(texts) == sorted(f".{name}." for name in names)
    assert kv.tokenize(names[::-1], random.Random(1))[1] == train            # order does not matter


def test_read_names(tmp_path):
    path = tmp_path / "names"
    path.write_bytes("\ufeffanna \r\n\r\n".encode() + b"".join(b"ben%d\n" % i for i in range(20))
                     + b"anna\nben7\n")
    assert kv.read_names(path) == ["anna"] + [f"ben{i}" for i in range(20)]
    with pytest.raises(OSError):
        kv.read_names(tmp_path / "missing")
    with pytest.raises(OSError):
        kv.read_names(tmp_path)          # a directory
