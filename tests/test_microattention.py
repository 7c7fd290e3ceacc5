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
    (lambda q, k, v: (q, [k[0], []], v), r"2 heads, lengths \[0, 3\]"),
    (lambda q, k, v: ([[[]]], [[[]]], [[[]]]), r"1 heads, lengths \[1\], widths \[0\]"),
    (lambda q, k, v: ([[]], k, v), "empty or ragged"),
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


def kinds_of(layer, rank, window):
    """One layer of every kind, made from MHA with 4 heads."""
    return [layer, ma.share_heads(layer, 2), ma.share_heads(layer, 1), layer._replace(window=window),
            ma.to_mla(layer, rank)]


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 16))
@quick
def test_a_text_its_beginning_and_its_last_positions(seed, n, m, window, rank):
    """No output depends on later positions; look() takes the last positions alone; both are counted."""
    rng = random.Random(seed)
    layer, m = ma.random_layer(rng, 16, 4), min(m, n)
    xs = ma.vectors(rng, n, 16)
    for kind in kinds_of(layer, rank, window):
        ma.COUNT.clear()
        outputs = kind.run(xs)
        scores = [min(i + 1, kind.window or n) for i in range(n)]
        assert ma.COUNT["scores"] == 4 * sum(scores)
        assert ma.COUNT["multiply-adds"] == n * ma.COUNT["weights read"] + 4 * sum(scores) * kind.score_cost()
        n_kv_heads, key_dim, value_dim = kind.cache_shape()
        assert ma.COUNT["cached"] == n * n_kv_heads * (key_dim + value_dim)
        assert ma.distance(kind.run(xs[:m]), outputs[:m]) == 0.0
        queries = [head[n - m:] for head in kind.project("query", xs)]
        ma.COUNT.clear()
        last = ma.linear(ma.join_heads(kind.look(queries, *kind.remember(xs))), kind.weights["out"])
        assert last == outputs[n - m:] and ma.COUNT["scores"] == 4 * sum(scores[n - m:])


@given(SEEDS, st.integers(1, 12), st.integers(1, 16))
@quick
def test_decompressed_is_absorbed(seed, n, rank):
    rng = random.Random(seed)
    mla = ma.to_mla(ma.random_layer(rng, 16, 4), rank)
    xs = ma.vectors(rng, n, 16)
    queries, cached = mla.project("query", xs), mla.remember(xs)
    heads = mla.look(queries, *cached)
    assert ma.distance(mla.look_decompressed(queries, *cached), heads) < 1e-10
    assert ma.shape(heads) == (4, n, 4) and ma.shape(cached[0]) == (1, n, rank)


@given(SEEDS, st.integers(0, 9), st.integers(0, 9), st.integers(1, 1000))
@quick
def test_only_relative_positions_count(seed, m, n, shift):
    rng = random.Random(seed)
    query, key = ma.vectors(rng, 2, 7)
    at, later = (ma.dot(ma.rotate(query, m + s, 4), ma.rotate(key, n + s, 4)) for s in (0, shift))
    assert at == pytest.approx(later, abs=1e-10)


@given(SEEDS)
@quick
def test_order_counts(seed):
    """The last position is the same, and so are the others but for their order."""
    rng = random.Random(seed)
    layer, xs = ma.random_layer(rng, 16, 2), ma.vectors(rng, 5, 16)      # two rotated pairs a head
    for kind in (layer, ma.to_mla(layer, 5)):
        assert ma.distance(kind.run(xs[::-1])[-1:], kind.run(xs[1:] + xs[:1])[-1:]) > 1e-6


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
        weights = {name: layer.weights[name][h:h + 1] for name in ("query", "key", "value")}
        weights["out"] = [row[4 * h:4 * h + 4] for row in layer.weights["out"]]
        out = ma.Layer(layer.rope_dim, weights).run(xs)
        total = [[a + b for a, b in zip(*pair)] for pair in zip(total, out)]
    assert ma.distance(total, layer.run(xs)) < 1e-12


def test_random_layers_keep_the_variance():
    layer = ma.random_layer(random.Random(0), 64, 4)
    assert layer.rope_dim == 8 and layer.window is None
    for name, heads in layer.weights.items():
        weights = numbers(heads)
        assert len(weights) == 64 * 64
        assert sum(w * w for w in weights) / 64 == pytest.approx(1.0, rel=0.15), name


