"""microcheckpoint: equal gradients, counts equal to formulas, the optimum, the bugs."""
import gc
import math
import random
import sys
from functools import cache

import pytest
from hypothesis import given, strategies as st

import microcheckpoint as cp

CHOICES = st.one_of(st.sampled_from([("keep",), ("sqrt",), ("halve",), ("recompute",)]),
                    st.integers(1, 12).map(lambda k: ("every", k)),
                    st.integers(1, 8).map(lambda slots: ("revolve", None, slots)))


@given(st.integers(0, 10 ** 6), st.integers(1, 11), st.integers(1, 4), CHOICES, st.sampled_from([0.0, 0.3]))
def test_every_strategy_gives_the_same_bits(seed, n_layers, d_model, strategy, dropout):
    network = cp.random_network(n_layers, d_model, random.Random(seed))
    results, after = [], []
    for choice in (("keep",), strategy):
        rng = random.Random(seed)
        loss, grads, stats = cp.gradients(*network, *choice, dropout=dropout, rng=rng)
        results.append((loss, grads, stats["input_gradient"]))
        after.append(rng.random())       # the generator is left as if nothing had run twice
    assert results[0] == results[1] and after[0] == after[1]


def test_dropout_keeps_the_mean():
    network = cp.random_network(3, 4, random.Random(0))
    reversal = cp.Reversal(network[0], network[2], cp.cut_nowhere, 0.25, random.Random(0))
    numbers = [x for mask in reversal.draw(2000, 4) for x in mask]
    assert set(numbers) == {0.0, 1.0 / 0.75}
    # 8,000 draws: the mean's standard deviation is 0.0065; eight of them, far below one in a million.
    assert sum(numbers) / len(numbers) == pytest.approx(1.0, abs=8 * 0.0065)


@pytest.mark.parametrize("strategy", [("keep",), ("sqrt",), ("halve",), ("revolve", None, 4)])
def test_every_stored_activation_is_freed(strategy):
    layers, x, target = cp.random_network(20, 2, random.Random(0))
    cut, slots = cp.strategy_cut(strategy[0], 20, *strategy[1:])
    assert cp.Reversal(layers, target, cut).run(x, slots).stored == 1            # the input


@given(st.integers(0, 10 ** 6), st.integers(1, 6), st.integers(1, 3))
def test_gradients_by_finite_differences(seed, n_layers, d_model):
    layers, x, target = cp.random_network(n_layers, d_model, random.Random(seed))
    _, grads, stats = cp.gradients(layers, x, target, "sqrt")
    h = 1e-5
    at = []
    for step in (h, -h):
        layers[0][-1][0] += step
        at.append(cp.gradients(layers, x, target)[0])
        layers[0][-1][0] -= step
    assert grads[0][-1][0] == pytest.approx((at[0] - at[1]) / (2 * h), rel=1e-5, abs=1e-7)
    at = [cp.gradients(layers, [x[0] + step, *x[1:]], target)[0] for step in (h, -h)]
    assert stats["input_gradient"][0] == pytest.approx((at[0] - at[1]) / (2 * h), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 16, 30])
def test_counts_are_their_formulas(n):
    network = cp.random_network(n, 2, random.Random(n))
    strategies = [("keep",), ("sqrt",), ("recompute",), *(("every", k) for k in range(1, n + 2))]
    strategies += [("revolve", None, slots) for slots in range(1, n + 3)]
    if math.log2(n).is_integer():
        strategies.append(("halve",))
    for strategy in strategies:
        stats = cp.gradients(*network, *strategy)[2]
        assert (stats["peak"], stats["runs"]) == cp.expected(strategy[0], n, *strategy[1:]), strategy


def brute_force(n_layers, n_slots):
    """The fewest runs off the tape, by trying every schedule: a search over what is stored."""
    @cache
    def cost(stored, todo):
        # stored: positions held; the gradient of layer todo - 1 comes next, from position todo - 1.
        if todo == 0:
            return 0
        best = math.inf
        if todo - 1 in stored:           # put it on the tape; drop any of the rest for free
            rest = frozenset(s for s in stored if s < todo - 1) or frozenset([0])
            return cost(rest, todo - 1)
        for start in stored:
            if start >= todo - 1:
                continue
            # Run ahead from start to the layer; on the way, store any subset that fits.
            inner = range(start + 1, todo)
            for mask in range(1 << len(inner)):
                chosen = frozenset(s for bit, s in enumerate(inner) if mask >> bit & 1 and s < todo - 1)
                for kept in subsets(stored):
                    if 0 in kept and len(kept | chosen) <= n_slots:
                        best = min(best, todo - 1 - start + cost(kept | chosen, todo - 1))
                if len(inner) == 1:
                    break
        return best

    @cache
    def subsets(stored):
        items = sorted(stored)
        return [frozenset(s for bit, s in enumerate(items) if mask >> bit & 1)
                for mask in range(1 << len(items))]
    return cost(frozenset([0]), n_layers)


@pytest.mark.parametrize("n_slots", [1, 2, 3, 4])
@pytest.mark.parametrize("n_layers", range(1, 9))
def test_revolve_is_optimal(n_layers, n_slots):
    assert cp.revolve_cost(n_layers, n_slots) == brute_force(n_layers, n_slots)


@pytest.mark.parametrize("n_layers", range(9, 13))
def test_revolve_is_the_best_recursion(n_layers):
    """Up to 12 layers against the recursion without memory or shortcut."""
    def cost(n, c):
        if n == 1:
            return 0
        if c == 1:
            return n * (n - 1) // 2
        return min(m + cost(n - m, c - 1) + cost(m, c) for m in range(1, n))
    for n_slots in range(1, 6):
        assert cp.revolve_cost(n_layers, n_slots) == cost(n_layers, n_slots)


