"""microattention: the identities, the conversions, the formulas and the bugs."""
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

import microattention as ma

SEEDS = st.integers(0, 10 ** 6)
quick = settings(deadline=None, max_examples=30)


def qkv(rng, n_heads, n_kv_heads, n, width, value_width=None):
    return (ma.vectors(rng, n_heads, n, width), ma.vectors(rng, n_kv_heads, n, width),
            ma.vectors(rng, n_kv_heads, n, value_width or width))


def numbers(nested):
    """All numbers of nested lists in order, Values as their data."""
    if isinstance(nested, (list, tuple)):
        return [x for part in nested for x in numbers(part)]
    return [nested.data if type(nested) is ma.Value else nested]


def by_hand(q, k, v, sees):
    """The definition, element by element, for whoever may see whom."""
    out = []
    for h, head in enumerate(q):
        kv, rows = h * len(k) // len(q), []
        for i, query in enumerate(head):
            e = {j: math.exp(sum(a * b for a, b in zip(query, k[kv][j])) / math.sqrt(len(query)))
                 for j in range(len(head)) if sees(i, j)}
            rows.append([sum(e[j] * v[kv][j][c] for j in e) / sum(e.values()) for c in range(len(v[kv][0]))])
        out.append(rows)
    return out


@given(SEEDS, st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (3, 3)]), st.integers(1, 7),
       st.integers(1, 5), st.booleans(), st.integers(1, 9))
@quick
def test_attention_is_its_definition(seed, heads, n, width, causal, window):
    q, k, v = qkv(random.Random(seed), *heads, n, width, width + 1)
    plain = ma.attention(q, k, v, causal)
    assert numbers(plain) == pytest.approx(
        numbers(by_hand(q, k, v, lambda i, j: j <= i or not causal)), rel=1e-12, abs=1e-12)
    near = by_hand(q, k, v, lambda i, j: i - window < j <= i)
    assert numbers(ma.attention(q, k, v, window=window)) == pytest.approx(numbers(near), rel=1e-12, abs=1e-12)
    values = ma.attention(*ma.leaves([q, k, v]), causal)         # one forward pass, two kinds of numbers
    assert numbers(values) == pytest.approx(numbers(plain), rel=1e-12, abs=1e-12)
    ma.TAPE.clear()


@given(SEEDS, st.integers(1, 6), st.integers(0, 5))
@quick
def test_gradients_by_differences(seed, n, which):
    rng = random.Random(seed)
    arrays = list(qkv(rng, 2, 1, n, 3))
    leaves = [ma.leaves(array) for array in arrays]
    out = [x for head in ma.attention(*leaves, window=2) for row in head for x in row]
    weights = [rng.gauss(0, 1) for _ in out]
    ma.dot(out, weights).backward()
    part, row = which % 3, rng.randrange(n)
    number = arrays[part][0][row]
    at = []
    for step in (1e-5, -1e-5):
        kept = number[0]
        number[0] = kept + step
        at.append(sum(a * b for a, b in zip(numbers(ma.attention(*arrays, window=2)), weights)))
        number[0] = kept
    assert leaves[part][0][row][0].grad == pytest.approx((at[0] - at[1]) / 2e-5, rel=1e-5, abs=1e-8)


GOOD = qkv(random.Random(0), 4, 2, 3, 2)


@pytest.mark.parametrize("change, message", [
    (lambda q, k, v: (q[:3], k, v), "3 heads: not a multiple of 2"),
    (lambda q, k, v: ([], k, v), "empty or ragged"),
    (lambda q, k, v: (q, [], []), "empty or ragged"),
    (lambda q, k, v: (q, [k[0], []], v), r"\(2, 0, 0\)"),
    (lambda q, k, v: ([[[]]], [[[]]], [[[]]]), r"\(1, 1, 0\)"),
    (lambda q, k, v: ([head[:2] for head in q], k, v), r"do not fit.*\(4, 2, 2\)"),
    (lambda q, k, v: (q, [head[:2] for head in k], [head[:2] for head in v]), "do not fit"),
    (lambda q, k, v: (q, k, [head[:2] for head in v]), r"do not fit.*\(2, 2, 2\)"),
    (lambda q, k, v: (q, k, v[:1]), r"do not fit.*\(1, 3, 2\)"),
    (lambda q, k, v: ([[row[:1] for row in head] for head in q], k, v), r"do not fit.*\(4, 3, 1\)"),
    (lambda q, k, v: (q, [k[0], k[1][:2]], v), "ragged"),
    (lambda q, k, v: (q, k, [[v[0][0][:1], *v[0][1:]], v[1]]), "ragged")])
def test_bad_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ma.attention(*change(*GOOD))
    assert len(ma.attention(*GOOD)) == 4


@pytest.mark.parametrize("window, causal", [(0, True), (-3, True), (2.5, True), (2, False)])
def test_bad_windows_are_refused(window, causal):
    with pytest.raises(ValueError, match=f"window {window}, causal {causal}"):
        ma.attention(*GOOD, causal, window)
    ma.attention(*GOOD, causal=True, window=1)