@given(SEEDS, st.sampled_from([1, 2, 4, 8]))
@quick
def test_shared_heads(seed, n_kv_heads):
    layer = ma.random_layer(random.Random(seed), 16, 8)
    group = 8 // n_kv_heads
    for pool in (True, False):
        new = ma.share_heads(layer, n_kv_heads, pool)
        assert new.weights.keys() == layer.weights.keys()
        assert all(new.weights[name] == layer.weights[name] for name in ("query", "out"))
        for name in ("key", "value"):
            assert ma.shape(new.weights[name]) == (n_kv_heads, 2, 16)
            for i, head in enumerate(new.weights[name]):
                members = layer.weights[name][i * group:(i + 1) * group]
                expected = [[sum(m[r][c] for m in members) / group if pool else members[0][r][c]
                             for c in range(16)] for r in range(2)]
                assert numbers(head) == pytest.approx(numbers(expected))
    assert new.cache_shape() == (n_kv_heads, 2, 2) and layer.cache_shape() == (8, 2, 2)


@given(SEEDS)
@quick
def test_mla_of_full_rank_is_mha_with_shared_rotated_keys(seed):
    rng = random.Random(seed)
    layer, xs = ma.random_layer(rng, 16, 4), ma.vectors(rng, 5, 16)
    rope, = ma.to_mla(layer, 1).weights["rope"]
    means = [sum(head[2 + r][c] for head in layer.weights["key"]) / 4 for r in range(2) for c in range(16)]
    assert numbers(rope) == pytest.approx(means)
    shared = layer._replace(weights=layer.weights | {"key": [head[:2] + rope for head in layer.weights["key"]]})
    full = ma.to_mla(shared, 16)
    assert ma.distance(full.run(xs), shared.run(xs)) < 1e-10
    assert ma.distance(ma.to_mla(shared, 8).run(xs), shared.run(xs)) > 1e-3
    assert full.cache_shape() == (1, 16 + 2, 0)
    some = [row[:8] + [0.0] * 8 for row in xs]           # all of it is in the first 8 numbers
    assert ma.distance(ma.to_mla(shared, 8).run(some), shared.run(some)) < 1e-10


