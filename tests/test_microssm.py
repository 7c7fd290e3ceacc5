"""microssm: discretisation, the programs, the block, the dual form, training and the bugs."""
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

import microssm as ssm

SEEDS = st.integers(0, 10 ** 6)
quick = settings(deadline=None, max_examples=25)


def matrix(rng, rows, columns, low=-2.0, high=2.0):
    return [[rng.uniform(low, high) for _ in range(columns)] for _ in range(rows)]


def scan_arguments(rng, n, d_inner, d_state):
    """u, delta, A, B, C, D as selective_scan wants them, floats."""
    return (matrix(rng, n, d_inner), matrix(rng, n, d_inner, 0.01, 2.0),
            matrix(rng, d_inner, d_state, -3.0, -0.1), matrix(rng, n, d_state),
            matrix(rng, n, d_state), matrix(rng, 1, d_inner)[0])


def by_hand(u, delta, A, B, C, D):
    """The definition with nothing but loops."""
    ys = []
    for t in range(len(u)):
        ys.append([D[i] * u[t][i] for i in range(len(D))])
        for i in range(len(D)):
            for n in range(len(A[0])):
                ys[t][i] += sum(C[t][n] * math.prod(math.exp(delta[r][i] * A[i][n])
                                                    for r in range(s + 1, t + 1))
                                * delta[s][i] * B[s][n] * u[s][i] for s in range(t + 1))
    return ys


def close(a, b, tolerance=1e-10):
    return ssm.gap(a, b) < tolerance


def by_trees(u, delta, A, B, C, D):
    """A tree for each number of the state."""
    ys = [[d * x for d, x in zip(D, row)] for row in u]
    for i in range(len(D)):
        for j in range(len(A[0])):
            pairs = [(math.exp(delta[t][i] * A[i][j]), delta[t][i] * B[t][j] * u[t][i])
                     for t in range(len(u))]
            for t, h in enumerate(ssm.associative_scan(pairs)):
                ys[t][i] += C[t][j] * h
    return ys


@given(SEEDS, st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
@quick
def test_scans_are_the_definition(seed, n, d_inner, d_state):
    arguments = scan_arguments(random.Random(seed), n, d_inner, d_state)
    expected = by_hand(*arguments)
    assert close(ssm.selective_scan(*arguments), expected)
    assert close(by_trees(*arguments), expected)


@given(SEEDS, st.integers(2, 12), st.integers(1, 11))
@quick
def test_a_scan_goes_on_where_it_stopped(seed, n, cut):
    rng, cut = random.Random(seed), min(cut, n - 1)
    u, delta, A, B, C, D = scan_arguments(rng, n, 3, 2)
    state = [[0.0] * 2 for _ in range(3)]
    y = ssm.selective_scan(u[:cut], delta[:cut], A, B[:cut], C[:cut], D, state)
    y += ssm.selective_scan(u[cut:], delta[cut:], A, B[cut:], C[cut:], D, state)
    assert y == ssm.selective_scan(u, delta, A, B, C, D)


@given(st.floats(-1.2, 1.2), st.lists(st.floats(-10, 10), min_size=1, max_size=40))
@quick
def test_convolution_is_the_constant_recurrence(a, inflows):
    pairs = [(a, b) for b in inflows]
    expected = ssm.recurrence(pairs)
    ssm.COUNT.clear()
    n = len(pairs)
    assert ssm.convolution(pairs) == pytest.approx(expected, rel=1e-9, abs=1e-8)
    assert ssm.COUNT["multiply-adds"] == n + n * (n + 1) // 2 and ssm.COUNT["steps in a row"] == 1


@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-10, 10)), min_size=1, max_size=40))
@quick
def test_associative_scan_is_the_loop(pairs):
    h, expected = 0.0, []
    for a, b in pairs:
        h = a * h + b
        expected.append(h)
    assert ssm.recurrence(pairs) == expected
    ssm.COUNT.clear()
    assert ssm.associative_scan(pairs) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    size = 1 << (len(pairs) - 1).bit_length()
    assert ssm.COUNT["multiply-adds"] == 4 * (size - 1)
    assert ssm.COUNT["steps in a row"] == 2 * int(math.log2(size))
    assert ssm.COUNT["numbers held"] == 2 * (2 * size - 1)


def test_associative_scan_takes_values():
    a, b = ([ssm.Value(x) for x in row] for row in ([0.5, -2.0, 3.0], [1.0, 4.0, 5.0]))
    h = ssm.associative_scan(list(zip(a, b)))
    assert [x.data for x in h] == [1.0, 2.0, 11.0]
    h[2].backward()                      # h3 = a3 (a2 b1 + b2) + b3
    assert [x.grad for x in a] == [0.0, 3.0, 2.0] and [x.grad for x in b] == [-6.0, 3.0, 1.0]


