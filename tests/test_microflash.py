"""microflash: identities, the enforced memory, the closed forms, the bugs, errors, key figures."""
import random
from math import exp, inf, isnan, log
from operator import mul

import pytest
from hypothesis import given, settings, strategies as st

import microflash as mf

some = settings(deadline=None, max_examples=40)


def apart(a, b):
    """The largest distance of two matrices of one shape; infinite if there is a NaN."""
    distances = [abs(x - y) for rows in zip(a, b, strict=True) for x, y in zip(*rows, strict=True)]
    return inf if any(map(isnan, distances)) else max(distances)


def cube(seed, n_q, n_k, d):
    return mf.matrices(random.Random(seed), (n_q, d), (n_k, d), (n_k, d))


def plain_attention(q, k, v, causal=False):
    """The definition, row by row, over the keys a row sees; written for these tests."""
    out, lses = [], []
    for i, row in enumerate(q):
        seen = max(0, i + 1 + len(k) - len(q)) if causal else len(k)
        scores = [sum(x * y for x, y in zip(row, key)) / len(row) ** 0.5 for key in k[:seen]]
        if not scores:
            out.append([0.0] * len(row))
            lses.append(-inf)
            continue
        top = max(scores)
        total = sum(exp(s - top) for s in scores)
        out.append([sum(exp(s - top) * value[c] for s, value in zip(scores, v)) / total
                    for c in range(len(row))])
        lses.append(top + log(total))
    return out, lses


shapes = st.tuples(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
blocks = st.tuples(st.integers(1, 11), st.integers(1, 11))


@some
@given(shapes, blocks, st.booleans())
def test_tiled_is_standard_is_the_definition(shape, block, causal):
    q, k, v = cube(*shape)
    out, lse = plain_attention(q, k, v, causal)
    flash, flash_lse = mf.flash_attention(q, k, v, *block, causal)
    tiled = mf.standard_attention(q, k, v, causal, None, *block)
    assert apart(flash, out) < 1e-12
    assert apart(tiled, out) < 1e-12
    assert apart(mf.standard_attention(q, k, v, causal), out) < 1e-12
    assert flash_lse == pytest.approx(lse, abs=1e-12)


@some
@given(shapes, blocks, st.booleans())
def test_backward_is_the_autograds(shape, block, causal):
    q, k, v = cube(*shape)
    grad_out, = mf.matrices(random.Random(shape[0] + 1), (len(q), len(q[0])))
    expected, _ = mf.gradients(q, k, v, grad_out, causal)
    out, lse = mf.flash_attention(q, k, v, *block, causal)
    grads = mf.flash_attention_backward(q, k, v, out, lse, grad_out, *block, causal)
    for ours, theirs in zip(grads, expected):
        assert apart(ours, theirs) < 1e-11
    assert [len(x) for x in grads] == [len(q), len(k), len(v)]


@some
@given(shapes, blocks, st.data())
def test_any_partition_merges_to_the_whole(shape, block, data):
    q, k, v = cube(*shape)
    owner = [data.draw(st.integers(0, 3)) for _ in k]
    sets = [[j for j, o in enumerate(owner) if o == w] for w in sorted(set(owner))]
    parts = [mf.flash_attention(q, [k[j] for j in s], [v[j] for j in s], *block) for s in sets]
    parts = data.draw(st.permutations(parts))
    merged = parts[0]
    for part in parts[1:]:
        swapped = mf.merge_partials(*part, *merged)
        merged = mf.merge_partials(*merged, *part)
        assert swapped == merged                               # commutative, bit for bit
    out, lse = mf.flash_attention(q, k, v, *block)
    assert apart(merged[0], out) < 1e-12
    assert merged[1] == pytest.approx(lse, abs=1e-12)
    if len(parts) > 2:
        a, b, c = parts[:3]
        left = mf.merge_partials(*mf.merge_partials(*a, *b), *c)
        right = mf.merge_partials(*a, *mf.merge_partials(*b, *c))
        assert apart(left[0], right[0]) < 1e-12
        assert left[1] == pytest.approx(right[1], abs=1e-12)


def test_merging_with_a_part_that_saw_nothing_changes_nothing():
    part, nothing = ([[1.0, 2.0]], [0.5]), ([[0.0, 0.0]], [-inf])
    assert mf.merge_partials(*part, *nothing) == part == mf.merge_partials(*nothing, *part)
    assert mf.merge_partials(*nothing, *nothing) == nothing


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e8])
def test_no_overflow_whatever_the_logits(scale):
    q, k, v = cube(3, 5, 7, 4)
    q = [[x * scale for x in row] for row in q]
    out, lse = mf.flash_attention(q, k, v, 2, 3)
    assert apart(out, plain_attention(q, k, v)[0]) < 1e-9
    assert not any(map(isnan, lse))


