"""microrope: the rotation, its layouts, the scaled frequencies and the bugs."""
import math
import random
import re

import pytest
from hypothesis import given, settings, strategies as st

import microrope as rope

SEEDS = st.integers(0, 10 ** 6)
HEAD_DIMS = st.integers(1, 12).map(lambda n: 2 * n)
LAYOUTS = st.sampled_from(["half", "interleaved"])
some = settings(deadline=None, max_examples=40)


def vectors(seed, head_dim, n=2):
    rng = random.Random(seed)
    return [rope.gaussian(rng, head_dim) for _ in range(n)]


def test_a_quarter_turn_by_hand():
    """Pairs, direction and layout, on numbers one can follow."""
    x, quarter = [1.0, 2.0, 3.0, 4.0], [math.pi / 2, 0.0]
    assert rope.apply_rope(x, 1, quarter) == pytest.approx([-3.0, 2.0, 1.0, 4.0])
    assert rope.apply_rope(x, 1, quarter, "interleaved") == pytest.approx([-2.0, 1.0, 3.0, 4.0])
    assert rope.apply_rope(x, 2, quarter) == pytest.approx([-1.0, 2.0, -3.0, 4.0])
    assert x == [1.0, 2.0, 3.0, 4.0]                                 # the argument is not changed


def test_inverse_frequencies_by_hand():
    assert rope.inverse_frequencies(8) == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert rope.inverse_frequencies(4, 100.0) == pytest.approx([1.0, 0.1])
    assert rope.inverse_frequencies(2) == [1.0]


@given(SEEDS, HEAD_DIMS, st.integers(-3000, 3000), st.integers(-3000, 3000), LAYOUTS)
@some
def test_a_score_depends_on_the_distance_alone(seed, head_dim, m, shift, layout):
    q, k = vectors(seed, head_dim)
    frequencies = rope.inverse_frequencies(head_dim)
    def score(i, j):
        return rope.dot(rope.apply_rope(q, i, frequencies, layout),
                        rope.apply_rope(k, j, frequencies, layout))
    assert score(m + shift, shift) == pytest.approx(score(m, 0), abs=1e-9)
    assert score(0, -m) == pytest.approx(score(m, 0), abs=1e-9)


@given(SEEDS, HEAD_DIMS, st.integers(-3000, 3000), st.integers(-3000, 3000), LAYOUTS)
@some
def test_rotations_add_up_and_keep_the_norm(seed, head_dim, m, n, layout):
    x, _ = vectors(seed, head_dim)
    frequencies = rope.inverse_frequencies(head_dim)
    once = rope.apply_rope(x, m, frequencies, layout)
    assert rope.apply_rope(once, n, frequencies, layout) == pytest.approx(
        rope.apply_rope(x, m + n, frequencies, layout), abs=1e-10)
    assert rope.apply_rope(once, -m, frequencies, layout) == pytest.approx(x, abs=1e-12)
    assert rope.dot(once, once) == pytest.approx(rope.dot(x, x))
    assert rope.apply_rope(x, 0, frequencies, layout) == x


@given(SEEDS, HEAD_DIMS, st.integers(-3000, 3000), LAYOUTS)
@some
def test_the_gradient_is_the_inverse_rotation(seed, head_dim, position, layout):
    x, g = vectors(seed, head_dim)
    frequencies = rope.inverse_frequencies(head_dim)
    leaves = [rope.Value(value) for value in x]
    turned = rope.apply_rope(leaves, position, frequencies, layout)
    assert [y.data for y in turned] == pytest.approx(
        rope.apply_rope(x, position, frequencies, layout), abs=1e-14)
    rope.dot(turned, g).backward()
    assert [leaf.grad for leaf in leaves] == pytest.approx(
        rope.apply_rope(g, -position, frequencies, layout), abs=1e-13)


@given(SEEDS, HEAD_DIMS, st.integers(1, 4), st.integers(0, 3000))
@some
def test_converted_weights_give_the_same_scores(seed, head_dim, n_heads, position):
    rng = random.Random(seed)
    wq, wk = ([rope.gaussian(rng, 5) for _ in range(n_heads * head_dim)] for _ in "qk")
    (x, y), frequencies = vectors(seed, 5), rope.inverse_frequencies(head_dim)
    def score(query_rows, key_rows, layout):
        q, k = rope.linear([x], query_rows)[0], rope.linear([y], key_rows)[0]
        return [rope.dot(rope.apply_rope(q[i:i + head_dim], position, frequencies, layout),
                         rope.apply_rope(k[i:i + head_dim], 3, frequencies, layout))
                for i in range(0, len(q), head_dim)]
    moved = rope.permute_rows(wq, n_heads), rope.permute_rows(wk, n_heads)
    assert score(*moved, "half") == pytest.approx(score(wq, wk, "interleaved"), abs=1e-10)
    assert sorted(moved[0]) == sorted(wq)