@pytest.mark.parametrize("method, a_bar, b_bar", [
    ("euler", 0.4, 0.6), ("bilinear", 0.7 / 1.3, 0.6 / 1.3),
    ("zoh", math.exp(-0.6), (1 - math.exp(-0.6)) / 2 * 2)])
def test_discretize_by_hand(method, a_bar, b_bar):
    assert ssm.discretize(-2.0, 2.0, 0.3, method) == pytest.approx((a_bar, b_bar), rel=1e-12)


@given(st.floats(-50, -1e-3), st.floats(-3, 3), st.floats(1e-3, 5), st.integers(1, 4))
@quick
def test_discretize_is_consistent(a, b, delta, n):
    """ZOH: n small steps are one large step. All agree for small steps. ā of a stable system."""
    small, large = ssm.discretize(a, b, delta / n, "zoh"), ssm.discretize(a, b, delta, "zoh")
    h = 0.0
    for _ in range(n):
        h = small[0] * h + small[1]
    assert h == pytest.approx(large[1], rel=1e-9, abs=1e-12)
    assert 0.0 <= large[0] < 1.0 and abs(ssm.discretize(a, b, delta, "bilinear")[0]) < 1.0
    tiny = [ssm.discretize(a, b, 1e-9, method) for method in ("euler", "bilinear", "zoh")]
    for a_bar, b_bar in tiny:
        assert a_bar == pytest.approx(1.0 + 1e-9 * a, rel=1e-13)
        assert b_bar == pytest.approx(1e-9 * b, rel=1e-6)


def test_discretize_with_nothing_to_decay():
    for method in ("euler", "bilinear", "zoh"):
        assert ssm.discretize(0.0, 3.0, 0.5, method) == (1.0, 1.5)


@given(SEEDS)
@quick
def test_fused_nodes_have_the_slope_of_the_function(seed):
    rng = random.Random(seed)
    point = [rng.uniform(-2, 2), rng.uniform(0.01, 2), -rng.uniform(0.1, 2), *matrix(rng, 1, 2)[0]]
    functions = [(ssm.state_update, point), *((f, [rng.uniform(-4, 4)]) for f in
                                              (ssm.softplus, ssm.silu, ssm.negative_exp))]
    for function, x in functions:
        leaves = list(map(ssm.Value, x))
        y = function(*leaves)
        assert len(ssm.TAPE) == 1 + (function is ssm.silu) and y.data == function(*x)
        y.backward()
        for i, leaf in enumerate(leaves):
            low, high = (function(*x[:i], x[i] + h, *x[i + 1:]) for h in (-1e-5, 1e-5))
            assert leaf.grad == pytest.approx((high - low) / 2e-5, rel=1e-6, abs=1e-7)


def test_pointwise_functions_do_not_overflow():
    assert ssm.softplus(800.0) == 800.0 and 0.0 <= ssm.softplus(-700.0) < 1e-300
    assert ssm.silu(800.0) == 800.0 and ssm.silu(-800.0) == pytest.approx(0.0)
    assert ssm.softplus(0.0) == pytest.approx(math.log(2)) and ssm.silu(1.0) == pytest.approx(
        1 / (1 + math.exp(-1)))


@given(SEEDS, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
       st.integers(1, 10))
@quick
def test_ssd_is_the_scan_in_any_chunks(seed, n, n_heads, head_dim, d_state, chunk_size):
    rng = random.Random(seed)
    x = [matrix(rng, n_heads, head_dim) for _ in range(n)]
    delta, A = matrix(rng, n, n_heads, 0.01, 1.0), matrix(rng, 1, n_heads, -2.0, -0.1)[0]
    B, C = matrix(rng, n, d_state), matrix(rng, n, d_state)
    wide = [[step for step in row for _ in range(head_dim)] for row in delta]
    expected = ssm.selective_scan([sum(heads, []) for heads in x], wide, [
        [a] * d_state for a in A for _ in range(head_dim)], B, C, [0.0] * n_heads * head_dim)
    for size in (None, chunk_size):
        y = ssm.ssd(x, delta, A, B, C, size)
        assert [list(map(len, heads)) for heads in y] == [[head_dim] * n_heads] * n
        assert close([sum(heads, []) for heads in y], expected)


@given(SEEDS, st.integers(1, 4), st.integers(2, 10))
@quick
def test_mamba_block_streams_and_is_causal(seed, d_conv, n):
    rng = random.Random(seed)
    w = ssm.mamba_weights(rng, 3, 5, 2, d_conv)
    xs = matrix(rng, n, 3)
    whole, state, cut = ssm.mamba_block(xs, w), [], rng.randrange(1, n)
    parts = ssm.mamba_block(xs[:cut], w, state) + ssm.mamba_block(xs[cut:], w, state)
    assert parts == whole
    window, h = state
    assert list(map(len, window)) == [5] * (d_conv - 1) and list(map(len, h)) == [2] * 5
    changed = xs[:-1] + [[9.0, 9.0, 9.0]]
    assert ssm.mamba_block(changed, w)[:-1] == whole[:-1]
    assert ssm.mamba_block(changed, w)[-1] != whole[-1]


