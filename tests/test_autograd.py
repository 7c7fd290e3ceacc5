"""Every operation of the autograd by finite differences, and the rules of the tape."""
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

import microkv as kv
from microkv import TAPE, Value

rows = st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 0.05), min_size=1, max_size=6)


def pick(vector):
    """A scalar that depends on every entry, each with a weight of its own."""
    return kv.dot(vector, [math.cos(i + 1.0) for i in range(len(vector))])


UNARY = {"+ number": lambda x: x + 1.5, "number +": lambda x: 1.5 + x, "* number": lambda x: x * -0.7,
         "number *": lambda x: -0.7 * x, "- number": lambda x: x - 0.3, "number -": lambda x: 0.3 - x,
         "/ number": lambda x: x / 1.7, "-": lambda x: -x, "** 2": lambda x: x ** 2,
         "** -1": lambda x: x ** -1.0, "** 0.5": lambda x: (x * x + 1.0) ** 0.5, "relu": kv.relu,
         "x + x": lambda x: x + x, "x * x": lambda x: x * x, "x / x²": lambda x: x / (x * x + 0.5)}
VECTOR = {"dot with itself": lambda v: kv.dot(v, v), "softmax": lambda v: pick(kv.softmax(v)),
          "dot with floats": lambda v: kv.dot([0.5] * len(v), v), "rmsnorm": lambda v: pick(kv.rmsnorm(v)),
          "floats with dot": lambda v: kv.dot(v, [0.5] * len(v)),
          "cross_entropy": lambda v: kv.cross_entropy(v, len(v) - 1),
          "linear, weight": lambda v: pick(kv.linear([[0.3] * len(v)], [v, v])[0]),
          "linear, input": lambda v: pick(kv.linear([v, v], [[0.3] * len(v)] * 2)[1]),
          "linear, both": lambda v: pick(kv.linear([v], [v, v[::-1]])[0]),
          "attend": lambda v: pick(kv.attend(v, [v, v[::-1]], [v[::-1], v], 1)),
          "pair sums": lambda v: pick(kv.add(v, v[::-1]))}


def assert_gradient(f, numbers):
    """backward() against a central difference, whose own error is bounded by h² and rounding / h."""
    leaves = [Value(x) for x in numbers]
    f(leaves).backward()
    assert TAPE == []
    h = 1e-5
    for i, leaf in enumerate(leaves):
        at = []
        for step in (h, -h):
            moved = [x + step * (i == j) for j, x in enumerate(numbers)]
            at.append(f(moved))                   # the same function, on floats: builds no graph
        assert TAPE == [] and type(at[0]) is float
        slope = (at[0] - at[1]) / (2 * h)
        assert leaf.grad == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("operation", UNARY)
@given(x=st.floats(-3, 3).filter(lambda x: abs(x) > 0.05))
@settings(deadline=None, max_examples=25)
def test_one_number(operation, x):
    assert_gradient(lambda v: UNARY[operation](v[0]), [x])


@pytest.mark.parametrize("operation", VECTOR)
@given(x=rows)
@settings(deadline=None, max_examples=25)
def test_a_vector(operation, x):
    assert_gradient(VECTOR[operation], x)


@given(x=st.floats(0.1, 3), y=st.floats(0.1, 3))
@settings(deadline=None)
def test_two_numbers(x, y):
    for f in (lambda v: v[0] + v[1], lambda v: v[0] * v[1], lambda v: v[0] - v[1], lambda v: v[0] / v[1]):
        assert_gradient(f, [x, y])


def test_a_whole_training_loss():
    """Every 29th weight of a two-layer GPT, by finite differences."""
    rng = random.Random(0)
    model = kv.GPT(7, rng, n_layers=2, d_model=6, n_heads=3, context=8)
    names = [[0, 3, 1, 6, 0], [0, 2, 0]]
    model.loss(names).backward()
    for p in model.parameters()[::29]:
        at, x, h = [], p.data, 1e-5
        for p.data in (x + h, x - h):
            at.append(model.frozen().loss(names))
        p.data = x
        assert p.grad == pytest.approx((at[0] - at[1]) / (2 * h), rel=1e-5, abs=1e-8)


def test_depth_has_no_limit():
    x = y = Value(1.0)
    for _ in range(100_000):
        y = y + 0.0
    y.backward()
    assert x.grad == 1.0


def test_a_dot_product_is_one_node():
    kv.dot([Value(1.0)] * 50, [Value(2.0)] * 50)
    assert len(TAPE) == 1 and len(TAPE[0].inputs) == 100
    TAPE.clear()


def test_gradients_accumulate_in_leaves():
    x = Value(3.0)
    (x * 2.0).backward()
    (x * x).backward()
    assert x.grad == 2.0 + 6.0


def test_a_graph_can_be_used_once():
    y = Value(3.0) * 2.0
    y.backward()
    with pytest.raises(ValueError, match="not on the tape"):
        y.backward()
    with pytest.raises(ValueError, match="not on the tape"):
        Value(1.0).backward()


def test_graphs_do_not_mix():
    """A second graph on the tape gets no gradient, and is refused afterwards instead of wrong."""
    x, z = Value(3.0), Value(5.0)
    first, abandoned = x * 2.0, z * z
    first.backward()
    assert (x.grad, z.grad) == (2.0, 0.0)
    with pytest.raises(ValueError):
        abandoned.backward()


def test_an_abandoned_graph_cannot_poison_the_next():
    """Infinite partials of what is not part of the loss are not multiplied by its zero gradient."""
    x = Value(1.0)
    Value(1.0, (x,), (float("inf"),))
    (x * 2.0).backward()
    assert x.grad == 2.0


def test_what_was_computed_before_is_a_constant():
    x = Value(3.0)
    y = x * 2.0
    (y * 1.0).backward()
    x.grad = 0.0
    (y * x).backward()
    assert x.grad == 6.0


def test_floats_pass_through():
    x = [1.0, 2.0]
    assert kv.floats(x) is x and kv.floats([Value(1.0), Value(2.0)]) == x
    assert kv.dot(x, x) == 5.0 and kv.relu(-1.0) == 0.0 and kv.relu(2.0) == 2.0
    assert TAPE == []


def test_multiply_adds_are_counted_where_they_happen():
    kv.COUNT.clear()
    kv.dot([1.0] * 7, [Value(1.0)] * 7)
    kv.linear([[1.0] * 3] * 5, [[Value(1.0)] * 3] * 2)
    assert dict(kv.COUNT) == {"multiply-adds": 7 + 5 * 2 * 3, "weights read": 6}
    TAPE.clear()


@pytest.mark.parametrize("logits", [[1000.0, -1000.0, 999.0], [-1e308, 0.0, 1e308], [0.0]])
def test_no_overflow(logits):
    p = kv.softmax(logits)
    assert sum(p) == pytest.approx(1.0) and all(0.0 <= x <= 1.0 for x in p)
    assert math.isfinite(kv.cross_entropy(logits, 0)) or logits[0] == -1e308