def test_permute_rows_by_hand():
    assert rope.permute_rows(list(range(8)), 1) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert rope.permute_rows(list(range(8)), 2) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rope.permute_rows(list(range(4)), 2) == [0, 1, 2, 3]


@given(SEEDS, HEAD_DIMS, st.integers(0, 5000), st.sampled_from([100.0, 1e4, 5e5]))
@some
def test_envelope_and_bound_of_the_paper(seed, head_dim, distance, base):
    q, k = vectors(seed, head_dim)
    frequencies = rope.inverse_frequencies(head_dim, base)
    envelope, bound = rope.decay(q, k, distance, frequencies)
    score = rope.dot(rope.apply_rope(q, distance, frequencies), k)
    assert abs(score) <= envelope + 1e-9 <= bound + 2e-9
    # The envelope is the largest score over a common turn of all pairs of the query.
    n = len(frequencies)
    best = max(rope.dot(rope.apply_rope(rope.apply_rope(q, distance, frequencies), a / 50, [1.0] * n), k)
               for a in range(315))
    assert best == pytest.approx(envelope, rel=1e-3)
    # Summed by parts, written out.
    h = [complex(q[i], q[i + n]) * complex(k[i], -k[i + n]) for i in range(n)] + [0.0]
    sums = [sum(complex(math.cos(distance * f), math.sin(distance * f)) for f in frequencies[:j])
            for j in range(1, n + 1)]
    assert bound == pytest.approx(max(abs(h[i + 1] - h[i]) for i in range(n)) * sum(map(abs, sums)))


@given(HEAD_DIMS, st.sampled_from([500.0, 1e4, 5e5]), st.floats(1.0, 64.0), st.integers(512, 16384))
@some
def test_scaling_stays_between_nothing_and_the_factor(head_dim, base, factor, context):
    plain = rope.inverse_frequencies(head_dim, base)
    turns = [context * frequency / (2.0 * math.pi) for frequency in plain]
    assert rope.scale_linear(plain, factor) == pytest.approx([f / factor for f in plain])
    if head_dim > 2:
        ntk = rope.scale_ntk(head_dim, base, factor)
        assert ntk[0] == 1.0 and ntk[-1] == pytest.approx(plain[-1] / factor)
    yarn, attention_factor = rope.scale_yarn(head_dim, base, factor, context)
    llama = rope.scale_llama3(plain, factor, original_context=context)
    assert attention_factor == pytest.approx(0.1 * math.log(factor) + 1.0)
    for frequencies, most in ((yarn, 32.0), (llama, 4.0)):
        for old, new, turn in zip(plain, frequencies, turns):
            assert old / factor * (1 - 1e-12) <= new <= old * (1 + 1e-12)
            if turn >= most + 1e-6:
                assert new == pytest.approx(old, rel=1e-12)
            if turn <= 1.0 - 1e-6:
                assert new == pytest.approx(old / factor, rel=1e-12)


def test_llama3_blends_by_turns_and_yarn_by_index():
    plain = rope.inverse_frequencies(128, 500000.0)
    turns = [8192 * frequency / (2.0 * math.pi) for frequency in plain]
    between = [i for i, turn in enumerate(turns) if 1.0 < turn < 4.0]
    scaled = rope.scale_llama3(plain)
    for i in between:
        assert scaled[i] / plain[i] == pytest.approx((turns[i] - 1) / 3 + (1 - (turns[i] - 1) / 3) / 8)
    assert len(between) == 6
    yarn, _ = rope.scale_yarn(128, 500000.0, 8.0, 8192)
    shares = [(new / old - 1 / 8) / (7 / 8) for old, new in zip(plain, yarn)]
    assert shares[:19] == pytest.approx([1.0] * 19) and shares[35:] == pytest.approx([0.0] * 29)
    steps = [a - b for a, b in zip(shares[18:35], shares[19:36])]
    assert steps == pytest.approx([1 / 17] * 17)


def test_parameters_reach_the_formulas():
    """A default that cannot be changed, or is changed in the wrong place, shows here."""
    plain = rope.inverse_frequencies(64)
    assert rope.scale_llama3(plain) == rope.scale_llama3(plain, 8.0, 1.0, 4.0, 8192)
    assert rope.scale_yarn(64, 1e4, 4.0, 2048) == rope.scale_yarn(64, 1e4, 4.0, 2048, 32.0, 1.0)
    assert rope.scale_yarn(64, 1e4, 4.0, 2048, beta_fast=64.0) != rope.scale_yarn(64, 1e4, 4.0, 2048)
    assert rope.scale_yarn(64, 1e4, 4.0, 2048, beta_slow=4.0) != rope.scale_yarn(64, 1e4, 4.0, 2048)
    assert rope.scale_yarn(64, 1e4, 1.0, 2048)[1] == 1.0
    assert rope.scale_yarn(64, 1e4, 0.5, 2048)[1] == 1.0
    # beta_slow and beta_fast on the same index: a step, not a division by zero
    step, _ = rope.scale_yarn(4, 100.0, 4.0, 6.0, beta_fast=0.9, beta_slow=0.9)
    assert step == pytest.approx([1.0, 0.025])


