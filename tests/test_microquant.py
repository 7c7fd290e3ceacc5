"""microquant: rounding, packing, block formats, integer products, outliers, GPTQ and the bugs."""
import math
import random
import re
import struct
import sys

import pytest
from hypothesis import assume, given, strategies as st

import microquant as mq

FLOATS = st.floats(-1e290, 1e290, allow_subnormal=True)
ROWS = st.lists(st.floats(-100.0, 100.0, width=32), min_size=1, max_size=40)


def matrix(rng, m, n, deviation=1.0):
    return [[rng.gauss(0.0, deviation) for _ in range(n)] for _ in range(m)]


@given(st.lists(FLOATS, min_size=1, max_size=30), st.integers(2, 16), st.booleans())
def test_quantize_is_off_by_half_a_step_at_most(values, bits, symmetric):
    codes, scale, zero_point = mq.quantize(values, bits, symmetric)
    low, high = -1 << bits - 1, (1 << bits - 1) - 1
    assert all(low + symmetric <= code <= high for code in codes)
    assert low <= zero_point <= high and (zero_point == 0 or not symmetric)
    for value, stored in zip(values, mq.dequantize(codes, scale, zero_point)):
        assert abs(value - stored) <= scale * (0.5 + 1e-9)
    assert mq.dequantize([zero_point], scale, zero_point) == [0.0]
    span = max(map(abs, values)) if symmetric else max(*values, 0.0) / 2 - min(*values, 0.0) / 2
    steps = high if symmetric else (high - low) / 2
    assert scale == pytest.approx(max(span / steps, sys.float_info.min))


def test_quantize_by_hand():
    assert mq.quantize([7.0, -3.4, 0.6, 0.5, 1.5], 4) == ([7, -3, 1, 0, 2], 1.0, 0)
    assert mq.quantize([-5.0, 10.0, 0.0, 2.4], 4, False) == ([-8, 7, -3, -1], 1.0, -3)
    assert mq.quantize([-1.5, 13.5], 4, False) == ([-8, 7], 1.0, -6)     # a tie at both ends


@pytest.mark.parametrize("row", [[0.0] * 5, [0.3], [-0.3] * 7, [5e-324, -3e-320],
                                 [1e-310] * 4, [0.0, 2.0]])
@pytest.mark.parametrize("symmetric", [True, False])
def test_edge_rows_are_exact_or_within_the_bound(row, symmetric):
    quantized = mq.quantize(row, 8, symmetric)
    stored = mq.dequantize(*quantized)
    assert all(abs(a - b) <= quantized[1] / 2 for a, b in zip(row, stored))
    if max(map(abs, row)) in (0.0, 0.3, 2.0):
        assert stored == pytest.approx(row, rel=1e-12)


@pytest.mark.parametrize("values, bits", [
    ([], 8), ([math.nan], 8), ([1.0, math.inf], 4), ([1.0, -math.inf], 4), ([1e300], 4),
    ([1.0], 1), ([1.0], 17), ([1.0], 0), ([1.0], -3)])
def test_quantize_refuses(values, bits):
    with pytest.raises(ValueError, match=r"\d"):
        mq.quantize(values, bits)