@given(SEEDS, st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
@quick
def test_decoding_in_any_chunks_is_all_at_once(seed, n, chunk, window):
    """Every kind of layer; a window's cache stays within the window; the formulas hold."""
    rng = random.Random(seed)
    layer = ma.random_layer(rng, 16, 4)
    xs, latent = ma.vectors(rng, n, 16), ma.to_mla(layer, 6)
    for kind in (layer, ma.share_heads(layer, 2), ma.changed(layer, window=window), latent,
                 ma.changed(latent, absorbed=False)):
        cache, out = [], []
        for start in range(0, n, chunk):
            part = xs[start:start + chunk]
            ma.COUNT.clear()
            out += kind.run(part, cache, start)
            if kind.window is None or chunk == 1:
                assert ma.COUNT["multiply-adds"] == kind.multiply_adds(len(part), start)
                assert ma.COUNT["scores"] == kind.n_scores(len(part), start)
            assert 2 * ma.COUNT["cached"] == kind.kv_bytes() * len(part)
            assert len(cache) == min(start + len(part), kind.window or n)
        assert ma.distance(out, kind.run(xs, [])) < 1e-12


@given(SEEDS, st.integers(1, 20))
@quick
def test_only_relative_positions_count(seed, shift):
    rng = random.Random(seed)
    layer, xs = ma.random_layer(rng, 16, 2), ma.vectors(rng, 5, 16)      # two rotated pairs a head
    for kind in (layer, ma.to_mla(layer, 5)):
        assert ma.distance(kind.run(xs, [], shift), kind.run(xs, [])) < 1e-12
        assert ma.distance(kind.run(xs[::-1], [])[-1:], kind.run(xs[1:] + xs[:1], [])[-1:]) > 1e-6


def test_rotation_by_hand():
    turned = ma.rotate([5.0, 1.0, 0.0, 0.0, 2.0], 3, 4)
    assert turned == pytest.approx([5.0, math.cos(3), math.sin(3), -2 * math.sin(0.03), 2 * math.cos(0.03)])


@given(SEEDS)
@quick
def test_a_layer_is_the_sum_of_its_heads(seed):
    rng = random.Random(seed)
    layer, xs = ma.random_layer(rng, 12, 3), ma.vectors(rng, 4, 12)
    total = [[0.0] * 12 for _ in xs]
    for h in range(3):
        weights = {name: ma.cut(layer.weights[name], 3)[h] for name in ("query", "key", "value")}
        weights["out"] = [ma.cut(row, 3)[h] for row in layer.weights["out"]]
        out = ma.Layer(1, 1, layer.rope_dim, weights).run(xs, [])
        total = [[a + b for a, b in zip(*pair)] for pair in zip(total, out)]
    assert ma.distance(total, layer.run(xs, [])) < 1e-12


@given(SEEDS, st.sampled_from([1, 2, 4, 8]))
@quick
def test_shared_heads(seed, n_kv_heads):
    layer = ma.random_layer(random.Random(seed), 16, 8)
    group = 8 // n_kv_heads
    for pool in (True, False):
        new = ma.share_heads(layer, n_kv_heads, pool)
        for name in ("key", "value"):
            old = ma.cut(layer.weights[name], 8)
            for i, head in enumerate(ma.cut(new.weights[name], n_kv_heads)):
                members = old[i * group:(i + 1) * group]
                expected = [[sum(m[r][c] for m in members) / group if pool else members[0][r][c]
                             for c in range(16)] for r in range(2)]
                assert numbers(head) == pytest.approx(numbers(expected))
    assert new.kv_bytes() * group == layer.kv_bytes()


@given(SEEDS, st.integers(1, 16))
@quick
def test_directions_are_orthonormal_and_lose_less_with_rank(seed, rank):
    matrix = ma.vectors(random.Random(seed), 24, 16)
    basis = ma.main_directions(matrix, rank)
    for i, a in enumerate(basis):
        assert [ma.dot(a, b) for b in basis] == pytest.approx([float(i == j) for j in range(rank)], abs=1e-10)
    kept = [sum(ma.dot(row, b) ** 2 for row in matrix for b in basis[:n]) for n in range(rank + 1)]
    assert kept == sorted(kept) and (rank < 16 or kept[-1] == pytest.approx(sum(x * x for x in numbers(matrix))))


@given(SEEDS)
@quick
def test_mla_of_full_rank_is_mha_with_shared_rotated_keys(seed):
    rng = random.Random(seed)
    layer, xs = ma.random_layer(rng, 16, 4), ma.vectors(rng, 5, 16)
    rope = ma.to_mla(layer, 1).weights["rope"]
    keys = [row for head in ma.cut(layer.weights["key"], 4) for row in head[:2] + rope]
    shared = ma.changed(layer, weights=layer.weights | {"key": keys})
    full = ma.to_mla(shared, 16)
    assert ma.distance(full.run(xs, []), shared.run(xs, [])) < 1e-10
    assert ma.distance(ma.to_mla(shared, 8).run(xs, []), shared.run(xs, [])) > 1e-3
    assert full.kv_bytes() == 2 * (16 + 2)


@given(SEEDS, st.integers(1, 5), st.integers(1, 3))
@quick
def test_reach(seed, window, n_layers):
    rng = random.Random(seed)
    stack = [ma.random_layer(rng, 4, 2, window) for _ in range(n_layers)]
    sizes = ma.reach(stack, ma.vectors(rng, 9, 4))
    last = min(9, n_layers * (window - 1) + 1)
    assert [size > 0.0 for size in sizes] == [False] * (9 - last) + [True] * last


@pytest.mark.parametrize("seed", range(5))
def test_reach_is_the_gradient_through_residuals(seed):
    rng = random.Random(seed)
    layer, xs = ma.random_layer(rng, 4, 2, 2), ma.vectors(rng, 3, 4)
    sizes, squares = ma.reach([layer], xs), [0.0] * 3
    for j in range(3):
        for c in range(4):
            at = []
            for step in (1e-5, -1e-5):
                moved = [[x + step * ((i, k) == (j, c)) for k, x in enumerate(row)] for i, row in enumerate(xs)]
                at.append(sum(moved[-1]) + sum(layer.run(moved, [])[-1]))
            squares[j] += ((at[0] - at[1]) / 2e-5) ** 2
    assert sizes == pytest.approx([math.sqrt(square) for square in squares], rel=1e-6, abs=1e-8)


def test_kv_bytes_of_published_models():
    size = {name: ma.kv_bytes_per_token(model[0], *model[1]) for name, model in ma.MODELS.items()}
    assert size["Llama-2-70B (GQA)"] == 320 * 1024 and size["Falcon-7B (MQA)"] == 8 * 1024
    assert size["DeepSeek-V3 (MLA)"] == 70272
    assert size["Llama-2-70B (GQA)"] * 4096 == pytest.approx(1.34e9, rel=2e-3)
    assert ma.kv_bytes_per_token(40, 40, 128, 128) == 800 * 1024             # OPT-13B, vLLM paper
    assert ma.kv_bytes_per_token(126, 8, 128, 128) == 504 * 1024             # Llama-3.1-405B


def test_users_on_one_device(measured):
    rows = {row[0]: row for row in measured("microattention")["real_world"]}
    assert rows["Llama-2-7B (MHA)"][-2:] == [0, int((80e9 - 13.48e9) / (512 * 1024 * 4096))]
    assert rows["Mistral-7B (GQA)"][-2] == rows["Mistral-7B (GQA)"][-1] == 122      # the window
    assert rows["GPT-3 (MHA)"][-2:] == rows["DeepSeek-V3 (MLA)"][-2:] == ["no room"] * 2


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_exhibits(seed, measured):
    bugs = measured("microattention", seed)["bugs"]
    assert bugs["leaks"][0] == 0.0 and bugs["leaks"][1] > 1e-3
    assert bugs["repeat"][1] == bugs["repeat"][8] == 0.0 and bugs["repeat"][2] > 0.1 < bugs["repeat"][4]
    assert bugs["differs"] == [4, 5, 6, 7, 8, 9]
    right, gradient, wrong, vanished = bugs["sharpness"][256]
    assert right > 2.5 > 1.0 > wrong and vanished < 0.8 * gradient
    entropies = [row[2] for row in bugs["sharpness"].values()]
    assert entropies == sorted(entropies, reverse=True)
    assert all(2.7 < row[0] < math.log(32) for row in bugs["sharpness"].values())


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_key_figures(seed, measured):
    results = measured("microattention", seed)
    assert all(results["checks"].values()) and len(results["checks"]) == 13
    assert results["window"] == [4, 7, 10, 13]
    rows = {row[0]: row for row in results["variants"]}
    for name, (*_, counted, formula, kv, kv_formula, scores, kept, error) in rows.items():
        assert counted == formula and kv == kv_formula and kept == (4 if "window" in name else 10)
        assert scores == {"one wide head": 55, "window 4": 8 * (1 + 2 + 3 + 7 * 4)}.get(name, 440)
        assert (error == 0.0) == (name == "MHA")
    assert [rows[name][4] for name in ("MHA", "GQA, 4 kv heads", "GQA, 2 kv heads", "MQA")] == [128, 64, 32, 16]
    assert rows["MLA, rank 16"][4] == 2 * (16 + 2)
    assert rows["MHA"][1] == 4 * 32 * 32 and rows["MQA"][1] == 2 * 32 * 32 + 2 * 4 * 32
    assert rows["MLA, rank 16"][-1] == pytest.approx(rows["MLA decompressed"][-1], rel=1e-9)
    slopes = {name: {(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(curve, curve[1:])}
              for name, curve in results["mla"].items()}
    assert slopes == {"MHA": {2 * 32.0}, "MLA absorbed": {8 * (16 + 2 + 16.0)},
                      "MLA decompressed": {8 * (4 + 4.0) + 16 * 8 * (2 + 4)}}
    errors = results["gqa"]
    assert sum(pooled < first for pooled, first in errors) > 0.6 * len(errors)