@pytest.mark.parametrize("call, message", [
    (lambda: rope.inverse_frequencies(7), "head_dim 7 is odd"),
    (lambda: rope.inverse_frequencies(0), "head_dim 0"),
    (lambda: rope.inverse_frequencies(-4), "head_dim -4"),
    (lambda: rope.inverse_frequencies(8, 1.0), "base 1.0 is not above 1"),
    (lambda: rope.inverse_frequencies(8, -10000.0), "base -10000.0"),
    (lambda: rope.inverse_frequencies(8, math.nan), "base nan"),
    (lambda: rope.apply_rope([1.0] * 3, 1, [1.0]), "1 frequencies do not turn 3 numbers"),
    (lambda: rope.apply_rope([1.0] * 6, 1, [1.0] * 2), "2 frequencies do not turn 6 numbers"),
    (lambda: rope.apply_rope([], 1, []), "0 frequencies do not turn 0 numbers"),
    (lambda: rope.apply_rope([1.0] * 2, 1, [1.0], "quarter"), "layout 'quarter'"),
    (lambda: rope.scale_linear([1.0], -2.0), "factor -2.0 is not positive"),
    (lambda: rope.scale_linear([1.0], 0.0), "factor 0.0 is not positive"),
    (lambda: rope.scale_linear([], 2.0), "0 frequencies"),
    (lambda: rope.scale_ntk(64, 1e4, -8.0), "factor -8.0"),
    (lambda: rope.scale_ntk(63, 1e4, 8.0), "head_dim 63 is odd"),
    (lambda: rope.scale_ntk(2, 1e4, 8.0), "head_dim 2"),
    (lambda: rope.scale_yarn(63, 1e4, 8.0, 4096), "head_dim 63 is odd"),
    (lambda: rope.scale_yarn(64, 1e4, -8.0, 4096), "factor -8.0"),
    (lambda: rope.scale_yarn(64, 1e4, 8.0, 0), "original_context 0"),
    (lambda: rope.scale_yarn(64, 1e4, 8.0, 4096, 1.0, 32.0), "beta_fast 1.0, beta_slow 32.0"),
    (lambda: rope.scale_yarn(64, 1e4, 8.0, 4096, 32.0, 0.0), "beta_slow 0.0"),
    (lambda: rope.scale_yarn(64, 1e4, 8.0, 3), "base 10000.0, 3 tokens"),
    (lambda: rope.scale_llama3([1.0], -8.0), "factor -8.0"),
    (lambda: rope.scale_llama3([1.0], 8.0, 4.0, 1.0), "low_freq_factor 4.0, high_freq_factor 1.0"),
    (lambda: rope.scale_llama3([1.0], 8.0, 1.0, 1.0), "high_freq_factor 1.0"),
    (lambda: rope.scale_llama3([1.0], original_context=-1), "original_context -1"),
    (lambda: rope.scale_llama3([]), "0 frequencies"),
    (lambda: rope.permute_rows([[1.0]] * 6, 2), "6 rows are not 2 heads"),
    (lambda: rope.permute_rows([[1.0]] * 7, 2), "7 rows are not 2 heads"),
    (lambda: rope.permute_rows([[1.0]] * 9, 2), "9 rows are not 2 heads"),
    (lambda: rope.permute_rows([[1.0]] * 4, 0), "4 rows are not 0 heads"),
    (lambda: rope.permute_rows([], 1), "0 rows")])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_the_head_is_attention_written_out():
    """project and attend with every hook in use, against a loop over single numbers."""
    rng = random.Random(3)
    weights, n = rope.random_head(rng), 4
    xs = [rope.gaussian(rng, rope.D_MODEL) for _ in range(n)]
    hooks = {"add": lambda x, p: [a + p for a in x], "turn": lambda v, p: [a * (p + 1) for a in v],
             "turn_values": lambda v, p: [a - p for a in v]}
    outputs = rope.attend(*rope.project(weights, xs, range(n), **hooks))
    def product(part, i):
        return [sum(w * (x + i) for w, x in zip(row, xs[i])) for row in weights[part]]
    for i, output in enumerate(outputs):
        q = [a * (i + 1) for a in product("query", i)]
        scores = [sum(a * b * (j + 1) for a, b in zip(q, product("key", j))) / 4.0 for j in range(i + 1)]
        p = [math.exp(s - max(scores)) for s in scores]
        expected = [sum(p[j] * (product("value", j)[c] - j) for j in range(i + 1)) / sum(p)
                    for c in range(rope.HEAD_DIM)]
        assert output == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_exhibits(seed, measured):
    results = measured("microrope", seed)
    assert all(results["checks"].values())
    none, scaling, layout, values, restart = results["bugs"].values()
    assert none == [0.0] * 24
    for errors in (scaling, layout, values, restart):
        assert len(errors) == 24 and errors[0] == 0.0 and max(errors) > 1e-3
    assert min(scaling[1], layout[1], values[1]) > 0.0
    assert restart[:12] == [0.0] * 12 and restart[12] > 0.0
    drift = results["drift"]
    assert drift[0] == 0.0 < drift[1] < 0.8 and drift[4] > drift[1] and drift[4096] > 0.8


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_key_figures(seed, measured):
    results = measured("microrope", seed)
    sinusoids, learned, rotary = results["changes"].values()
    assert len(sinusoids) == len(learned) == len(rotary) == 1000 and max(rotary) < 1e-12
    assert max(sinusoids) > 0.1 and max(learned) > 0.1
    rotary, learned = results["look_back"].values()
    assert min(rotary.values()) > 0.99
    assert [learned[m] > 0.99 for m in learned] == [m < 500 for m in learned]
    assert max(learned[m] for m in learned if m >= 500) < 1e-4
    curve = results["decay"]
    assert [m for m, *_ in curve] == list(range(1, 3001))
    near, far = curve[:10], curve[-1000:]
    assert sum(envelope for _, envelope, _ in far) / 1000 < 0.7 * min(envelope for _, envelope, _ in near)
    assert sum(bound for *_, bound in far) / 1000 < 0.5 * min(bound for *_, bound in near)
    assert list(results["turnless"].values()) == [18, 0, 29, 15]
    assert [len(x) for x in results["slower"].values()] == [64] * 5