@given(SEEDS, st.integers(1, 6))
@quick
def test_patterns_are_the_weights(seed, n):
    q, k, v = qkv(random.Random(seed), 4, 2, n, 3)
    for causal in (True, False):
        weights = ma.patterns(q, k, causal)
        assert all(sum(row) == pytest.approx(1.0) for head in weights for row in head)
        assert all(row[i + 1:] == [0.0] * (n - i - 1) for head in weights for i, row in enumerate(head)) or not causal
        mixed = [[[ma.dot(row, column) for column in zip(*v[h // 2])] for row in head]
                 for h, head in enumerate(weights)]
        assert numbers(mixed) == pytest.approx(numbers(ma.attention(q, k, v, causal)), rel=1e-12, abs=1e-12)


@given(SEEDS, st.integers(1, 5), st.integers(1, 3))
@quick
def test_reach(seed, window, n_layers):
    rng = random.Random(seed)
    stack = [ma.random_layer(rng, 4, 2, window) for _ in range(n_layers)]
    sizes = ma.reach(stack, ma.vectors(rng, 9, 4))
    last = min(9, n_layers * (window - 1) + 1)
    assert [size > 0.0 for size in sizes] == [False] * (9 - last) + [True] * last


@pytest.mark.parametrize("seed", range(5))
def test_reach_is_the_gradient_through_the_stack(seed):
    rng = random.Random(seed)
    stack, xs = [ma.random_layer(rng, 4, 2, 2) for _ in range(2)], ma.vectors(rng, 3, 4)
    sizes, squares = ma.reach(stack, xs), [0.0] * 3
    for j in range(3):
        for c in range(4):
            at = []
            for step in (1e-5, -1e-5):
                moved = [[x + step * ((i, k) == (j, c)) for k, x in enumerate(row)] for i, row in enumerate(xs)]
                at.append(sum(stack[1].run(stack[0].run(moved))[-1]))
            squares[j] += ((at[0] - at[1]) / 2e-5) ** 2
    assert sizes == pytest.approx([math.sqrt(square) for square in squares], rel=1e-6, abs=1e-8)


def test_kv_bytes_of_published_models():
    size = {name: ma.kv_bytes_per_token(model.n_layers, model.n_kv_heads, model.key_dim, model.value_dim)
            for name, model in ma.MODELS.items()}
    assert size["Llama-2-70B (GQA)"] == 320 * 1024 and size["Falcon-7B (MQA)"] == 8 * 1024
    assert size["DeepSeek-V3 (MLA)"] == 70272
    assert size["Llama-2-70B (GQA)"] * 4096 == pytest.approx(1.34e9, rel=2e-3)
    assert ma.kv_bytes_per_token(40, 40, 128, 128) == 800 * 1024             # OPT-13B, vLLM paper
    assert ma.kv_bytes_per_token(126, 8, 128, 128) == 504 * 1024             # Llama-3.1-405B


def test_users_on_one_device(measured):
    rows = {row[0]: row[1:] for row in measured("microattention")["models"]}
    assert rows["Llama-2-7B (MHA)"] == ["512.0 KiB", "68.72 GB", "13 GB", 0]
    assert rows["DeepSeek-V3 (MLA)"] == ["68.6 KiB", "9.21 GB", "1,342 GB", "no room"]
    assert rows["Falcon-7B (MQA)"][-1] == int((80e9 - 14e9) / (8 * 1024 * 131072))
    short = {row[0]: row[1:] for row in ma.show_real_world(context=4096)}
    assert short["Llama-2-7B (MHA)"][-1] == int((80e9 - 13.48e9) / (512 * 1024 * 4096)) == 30
    for name in ("GPT-3 (MHA)", "Llama-2-70B (GQA)"):
        assert rows[name][-1] == short[name][-1] == "no room"
    mistral = "Mistral-7B (GQA, window)"
    assert rows[mistral] == short[mistral] and rows[mistral][-1] == 122
    assert ma.show_real_world(memory=640e9)[0][-1] == 0


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_exhibits(seed, measured):
    bugs = {(mistake, symptom): (right, wrong)
            for mistake, symptom, right, wrong in measured("microattention", seed)["bugs"]}
    entropies = [bugs[f"no scale 1/√{d}", "entropy of the weights, nats"] for d in (4, 16, 64, 256)]
    assert all(2.7 < right < math.log(32) and wrong < right - 0.3 for right, wrong in entropies)
    assert [wrong for _, wrong in entropies] == sorted([wrong for _, wrong in entropies], reverse=True)
    assert entropies[-1][1] < 1.0
    gradient, vanished = bugs["no scale 1/√256", "size of d output / d scores"]
    assert vanished < 0.8 * gradient
    right, wrong = bugs["mask after the softmax", "size of d output / d later keys"]
    assert right == 0.0 and wrong > 1e-3
    errors = [bugs["repeat, not interleaved", f"output error, kv heads: {n}"] for n in (1, 2, 4, 8)]
    assert [right for right, _ in errors] == [0.0] * 4
    assert [wrong > 0.1 for _, wrong in errors] == [False, True, True, False]
    assert errors[0][1] == errors[3][1] == 0.0
    assert bugs["window 5 for 4", "positions that the last one sees"] == (4, 5)


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_key_figures(seed, measured):
    results = measured("microattention", seed)
    assert all(results["checks"].values()) and len(results["checks"]) == 13
    assert results["window"] == [4, 7, 10, 13]
    rows = {row[0]: row[1:] for row in results["kinds"]}
    for name, (weights, counted, formula, scores, kv, kv_formula, needed, error) in rows.items():
        assert counted == formula and kv == kv_formula and needed == (4 if "window" in name else 10)
        assert scores == {"one wide head": 55, "window 4": 8 * (1 + 2 + 3 + 7 * 4)}.get(name, 440)
        assert (error == "0.00") == (name == "MHA")
    assert [rows[name][4] for name in ("MHA", "GQA, 4 kv heads", "GQA, 2 kv heads", "MQA")] == [128, 64, 32, 16]
    assert rows["MLA, rank 16"][4] == 2 * (16 + 2)
    assert rows["MHA"][0] == 4 * 32 * 32 and rows["MQA"][0] == 2 * 32 * 32 + 2 * 4 * 32
    assert rows["one wide head"][:2] == rows["MHA"][:2] and rows["one wide head"][4] == 128
    assert rows["MLA, rank 16"][0] == 2 * 32 * 32 + (16 + 2) * 32 + 8 * (2 + 4) * 16
    ups = 16 * 8 * (2 + 4)
    assert results["mla"] == {"MHA": 128 * 8 * (4 + 4), "MLA decompressed": 128 * (ups + 8 * (4 + 4)),
                              "MLA absorbed": ups + 128 * 8 * (16 + 2 + 16)}
    errors = results["gqa"]
    assert len(errors) == 24 and sum(pooled < first for pooled, first in errors) > 0.6 * len(errors)