@some
@given(st.lists(st.one_of(st.floats(-1000, 1000), st.just(-inf)), min_size=1, max_size=12),
       st.integers(1, 13))
def test_online_softmax_at_every_step(scores, block):
    values = [[float(j), 1.0] for j in range(len(scores))]
    state = [-inf, 0.0, 0.0, 0.0]
    for j in range(0, len(scores), block):
        state = mf.fold(state, scores[j:j + block], values[j:j + block])
        seen = scores[:j + block]
        lse, mean, one = mf.normalized(state)
        if max(seen) == -inf:
            assert (lse, mean, one) == (-inf, 0.0, 0.0)
        else:
            p = mf.softmax(seen)
            assert mean == pytest.approx(sum(j * x for j, x in enumerate(p)), abs=1e-9)
            assert one == pytest.approx(1.0)
            assert lse == pytest.approx(mf.cross_entropy(seen, 0) + seen[0] if seen[0] > -inf
                                        else max(seen) + log(sum(exp(s - max(seen)) for s in seen)))


# The memory ---------------------------------------------------------------------------------------
def flash_need(block_q, block_k, d): return block_q * (2 * d + 2 + block_k) + 2 * block_k * d
def standard_need(block_q, block_k, d): return block_q * (d + block_k) + block_k * d
def backward_need(block_k, block_q, d): return 4 * block_k * d + block_q * (3 * d + 2) + 2 * block_q * block_k


def moved_within(kernel, capacity):
    """kernel(memory) with exactly that much room -> what it moved; with one less it must raise."""
    memory = mf.FastMemory(capacity)
    kernel(memory)
    assert memory.tiles == []                                   # all evicted
    with pytest.raises(MemoryError, match=f"^{capacity} numbers do not fit {capacity - 1}$"):
        kernel(mf.FastMemory(capacity - 1))
    return memory.moved


@some
@given(shapes, blocks)
def test_traffic_and_room_are_the_formulas(shape, block):
    q, k, v = cube(*shape)
    n_q, n_k, d = len(q), len(k), len(q[0])
    block_q, block_k = min(block[0], n_q), min(block[1], n_k)
    out, lse = mf.flash_attention(q, k, v, block_q, block_k)
    assert moved_within(lambda memory: mf.flash_attention(q, k, v, block_q, block_k, memory=memory),
                        flash_need(block_q, block_k, d)) == mf.flash_traffic(n_q, n_k, d, block_q)
    assert moved_within(lambda memory: mf.standard_attention(q, k, v, False, memory, block_q, block_k),
                        max(standard_need(block_q, block_k, d), n_k)) \
        == mf.standard_traffic(n_q, n_k, d, block_q)
    assert moved_within(lambda memory: mf.flash_attention_backward(q, k, v, out, lse, out, block_q, block_k,
                                                                   memory=memory),
                        backward_need(block_k, block_q, d)) == mf.backward_traffic(n_q, n_k, d, block_k)


@some
@given(shapes, blocks)
def test_backward_multiplies_five_matrices_and_the_row_sums(shape, block):
    q, k, v = cube(*shape)
    out, lse = mf.flash_attention(q, k, v, *block)
    mf.COUNT.clear()
    mf.flash_attention_backward(q, k, v, out, lse, out, *block)
    assert mf.COUNT["multiply-adds"] == 5 * len(q) * len(k) * len(q[0]) + len(q) * len(q[0])


@some
@given(shapes, blocks)
def test_exactly_the_visible_tiles_are_computed(shape, block):
    q, k, v = cube(*shape)
    mf.COUNT.clear()
    mf.flash_attention(q, k, v, *block, True)
    computed = {key[1:]: n for key, n in mf.COUNT.items() if key[0] == "tile"}
    visible = {(i - i % block[0], j - j % block[1]) for i in range(len(q)) for j in range(len(k))
               if j <= i + len(k) - len(q)}
    assert computed == dict.fromkeys(visible, 1)


@some
@given(shapes, blocks)
def test_backward_skips_the_queries_before_a_tile_of_keys(shape, block):
    q, k, v = cube(*shape)
    (block_q, block_k), n_q, n_k, d, memory = block, len(q), len(k), len(q[0]), mf.FastMemory()
    out, lse = mf.flash_attention(q, k, v, *block, True)
    mf.flash_attention_backward(q, k, v, out, lse, q, *block, True, memory)
    rows = sum(min(block_q, n_q - i) for j in range(0, n_k, block_k) for i in range(0, n_q, block_q)
               if j <= min(i + block_q, n_q) - 1 + n_k - n_q)
    assert memory.moved == 2 * n_q * d + n_q + 4 * n_k * d + rows * (4 * d + 2)