def test_pairs_of_each_method_as_printed(first_run):
    out = first_run("microrope").out
    assert re.search(r"^  pairs that stay +64 +0 +1 +19 +29$", out, re.M)
    assert re.search(r"^  pairs with new angles +29 +0 +28 +0 +0$", out, re.M)
    assert re.search(r"^  40 +22,911 +0\.358 +1\.00 +8\.00 +3\.74 +8\.00 +8\.00$", out, re.M)


@pytest.mark.parametrize("distance", [0, 1, 3, 11, 100, -3])
def test_only_the_rotary_way_is_free_of_positions(distance):
    """Every shift that fits the positions, and distances that the exhibit does not show."""
    rng, size = random.Random(distance), 1004
    ways = rope.three_ways(rng, rope.random_head(rng), rope.inverse_frequencies(rope.HEAD_DIM), size)
    largest = {}
    for way, (queries, keys, _) in ways.items():
        scores = [rope.score(queries[m], keys[m - distance]) for m in range(size)
                  if 0 <= m - distance < size]
        assert len(scores) == size - abs(distance)
        largest[way] = max(abs(score - scores[0]) for score in scores)
    sinusoids, learned, rotary = largest.values()
    assert rotary < 1e-11 and min(sinusoids, learned) > 0.1


def test_look_back_at_many_positions():
    found = rope.show_look_back(rope.inverse_frequencies(rope.HEAD_DIM), positions=range(5, 1000, 15))
    assert min(found["rotary"].values()) > 0.99
    for m, weight in found["learned table"].items():
        assert weight > 0.99 if m < 500 else weight < 1e-4


@given(SEEDS, HEAD_DIMS, st.integers(0, 65536), st.sampled_from([2.0, 8.0, 32.0]))
@some
def test_linear_scaling_is_an_interpolation_of_positions(seed, head_dim, position, factor):
    """A factor that is a power of two rounds nothing, so bit for bit."""
    x, _ = vectors(seed, head_dim)
    plain = rope.inverse_frequencies(head_dim)
    slow = rope.scale_linear(plain, factor)
    assert rope.apply_rope(x, position, slow) == rope.apply_rope(x, position / factor, plain)


def test_longest_wavelengths_approach_two_pi_times_base():
    for base in (1e4, 5e5):
        frequencies = rope.inverse_frequencies(128, base)
        wavelengths = [2 * math.pi / f for f in frequencies]
        assert wavelengths[0] == 2 * math.pi
        assert wavelengths[-1] == pytest.approx(2 * math.pi * base / base ** (2 / 128))


def test_sinusoids_are_those_of_the_paper():
    frequencies = rope.inverse_frequencies(8)
    for position in (0, 1, 17):
        angles = [position / 10000 ** (2 * i / 8) for i in range(4)]
        assert rope.sinusoid(position, frequencies) == pytest.approx(
            [*map(math.cos, angles), *map(math.sin, angles)])