@given(st.sampled_from([2, 3, 4, 8]), st.data())
def test_pack_and_unpack(bits, data):
    half = 1 << bits - 1
    codes = data.draw(st.lists(st.integers(-half, half - 1), max_size=40))
    packed = mq.pack(codes, bits)
    assert len(packed) == -(-bits * len(codes) // 8)
    assert mq.unpack(packed, bits, len(codes)) == codes
    stream = "".join(format(code % (1 << bits), f"0{bits}b") for code in reversed(codes)) or "0"
    assert int(stream, 2) == int.from_bytes(packed, "little")


def test_pack_by_hand():
    assert mq.pack([1, -1, -8, 7], 4) == bytes([0xF1, 0x78])
    assert mq.pack([-128, 127], 8) == bytes([0x80, 0x7F])
    for codes, bits in (([8], 4), ([-9], 4), ([2], 2), ([1], 5), ([1], 0)):
        with pytest.raises(ValueError, match=r"\d"):
            mq.pack(codes, bits)
    for data, bits, n in ((b"1", 4, 3), (b"12", 4, 2), (b"1", 7, 1), (b"", 4, 1), (b"", 4, -2)):
        with pytest.raises(ValueError, match=r"\d"):
            mq.unpack(data, bits, n)


@given(ROWS, st.sampled_from([1.0, 1e-3, 1e3]))
def test_block_formats_keep_their_bounds(values, factor):
    row = [value * factor for value in (values * 32)[:32]]
    peak = max(map(abs, row))
    assume(peak == 0.0 or peak > 1e-36)
    q8, q4 = mq.encode_q8_0(row), mq.encode_q4_0(row)
    assert (len(q8), len(q4)) == (34, 18)
    scale8, scale4 = struct.unpack_from("<e", q8)[0], struct.unpack_from("<e", q4)[0]
    for data, decode, scale, steps, bits in (
            (q8, mq.decode_q8_0, scale8, 127, 0.5), (q4, mq.decode_q4_0, scale4, 8, 1.0)):
        slack = peak / 1000 + steps * 6e-8           # an fp16 scale: 11 bits, 6e-8 the smallest
        assert abs(abs(scale) - peak / steps) <= peak / steps / 1000 + 6e-8
        assert all(abs(a - b) <= bits * abs(scale) + slack for a, b in zip(row, decode(data)))


@pytest.mark.parametrize("encode", [mq.encode_q8_0, mq.encode_q4_0])
def test_blocks_refuse(encode):
    for row in ([], [1.0] * 31, [1.0] * 33, [math.nan] + [0.0] * 31, [0.0] * 31 + [math.nan],
                [math.inf] * 32,
                [1e39] * 32, [1e7] * 32, [1e-40] * 32):
        with pytest.raises(ValueError, match=r"\d"):
            encode(row)
    assert len(encode([0.0] * 64)) in (68, 36)
    for bad in (math.nan, math.inf, 1e39):
        with pytest.raises(ValueError, match="at byte (34|18): "):
            encode([1.0] * 32 + [bad] * 32)
    assert mq.encode_q8_0([1e-44] * 32) == bytes(34)             # the scale is 0 even in float32


@pytest.mark.parametrize("decode", [mq.decode_q8_0, mq.decode_q4_0])
def test_decoding_refuses_parts_of_blocks(decode):
    for data in (b"", b"x" * 17, b"x" * 35):
        with pytest.raises(ValueError, match=r"\d"):
            decode(data)


def tiny(seed):
    rng = random.Random(seed)
    model = mq.GPT(7, rng, d_model=8).frozen()
    names = [[0, *(rng.randrange(1, 7) for _ in range(4)), 0] for _ in range(5)]
    larger = {name: mq.scaled(m, [5.0] * len(m[0])) for name, m in model.weights.items()}
    return mq.with_weights(model, larger), names, rng


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_model_is_the_rounded_one(bits, symmetric, granularity):
    model, _, _ = tiny(bits)
    n_bytes, formula, small = mq.compress(model, bits, symmetric, granularity)
    assert n_bytes == formula or granularity == "group"      # of 4 weights here, not whole bytes
    total = 0
    for name, m in model.weights.items():
        flat, other = sum(m, []), sum(small.weights[name], [])
        size = {"tensor": len(flat), "channel": len(m[0]),
                "group": len(m[0]) // 2}[granularity]
        total += len(flat) // size * (2 + math.ceil((size if symmetric else size + 1) * bits / 8))
        for start in range(0, len(flat), size):
            run = flat[start:start + size]
            expected = mq.dequantize(*mq.quantize(run, bits, symmetric))
            assert other[start:start + size] == pytest.approx(expected, rel=1e-3)
        assert [len(row) for row in small.weights[name]] == [len(row) for row in m]
    assert n_bytes == total


def test_replaced_linear_is_undone_and_sees_every_input():
    model, names, _ = tiny(0)
    before, loss = mq.linear, model.loss(names)
    inputs = mq.layer_inputs(model, names)
    assert mq.linear is before and model.loss(names) == loss
    assert set(inputs) == set(model.weights) - {"token", "position"}
    assert {len(xs) for xs in inputs.values()} == {25}
    assert all(len(xs[0]) == len(model.weights[name][0]) for name, xs in inputs.items())
    normed = mq.rmsnorm(mq.add(model.weights["token"][names[1][0]], model.weights["position"][0]))
    assert inputs["query0"][5] == inputs["value0"][5] == normed          # of the second name
    assert all(min(x) >= 0.0 for x in inputs["down0"])                   # behind the relu
    with pytest.raises(IndexError):
        mq.layer_inputs(model, [[0, 99, 0]])
    assert mq.linear is before


def test_integer_product():
    rng = random.Random(1)
    for n, m, k in ((1, 1, 1), (3, 5, 7), (4, 2, 33)):
        xs, weight = matrix(rng, n, k), matrix(rng, m, k)
        shared = max(abs(x) for row in xs for x in row) / 127
        rounded = [[round(x / shared) * shared for x in row] for row in xs]
        expected = mq.matmul(rounded, mq.dequantize_rows(mq.quantize_rows(weight, 8)))
        int4 = mq.dequantize_rows(mq.quantize_rows(weight, 4))
        mq.COUNT.clear()
        assert mq.w4a16(xs, weight) == mq.matmul(xs, int4)
        assert mq.COUNT["multiply-adds"] == 2 * n * m * k and mq.COUNT["scalings"] == m * k
        mq.COUNT.clear()
        for row, other in zip(mq.w8a8(xs, weight), expected):
            assert row == pytest.approx(other, rel=1e-12, abs=1e-12)
        assert mq.COUNT["multiply-adds"] == n * m * k and mq.COUNT["scalings"] == n * m
        assert not mq.COUNT["overflows"]


def test_a_short_accumulator_wraps():
    """9 x 127 x 127 = 145,161 is 14,089 in 16 bits; 2 x 127 x 127 = 32,258 still fits."""
    mq.COUNT.clear()
    xs, weight = [[1.0] * 9, [1.0] * 2 + [0.0] * 7], [[1.0] * 9]
    wrapped, right = mq.w8a8(xs, weight, 16)
    assert wrapped == pytest.approx([14089 / 127 ** 2]) and right == pytest.approx([2.0])
    assert mq.COUNT["overflows"] == 1 and mq.w8a8(xs, weight)[0] == pytest.approx([9.0])
    assert mq.sum_in(16, weight, xs) == pytest.approx(
        ((9 - 14089 / 127 ** 2) / math.hypot(9, 2), 0.5), rel=1e-9)


def test_signed_is_twos_complement():
    for total in (0, 1, -1, 32767, -32768, 32768, -32769, 3 * 127 * 127, 70000, 2 ** 40 + 5):
        assert mq.signed(total, 16) == struct.unpack("<h", struct.pack("<q", total)[:2])[0]
    assert [mq.signed(number, 4) for number in (7, 8, 15, 16, -8)] == [7, -8, -1, 0, -8]
    assert mq.signed(2 ** 31 - 1, 32) == 2 ** 31 - 1


@pytest.mark.parametrize("seed", range(20))
def test_split_and_migration_are_exact(seed):
    rng = random.Random(seed)
    n, m, k = (rng.randint(1, 9) for _ in range(3))
    xs, weight = matrix(rng, n, k, 3.0), matrix(rng, m, k)
    exact = mq.matmul(xs, weight)
    for row, other in zip(mq.outlier_split(xs, weight, mq.matmul), exact):
        assert row == pytest.approx(other, rel=1e-12, abs=1e-12)
    smooth = mq.smoothing(xs, weight)
    assert all(math.frexp(factor)[0] == 0.5 for factor in smooth)
    assert mq.matmul(mq.scaled(xs, [1 / f for f in smooth]), mq.scaled(weight, smooth)) == exact
    for factor, x, w in zip(smooth, mq.largest(xs), mq.largest(weight)):
        assert 0.5 ** 0.5 - 1e-9 <= factor / math.sqrt(x / w) <= 2 ** 0.5 + 1e-9


def test_split_keeps_what_reaches_the_threshold_in_floats():
    seen = []
    def multiply(xs, weight):
        seen.extend(xs)
        return mq.matmul(xs, weight)
    xs = [[1.0, 6.0, 5.9], [2.0, 0.0, -3.0]]
    assert mq.outlier_split(xs, [[1.0, 1.0, 1.0]], multiply) == [[12.9], [-1.0]]
    assert seen == [[1.0, 0.0, 5.9], [2.0, 0.0, -3.0]]
    assert mq.outlier_split([[7.0]], [[2.0]], multiply) == [[14.0]] and seen[2:] == [[0.0]]
    assert mq.smoothing([[0.0, 4.0]], [[1.0, 1.0]]) == [1.0, 2.0]


@pytest.mark.parametrize("seed", range(10))
def test_cholesky(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    a = matrix(rng, n + 3, n)
    h = [[sum(row[i] * row[j] for row in a) for j in range(n)] for i in range(n)]
    columns = mq.cholesky([row[:] for row in h])
    assert [len(column) for column in columns] == list(range(1, n + 1))
    r = [[columns[j][i] if i <= j else 0.0 for j in range(n)] for i in range(n)]
    for i in range(n):
        product = [sum(a * b for a, b in zip(r[i], r[j])) for j in range(n)]
        assert h[i] == pytest.approx(product, abs=1e-9)


def squared_error(weight, quantized, xs):
    errors = [[a - b for a, b in zip(row, mq.dequantize(*q))] for row, q in zip(weight, quantized)]
    return sum(y * y for row in mq.matmul(xs, errors) for y in row)


def test_gptq_on_uncorrelated_inputs_is_rounding_to_nearest():
    rng = random.Random(0)
    weight = matrix(rng, 5, 8)
    eye = [[float(i == j) for j in range(8)] for i in range(8)]
    nearest = [mq.quantize(row, 3) for row in weight]
    assert mq.gptq(weight, eye, 3) == nearest
    assert mq.gptq(weight, [[0.0] * 8], 3) == nearest            # no information, no change


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_error_is_bounded_and_smaller(bits):
    rng = random.Random(bits)
    better = 0
    for _ in range(10):
        mix = matrix(rng, 12, 12)
        xs = mq.matmul(matrix(rng, 40, 12), mix)
        weight = matrix(rng, 6, 12)
        found, nearest = mq.gptq(weight, xs, bits), [mq.quantize(row, bits) for row in weight]
        assert [q[1:] for q in found] == [q[1:] for q in nearest]            # the same grid
        assert all(abs(code) < 1 << bits - 1 for codes, _, _ in found for code in codes)
        better += squared_error(weight, found, xs) < squared_error(weight, nearest, xs)
    assert better == 10


def test_gptq_helps_in_every_layer_of_a_trained_model(capsys):
    rng = random.Random(3)
    vocabulary, names, held_out = mq.tokenize(mq.NAMES.split(), rng)
    model, _ = mq.show_model(vocabulary, names, held_out, rng, n_steps=60)
    for name, xs in mq.layer_inputs(model, names[:16]).items():
        weight = model.weights[name]
        better, nearest = (mq.output_error(xs, weight, mq.dequantize_rows(rows)) for rows in
                           (mq.gptq(weight, xs, 3), mq.quantize_rows(weight, 3)))
        assert better < 0.95 * nearest, name


def test_gptq_refuses():
    for weight, inputs in (([], [[1.0]]), ([[1.0]], []), ([[1.0, 2.0]], [[1.0]]),
                           ([[1.0], [1.0, 2.0]], [[1.0]]),
                           ([[math.nan]], [[1.0]]), ([[]], [[]])):
        with pytest.raises(ValueError, match=r"\d"):
            mq.gptq(weight, inputs, 4)
    with pytest.raises(ValueError):
        mq.gptq([[1.0]], [[1.0]], 1)


def test_difference():
    assert mq.difference([[3.0, 4.0]], [[3.0, 4.5]]) == pytest.approx(0.1)
    assert mq.difference([[3.0], [4.0]], [[3.0], [4.5]]) == pytest.approx(0.1)


@pytest.mark.parametrize("seed", [42])
def test_key_figures(seed, measured):
    result = measured("microquant", seed)
    assert all(result["checks"].values())
    decibels = result["decibels"]
    for bits in range(5, 9):
        assert decibels[bits] - decibels[bits - 1] == pytest.approx(6.02, abs=1.0)
    loss, formats = result["loss"], result["formats"]
    assert loss < 2.8 and len(formats) == 24
    assert all(abs(after - loss) < 0.02 and kl < 1e-3 for (bits, *_), (after, kl, _) in formats.items()
               if bits == 8)
    assert abs(formats[4, "symmetric", "channel"][0] - loss) < 0.1
    assert formats[2, "symmetric", "tensor"][0] > loss + 0.1
    assert formats[4, "symmetric", "tensor"][2] == 4416 // 2 + 9 * 2
    assert formats[8, "asymmetric", "tensor"][2] == 4416 + 9 * 3
    assert formats[3, "asymmetric", "group"][2] == 4416 * 3 // 8 + 3 * 2 * 228        # 228 rows
    assert result["block_bits"] == {"Q8_0": 8.5, "Q4_0": 4.5}
    assert result["sizes"]["Llama-3-8B", "Q4_0"] == pytest.approx(4.517e9, rel=1e-3)
    assert result["sizes"]["Llama-3.1-70B", "FP16"] == 141.2e9
    assert result["sizes"]["Llama-3.1-405B", "INT3/128"] == pytest.approx(405e9 * 3.125 / 8)


@pytest.mark.parametrize("seed", [42])
def test_divergence_rises_as_bits_go_and_as_more_weights_share_a_scale(seed, measured):
    kl = {key: row[1] for key, row in measured("microquant", seed)["formats"].items()}
    for kind in ("symmetric", "asymmetric"):
        for per in ("tensor", "channel", "group"):
            assert kl[8, kind, per] < kl[4, kind, per] < kl[3, kind, per] < kl[2, kind, per]
        for bits in (4, 3, 2):
            assert kl[bits, kind, "channel"] < kl[bits, kind, "tensor"]


def test_judge():
    """The loss is the model's; the divergence is 0 for itself, and else the excess of the loss if
    the full model's predictions say how often each letter comes."""
    model, names, rng = tiny(5)
    truth = mq.predictions(model, names)
    assert len(truth) == 25 and all(sum(row) == pytest.approx(1.0) for row in truth)
    assert mq.judge(model, names, truth) == (pytest.approx(model.loss(names)), 0.0)
    _, _, rounded = mq.compress(model, 2)
    loss, kl = mq.judge(rounded, names, truth)
    assert loss == pytest.approx(rounded.loss(names))
    excess = 0.0
    for name in names:
        for end in range(1, len(name)):
            p, q = (m.run(name[:end], mq.KVCache(1))[-1] for m in (model, rounded))
            excess += sum(chance * (mq.cross_entropy(q, i) - mq.cross_entropy(p, i))
                          for i, chance in enumerate(mq.softmax(p)))
    assert kl == pytest.approx(excess / 25) and kl > 0.01


@pytest.mark.parametrize("seed", [42])
def test_outlier_collapses_int8_and_both_ways_bring_it_back(seed, measured):
    clean, collapsed, split, smooth = measured("microquant", seed)["outliers"].values()
    assert clean < 0.02 and collapsed > 5 * clean
    assert split < 1.5 * clean and smooth < 3 * clean


@pytest.mark.parametrize("seed", [42])
def test_gptq_figures(seed, measured):
    result = measured("microquant", seed)
    rounding = result["rounding"]
    losses = {loss for _, _, loss, _ in rounding.values()}
    assert len(losses) == 6 and result["loss"] not in losses
    assert all(abs(loss - result["loss"]) < 0.2 for loss in losses)
    for bits in (4, 3, 2):
        seen, unseen, _, kl = rounding[bits, "nearest"]
        gptq_seen, gptq_unseen, _, gptq_kl = rounding[bits, "gptq"]
        assert gptq_seen < 0.8 * seen and gptq_unseen < 0.85 * unseen and gptq_kl < 0.6 * kl
        assert gptq_unseen > gptq_seen


@pytest.mark.parametrize("seed", [42])
def test_exhibits(seed, measured):
    sign, int16, share, scale, leak, constant = measured("microquant", seed)["bugs"].values()
    assert sign[0] > 1.0 and sign[1] < 0.1
    assert int16[0] > 0.1 and int16[1] < 0.02 and 0.005 < share[0] < 0.5 and share[1] == 0.0
    assert scale[0] > 0.9 and scale[1] < 0.05
    assert leak[0] < 0.95 * leak[1]              # the test error, the test data known
    assert constant == (0.0, pytest.approx(0.3 / 255))


def test_bugs_by_hand():
    assert mq.lose_signs([[7.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(
        [16 / math.hypot(7, 1), 0.0])            # -1 is stored as 15
    assert mq.share_of_zeros([1.0, 0.003, -0.005, 0.0]) == 0.5
    assert mq.leave_out_zero([0.25, 0.5]) == (0.25 / 255, 0.5 / 255)
    rng = random.Random(0)
    up, test, others = matrix(rng, 6, 8), matrix(rng, 5, 8), matrix(rng, 9, 8)
    leaked, honest = mq.calibrate_on_test(up, others, test)
    assert leaked < honest
    for error, xs in ((leaked, test), (honest, others[:5])):
        assert error == mq.output_error(test, up, mq.dequantize_rows(mq.gptq(up, xs, 3)))


def test_stored_weights_are_codes_times_a_scale_of_16_bits():
    model = mq.GPT(5, random.Random(1), d_model=4).frozen()
    _, _, small = mq.compress(model, 8, granularity="tensor")
    for matrix in small.weights.values():
        scale = max(abs(x) for row in matrix for x in row) / 127
        assert struct.unpack("<e", struct.pack("<e", scale))[0] == pytest.approx(scale, rel=1e-12)


def test_rounding_errors_spread_evenly_over_a_step(first_run):
    """Four bars of 500 on average; one a fifth off is five standard deviations away."""
    bars = re.findall(r"^  [+-]0\.\d\d to [+-]0\.\d\d █* ?(\d+)$", first_run("microquant").out, re.M)
    assert len(bars) == 4 and all(400 < int(count) < 600 for count in bars)
    assert sum(map(int, bars)) == 2000


def test_real_models_fit_or_not(first_run):
    rows = dict(re.findall(r"^  (Llama.+? in \S+) +[\d.]+ +[\d.]+ +(\S.*\S)$", first_run("microquant").out,
                           re.M))
    cells = {name: re.split(r" {2,}", row) for name, row in rows.items()}
    assert len(cells) == 15
    assert cells["Llama-3-8B in FP16"] == ["63", "209"]          # 1008 and 3350 GB/s over 16.06 GB
    assert cells["Llama-3.1-70B in Q8_0"] == ["(4 needed)", "45"]
    assert cells["Llama-3.1-70B in Q4_0"] == ["(2 needed)", "84"]
    assert cells["Llama-3.1-405B in FP16"] == ["(34 needed)", "(11 needed)"]


def test_the_outlier_is_planted_and_smoothed_by_calibration_data(monkeypatch, capsys):
    """In the inputs for calibration the planted column reaches 60, whatever it has in the others."""
    rng, seen = random.Random(5), []
    up, inputs, unseen = ([[rng.gauss(0, 1) for _ in range(4)] for _ in range(n)] for n in (8, 9, 7))
    monkeypatch.setattr(mq, "smoothing", lambda xs, weight, smooth=mq.smoothing:
                        seen.append(xs) or smooth(xs, weight))
    mq.show_outliers(up, inputs, unseen, rng)
    column, factor = map(float, re.search(r"input (\d+) multiplied by ([\d.]+):",
                                          capsys.readouterr().out).groups())
    assert factor == pytest.approx(60 / mq.largest(inputs)[int(column)], abs=0.06)
    assert mq.largest(seen[0])[int(column)] == pytest.approx(60.0)