def test_selection_is_what_the_weights_say():
    rng = random.Random(3)
    w, u = ssm.s6_weights(rng, 3, 2), matrix(rng, 4, 3)
    delta, B, C = ssm.select(u, w)
    assert all(len({tuple(row) for row in part}) == 4 for part in (delta, B, C))
    raw = sum(a * b for a, b in zip(w["W_delta"][1], u[2])) + w["delta_bias"][0][1]
    assert delta[2][1] == pytest.approx(math.log1p(math.exp(raw)))
    assert B[2][1] == pytest.approx(sum(a * b for a, b in zip(w["W_B"][1], u[2])))
    assert min(map(min, delta)) > 0.0 > max(map(max, ssm.decay_rates(w)))
    assert ssm.decay_rates(w)[0] == pytest.approx([-1.0, -2.0])
    steps = [math.log1p(math.exp(bias)) for bias in w["delta_bias"][0]]
    assert all(0.1 <= step <= 1.0 for step in steps)


def test_weights_become_values_and_floats_again():
    w = ssm.s6_weights(random.Random(4), 3, 2, extra=(5, 3))
    values = ssm.trainable(w)
    assert all(type(x) is ssm.Value for m in values.values() for row in m for x in row)
    assert ssm.frozen(values) == w and [len(w["extra"]), len(w["extra"][0])] == [5, 3]


@pytest.mark.parametrize("selective", [True, False])
def test_answers_are_those_of_the_layer_token_by_token(selective):
    """answer() computes delta, B and C once for each kind of token: the same numbers."""
    w = ssm.s6_weights(random.Random(5), 8, 4, token=(7, 8), logits=(4, 8))
    tokens, data = [4, 2, 4, 0, 5, 6], (2, 0)
    u = [w["token"][token] for token in tokens]
    delta, B, C = ssm.select(u if selective else [[1.0] * 8] * 6, w)
    ys = ssm.selective_scan(u, delta, ssm.decay_rates(w), B, C, w["D"][0])
    (first, one), (second, other) = ssm.answer(w, [(tokens, data)], selective)
    assert [first, second] == ssm.linear(ys[-2:], w["logits"]) and (one, other) == data


def test_accuracy_counts_the_largest_logit(monkeypatch):
    results = [([1.0, -9.0], 0), ([2.0, 3.0], 0), ([5.0, 4.0], 0), ([0.0, 1.0], 1)]
    monkeypatch.setattr(ssm, "answer", lambda *arguments, **options: results)
    assert ssm.accuracy({}, []) == (0.75, 9.0)


@pytest.mark.parametrize("n_steps", [2, 3, 8])
def test_copying_task(n_steps):
    sequences = list(ssm.copying_sequences(n_steps))
    assert len(sequences) == len({tuple(t) for t, _ in sequences}) == math.comb(n_steps, 2) * 16
    for tokens, data in sequences:
        assert len(tokens) == n_steps + 2 and tokens[-2:] == [5, 6]
        assert tuple(t for t in tokens[:-2] if t != 4) == data and set(data) <= {0, 1, 2, 3}


def test_refuses_what_does_not_fit():
    good = scan_arguments(random.Random(0), 4, 3, 2)
    for i in range(6):
        bad = list(good)
        bad[i] = bad[i][:-1]
        with pytest.raises(ValueError, match=r"\d"):
            ssm.selective_scan(*bad)
        if i < 5:
            bad[i] = [row[:-1] for row in good[i]]
            with pytest.raises(ValueError):
                ssm.selective_scan(*bad)
            bad[i] = [good[i][0] + [1.0], *good[i][1:]]                      # ragged
            with pytest.raises(ValueError):
                ssm.selective_scan(*bad)
    with pytest.raises(ValueError):
        ssm.selective_scan([], [], [], [], [], [])
    for state in ([[0.0] * 2] * 2, [[0.0]] * 3, []):
        with pytest.raises(ValueError, match="state"):
            ssm.selective_scan(*good, state)
    with pytest.raises(ValueError, match="0 pairs"):
        ssm.associative_scan([])
    for delta, method in ((0.0, "zoh"), (-0.5, "euler"), (math.nan, "zoh"), (0.5, "ZOH")):
        with pytest.raises(ValueError, match=f"{delta}.*{method}"):
            ssm.discretize(-1.0, 1.0, delta, method)
    x, delta, B = [[[1.0, 2.0]]] * 3, [[0.1]] * 3, [[1.0, 2.0]] * 3
    assert len(ssm.ssd(x, delta, [-1.0], B, B)) == 3
    for bad in ((x[:2], delta, [-1.0], B, B), (x, delta[:2], [-1.0], B, B), (x, delta, [-1.0] * 2, B, B),
                (x, delta, [-1.0], B[:2], B), (x, delta, [-1.0], B, [[1.0]] * 3), ([], [], [], [], []),
                (x[:2] + [[[1.0]]], delta, [-1.0], B, B), (x, delta, [-1.0], B, B, 0),
                (x, delta, [-1.0], B, B, -2)):
        with pytest.raises(ValueError, match=r"\d"):
            ssm.ssd(*bad)