def test_an_evicted_tile_is_empty_and_its_room_free():
    memory, rows = mf.FastMemory(6), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    outer = memory.hold([[0.0, 0.0]])
    seen = []
    for i, tile in memory.load(2, rows, first=1):
        assert (i, tile, memory.moved) == (1, rows[1:], 4)
        tile[0][0] = 9.0
        assert rows[1][0] == 3.0                                # a copy
        with pytest.raises(MemoryError, match="7 numbers do not fit 6"):
            memory.hold([[1.0]])
        stored = memory.store(tile)
        tile[0][0] = 7.0
        assert stored == [[9.0, 4.0], [5.0, 6.0]] and memory.moved == 8            # a copy as well
        seen.append(tile)
    assert seen == [[]] and memory.tiles == [outer] == [[[0.0, 0.0]]]
    memory.evict()
    assert outer == memory.tiles == []


def test_what_a_loops_body_holds_is_evicted_at_its_end():
    memory, held = mf.FastMemory(3), []
    for i, a, b in memory.load(1, [[1.0], [2.0]], [[3.0], [4.0]]):
        held.append(memory.hold([[a[0][0] + b[0][0]]]))
        assert held[i] == [[4.0 + 2 * i]]
        assert all(tile == [] for tile in held[:i])
    assert held == [[], []] and memory.moved == 4


def test_a_loaded_tile_that_does_not_fit():
    memory = mf.FastMemory(3)
    with pytest.raises(MemoryError, match="4 numbers do not fit 3"):
        next(memory.load(2, [[1.0, 2.0], [3.0, 4.0]]))


@given(st.integers(1, 64), st.integers(1, 64), st.integers(300, 100_000))
def test_the_blocks_are_the_largest(other, d, capacity):
    for block, need in ((mf.flash_block, flash_need), (mf.standard_block, standard_need),
                        (mf.backward_block, backward_need)):
        rows = block(capacity, d, other)
        assert need(rows, other, d) <= capacity < need(rows + 1, other, d)


# The exhibits -------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 2, 7, 42])
def test_bugs_show_their_symptom_and_the_correct_version_does_not(seed, measured):
    result = measured("microflash", seed)
    rows = {(row[0], row[1].split(",")[0]): row[2:] for row in result["bugs"]}
    assert all(float(right) < 1e-12 for (bug, _), (right, _) in rows.items() if bug != "no guard")
    assert float(rows["no rescaling", "error of out if scores rise"][1]) > 1e-3
    assert [pair for (bug, _), pair in rows.items() if bug == "no guard"] == [[0, 16], [0, 32]]
    assert float(rows["mean of parts", "error of out"][1]) > 1e-3
    assert all(result["checks"].values())


@pytest.mark.parametrize("order", [1, -1])
def test_no_rescaling_is_right_if_the_scores_fall(order):
    q, k, v = cube(5, 1, 9, 3)
    rising = sorted(range(9), key=lambda j: sum(map(mul, q[0], k[j])))[::order]
    q, k, v = q, [k[j] for j in rising], [v[j] for j in rising]
    out, _ = mf.flash_attention(q, k, v, 1, 1, fold=mf.fold_without_rescaling)
    truth = plain_attention(q, k, v)[0]
    mean = [[sum(column) / 9 for column in zip(*v)]]
    assert apart(out, truth if order == -1 else mean) < 1e-12
    assert apart(out, mean if order == -1 else truth) > 1e-3


def test_a_row_that_begins_with_hidden_keys_is_lost_without_the_guard():
    values, scores = [[float(j)] for j in range(4)], [-inf, -inf, 0.5, 1.0]
    for fold, lost in ((mf.fold, False), (mf.fold_without_guard, True)):
        state = fold(fold([-inf, 0.0, 0.0], scores[:2], values[:2]), scores[2:], values[2:])
        assert all(map(isnan, mf.normalized(state))) == any(map(isnan, mf.normalized(state))) == lost


def test_no_rescaling_keeps_the_old_sums():
    state = mf.fold_without_rescaling([0.0, 1.0, 5.0], [1.0], [[7.0]])
    assert state == [1.0, 2.0, 12.0]
    assert mf.fold([0.0, 1.0, 5.0], [1.0], [[7.0]]) == pytest.approx([1.0, 1 + exp(-1), 7 + 5 * exp(-1)])