@given(st.integers(1, 90), st.integers(1, 30))
def test_closed_form(n_layers, n_slots):
    assert cp.revolve_cost(n_layers, n_slots) == cp.revolve_closed_form(n_layers, n_slots)


def test_binomial_reach():
    """binomial(c + r, c) layers need no layer run more than r times: one more layer, and one does."""
    for c in range(1, 6):
        for r in range(1, 5):
            n = math.comb(c + r, c)
            step = cp.revolve_closed_form(n + 1, c) - cp.revolve_closed_form(n, c)
            assert cp.revolve_closed_form(n, c) - cp.revolve_closed_form(n - 1, c) <= r < step


def test_gpt3_as_in_the_paper():
    """Korthikanti et al. 2022: 5as/h = 80 for GPT-3; full keeps 2sbh."""
    s, h, a = 2048, 12288, 96
    assert cp.activation_bytes(s, h, a) == s * h * (34 + 80)
    assert cp.activation_bytes(s, h, a, recompute="selective") == s * h * 34
    assert cp.activation_bytes(s, h, a, n_layers=96, batch=2, recompute="full") == 96 * 2 * 2 * s * h
    assert cp.extra_flops(s, h, "full") == pytest.approx(1 / 3) and cp.extra_flops(s, h, "none") == 0
    assert 3 * cp.extra_flops(s, h, "selective") == pytest.approx(0.027, abs=5e-4)


@pytest.mark.parametrize("seed", [42, 0, 1, 2])
def test_exhibits(seed, measured):
    correct, redrawn, detached = measured("microcheckpoint", seed)["bugs"].values()
    assert correct == (pytest.approx(1.0), pytest.approx(1.0), 0)
    assert redrawn[0] < 0.999 and redrawn[2] == 0
    assert detached[2] == 12 and detached[1] < 1.0


@pytest.mark.parametrize("seed", [42, 0])
def test_memory_is_what_it_is_called(seed, measured):
    """The counted order is the order in bytes, and the bytes' optimum is near its formula."""
    results = measured("microcheckpoint", seed)
    sizes = [row["bytes"] for row in results["strategies"].values()]
    keep, every_16th, sqrt_n, *least = sizes
    assert keep > 3 * every_16th > 4 * sqrt_n > 4 * 2 * max(least)
    best = results["best_k"]
    assert 0.5 <= best["bytes"] / best["bytes_formula"] <= 2.0
    assert list(results["held"].values()) == [16 * n + 1 for n in results["held"] for n in [int(n)]]


def test_bytes_hold_all_that_is_on_the_tape():
    """Objects that Python reuses included; up to a quarter more is for what is not on the tape."""
    layers, x, target = cp.random_network(16, 4, random.Random(0))
    weights = {id(w) for layer in layers for row in layer for w in row}
    y = x
    for weight in layers:
        y = cp.run_layer([list(map(cp.Value, row)) for row in weight], y, [1.0] * 4)
    cp.squared_error(y, target)
    parts = {id(part): part for node in cp.TAPE
             for part in (node, node.data, node.inputs, node.partials, *node.partials)}
    size = sum(sys.getsizeof(part) for key, part in parts.items() if key not in weights)
    size += sys.getsizeof(cp.TAPE)
    cp.TAPE.clear()
    assert size < cp.peak_bytes(layers, x, target, "keep") < 1.25 * size


def test_bytes_do_not_depend_on_the_collector_or_on_what_ran_before():
    """Python keeps some freed objects to reuse them, which tracemalloc does not see."""
    network = cp.random_network(16, 4, random.Random(0))
    def sizes():
        return [cp.peak_bytes(*network, strategy) for strategy in ("keep", "sqrt", "halve")]
    sizes()                              # what is only built once
    gc.collect()
    expected, threshold = sizes(), gc.get_threshold()
    freed = [[float(i), (i, i)] for i in range(3000)]
    del freed
    assert sizes() == pytest.approx(expected, rel=0.01)
    try:
        gc.set_threshold(3, 2, 2)
        assert sizes() == pytest.approx(expected, rel=0.01)
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled()
    gc.disable()
    try:
        assert sizes() == pytest.approx(expected, rel=0.01)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("arguments, message", [
    (([], [1.0], [1.0]), "0 layers"), (([[[1.0]]], [1.0, 2.0], [1.0]), "2 numbers"),
    (([[[1.0, 2.0]]], [1.0], [1.0]), "1 numbers"), (([[[1.0]]], [1.0], [1.0, 2.0]), "1 numbers"),
    (([[[1.0]]], [1.0], [1.0], "best"), "unknown strategy 'best'"),
    (([[[1.0]]], [1.0], [1.0], "every"), "k is None"), (([[[1.0]]], [1.0], [1.0], "every", 0), "k is 0"),
    (([[[1.0]]], [1.0], [1.0], "revolve"), "0 slots")])
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        cp.gradients(*arguments)


def test_refuses_nonsense_sizes():
    for bad in ((0, 1), (1, 0), (3, -1)):
        with pytest.raises(ValueError):
            cp.revolve_cost(*bad)
    with pytest.raises(ValueError, match="recompute is 'some'"):
        cp.activation_bytes(1, 1, 1, recompute="some")
    with pytest.raises(ValueError, match="dropout"):
        cp.gradients([[[1.0]]], [1.0], [1.0], dropout=1.0)