@pytest.mark.parametrize("seed", [42])
def test_key_figures(seed, measured):
    results = measured("microssm", seed)
    assert all(results["checks"].values())
    assert results["orders"] == pytest.approx([1.0, 2.0], abs=0.1)
    accuracies = results["accuracies"]
    assert accuracies["S6"][0] > 0.95 and accuracies["S6"][1] > 0.9          # and twice as long
    assert 0.5 < accuracies["LTI"][0] < 0.8 and accuracies["LTI"][1] < 0.75
    mamba, attention = results["costs"]
    assert len(set(mamba)) == 1 and attention[-1][1] == 128 * attention[0][1] > mamba[0][1]
    chunks = list(results["chunks"].values())
    assert chunks == sorted(chunks) and chunks[-1] > 3 * chunks[0]
    assert [counted[0] for counted in results["programs"].values()] == [250, 1, 16]
    lti, s6 = results["kernels"]
    assert lti < 1e-12 and s6 > 1e-3


@pytest.mark.parametrize("seed", [42])
def test_exhibits(seed, measured):
    bugs = measured("microssm", seed)["bugs"]
    right, logit = bugs["none"]
    assert right > 0.95 and logit < 1e4
    for name in ("A positive", "Δ without softplus", "A by Euler"):
        assert bugs[name][0] < 0.6 and bugs[name][1] > 10 * logit, name      # wrong, and exploding
    assert bugs["state never reset"][0] < right
    causal, ahead = bugs["slopes"]
    assert causal[4:] == [0.0] * 4 and min(causal[:4]) > 0.0
    assert min(ahead[4:7]) > 0.0 == ahead[7]


def test_real_world(measured):
    """Figures that follow by hand: 64 layers of 5120 channels; 32 layers of 2560 keys and values."""
    state, per_token, told_apart = measured("microssm", 42)["sizes"]
    assert state == 64 * 5120 * (16 + 3) * 2
    assert per_token == 32 * 2 * 2560 * 2
    assert told_apart == {16: 16, 256: 256, 4096: 256}


def test_step_cost_by_hand():
    """d_model 1, d_inner 1, d_state 1, d_conv 1: in 2, conv 1, Δ B C 3, scan 4 + 2, out 1."""
    assert ssm.mamba_step_cost(1, 1, 1, 1) == (13, 2)
    assert ssm.mamba_step_cost(2, 4, 3, 5)[1] == 2 * 4 * (4 + 3)


def test_fresh_sequences_are_half_of_all(measured):
    fresh = measured("microssm", 42)["fresh"]
    every = list(ssm.copying_sequences(8))
    assert len(fresh) == len(every) // 2 == len({tuple(t) for t, _ in fresh})
    assert all(sequence in every for sequence in fresh)


def test_both_layers_train_on_the_same_and_on_none_that_is_asked_later(monkeypatch):
    """The same sequences, from the same weights, and no sequence that is among the fresh ones."""
    seen, begins, answer = {True: [], False: []}, {}, ssm.answer

    def spy(w, samples, selective=True, **bug):
        if type(w["token"][0][0]) is ssm.Value:
            seen[selective] += [tuple(tokens) for tokens, _ in samples]
            begins.setdefault(selective, ssm.frozen(w))
        return answer(w, samples, selective, **bug)
    monkeypatch.setattr(ssm, "answer", spy)
    monkeypatch.setattr(ssm, "train", lambda weights, loss, steps, rate: [loss(i) for i in range(4)])
    _, fresh, _ = ssm.show_copying(random.Random(1))
    ssm.TAPE.clear()
    assert len(seen[True]) == 24 and seen[True] == seen[False]
    assert begins[True] == begins[False]
    assert not set(seen[True]) & {tuple(tokens) for tokens, _ in fresh}


def test_a_decay_near_zero_is_held_without_loss_of_digits():
    for a in (-1e-12, -1e-9, 1e-9):
        assert ssm.discretize(a, 2.0, 0.5, "zoh")[1] == pytest.approx(1.0 + 0.25 * a, rel=1e-14)