def test_without_the_guard_only_hidden_rows_are_lost():
    state = [-inf, 0.0, 0.0]
    assert mf.fold(state, [-inf], [[3.0]]) == state
    assert all(map(isnan, mf.fold_without_guard(state, [-inf], [[3.0]])[1:]))
    assert mf.fold_without_guard(state, [2.0], [[3.0]]) == mf.fold(state, [2.0], [[3.0]])


def test_averaging_ignores_the_weights():
    a, b = ([[0.0]], [10.0]), ([[1.0]], [0.0])
    assert mf.merge_by_mean(*a, *b)[0] == [[0.5]]
    assert mf.merge_partials(*a, *b)[0][0][0] == pytest.approx(1 / (1 + exp(10.0)))


# Errors -------------------------------------------------------------------------------------------
Q, K = [[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("q, k, v, words", [
    ([], K, K, r"empty.*: \[0\]"), (Q, [], [], r"empty.*: \[0\]"), ([[]], [[]], [[]], r"empty.*: \[0\]"),
    (Q, [[1.0]], [[1.0]], r"\[1, 2\]"), (Q, K, [[1.0], [2.0]], r"\[1, 2\]"),
    (Q, [[1.0, 2.0], [3.0]], K, r"\[1, 2\]"), (Q, K, K[:1], r"unequal: \[1, 2\]"),
    (Q, K, [], r"unequal: \[0, 2\]")])
def test_matrices_that_do_not_fit(q, k, v, words):
    for call in (lambda: mf.standard_attention(q, k, v), lambda: mf.flash_attention(q, k, v, 1, 1),
                 lambda: mf.flash_attention_backward(q, k, v, q, [0.0] * len(q), q, 1, 1)):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("block_q, block_k", [(0, 1), (1, 0), (-3, 2)])
def test_blocks_below_one(block_q, block_k):
    for call in (lambda: mf.flash_attention(Q, K, K, block_q, block_k),
                 lambda: mf.flash_attention_backward(Q, K, K, Q, [0.0], Q, block_q, block_k),
                 lambda: mf.standard_attention(Q, K, K, False, None, block_q, block_k)):
        with pytest.raises(ValueError, match=r"tile of -?\d x -?\d"):
            call()


@pytest.mark.parametrize("out, lse, grad_out", [
    (K, [0.0], Q), (Q, [0.0, 1.0], Q), (Q, [], Q), (Q, [0.0], K), (Q, [0.0], [[1.0]]), ([], [0.0], Q)])
def test_backward_needs_the_forwards_results(out, lse, grad_out):
    with pytest.raises(ValueError, match=r"\d"):
        mf.flash_attention_backward(Q, K, K, out, lse, grad_out, 1, 1)


@pytest.mark.parametrize("parts", [
    (Q, [0.0], K, [0.0, 1.0]), (Q, [], Q, [0.0]), (Q, [0.0], Q, [0.0, 1.0]), ([], [], [], []),
    (Q, [0.0], [[1.0]], [0.0])])
def test_parts_that_do_not_fit(parts):
    with pytest.raises(ValueError, match=r"\d"):
        mf.merge_partials(*parts)


# Key figures --------------------------------------------------------------------------------------
def test_key_figures(measured):
    result = measured("microflash")
    gigabytes = result["real_world"]
    assert gigabytes["standard"] == pytest.approx(40.3, rel=0.06)      # the paper's figure 2
    assert gigabytes["flash"] == pytest.approx(4.4, rel=0.06)
    assert gigabytes["standard"] / gigabytes["flash"] == pytest.approx(40.3 / 4.4, rel=0.02)
    assert 0.5 < result["limit"]["crossing"] / 64 ** 2 < 1.0           # M near d²
    n, d = 1024, 64
    for m in range(result["limit"]["crossing"] + 100, 20_000, 97):      # and flash wins from there on
        standard, flash = (traffic(n, n, d, block(m, d, 2)) for _, block, traffic in mf.METHODS.values())
        assert flash < standard
    for row in result["limit"]["rows"]:
        assert row[4] == row[5] and row[7] == row[8]
    kept = {row[0]: row[2:4] for row in result["backward"] if row[1] == "no"}
    assert kept == {"8": [384, 264], "16": [1280, 528], "32": [4608, 1056]}


def test_same_seed_same_results(measured):
    import contextlib, io
    with contextlib.redirect_stdout(io.StringIO()):
        again = mf.main(seed=7)
    assert again == measured("microflash", 7)
