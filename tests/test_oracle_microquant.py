"""microquant's codes against gguf (byte for byte), PyTorch's fake quantization, published GPTQ."""
import random

import pytest

np = pytest.importorskip("numpy")

import microquant as mq


def block_rows(rng):
    """Rows of 1 to 4 float32 blocks: Gaussian, uniform, on ties, spiky, constant, zero."""
    n = 32 * rng.randint(1, 4)
    size = 10.0 ** rng.uniform(-8, 4)
    kind = rng.randrange(7)
    row = {0: lambda: [rng.gauss(0.0, size) for _ in range(n)],
           1: lambda: [rng.uniform(-size, size) for _ in range(n)],
           2: lambda: [rng.randint(-16, 16) / 2.0 for _ in range(n)],              # ties in Q4_0
           3: lambda: [rng.randint(-254, 254) / 2.0 for _ in range(n)],            # and in Q8_0
           4: lambda: [rng.choice([-1, 1]) * size * 10.0 ** rng.uniform(-6, 0) for _ in range(n)],
           5: lambda: [rng.choice([size, -size]) for _ in range(n)],
           6: lambda: [rng.choice([0.0, -0.0, size]) for _ in range(n)]}[kind]()
    if kind == 3:
        row[0] = 127.0
    return np.array(row, dtype=np.float32)


EDGES = [[0.0] * 32, [-0.0] * 32, [1.0] * 32, [-1.0] * 32, [1.0, -1.0] * 16, [-1.0, 1.0] * 16,
         [5e5] + [1.0] * 31,
         [1e-6] * 32, [3e-6, -1e-6] * 16, [1e-30] * 32, [1e-36, -1e-36] * 16, [0.0] * 31 + [-8.0]]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_block_formats_byte_for_byte(name):
    quants, constants = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf")
    kind = constants.GGMLQuantizationType[name]
    encode, decode = {"Q8_0": (mq.encode_q8_0, mq.decode_q8_0),
                      "Q4_0": (mq.encode_q4_0, mq.decode_q4_0)}[name]
    rng = random.Random(name)
    rows = [np.array(row, dtype=np.float32) for row in EDGES]
    rows += [block_rows(rng) for _ in range(900)]
    assert sum(len(row) for row in rows) // 32 >= 2000
    for row in rows:
        expected = quants.quantize(row, kind)
        data = encode([float(x) for x in row])
        assert data == expected.tobytes()
        assert decode(data) == [float(x) for x in quants.dequantize(expected, kind)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(50))
def test_fake_quantize_per_channel(seed, symmetric):
    torch = pytest.importorskip("torch")
    rng = random.Random(seed)
    bits, m, n = rng.choice([2, 3, 4, 8]), rng.randint(1, 6), rng.choice([1, 2, 7, 33])
    # On a grid of scale 2^-k torch's float32 arithmetic is exact too, ties included.
    unit, high = 2.0 ** -rng.randint(0, 8), (1 << bits - 1) - 1
    weight = []
    for _ in range(m):
        top = unit * (high if symmetric else 2 * high + 1)
        least, most = (-4 * high, 4 * high) if symmetric else (0, 8 * high + 4)
        row = [rng.randint(least, most) * unit / 4.0 for _ in range(n)] + [top]
        row += [-top] if symmetric else [0.0]
        low = 0 if symmetric else rng.randint(0, 2 * high + 1)
        row = [x - low * unit for x in row]
        if not symmetric:
            row = [min(max(x, -low * unit), top - low * unit) for x in row]
        weight.append(row)
    quantized = [mq.quantize(row, bits, symmetric) for row in weight]
    assert {scale for _, scale, _ in quantized} == {unit}
    zero_points = [zero_point for _, _, zero_point in quantized]
    expected = torch.fake_quantize_per_channel_affine(
        torch.tensor(weight), torch.full((m,), unit),
        torch.tensor(zero_points, dtype=torch.int32), 0,
        -high - (not symmetric), high)
    for (codes, scale, zero_point), row in zip(quantized, expected.tolist()):
        assert mq.dequantize(codes, scale, zero_point) == row


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(50))
def test_fake_quantize_of_random_rows(seed, symmetric):
    """Any scale: float32 may put a value next to a tie on the other side, so those are left out."""
    torch = pytest.importorskip("torch")
    rng = random.Random(seed)
    bits, n = rng.choice([2, 3, 4, 8]), rng.choice([1, 5, 64])
    row = [rng.gauss(rng.choice([0.0, 2.0]), 1.0) for _ in range(n)]
    codes, scale, zero_point = mq.quantize(row, bits, symmetric)
    high = (1 << bits - 1) - 1
    expected = torch.fake_quantize_per_channel_affine(
        torch.tensor([row]), torch.tensor([scale]),
        torch.tensor([zero_point], dtype=torch.int32), 0,
        -high - (not symmetric), high)[0].tolist()
    for value, stored, other in zip(row, mq.dequantize(codes, scale, zero_point), expected):
        if abs(abs(value / scale) % 1.0 - 0.5) > 1e-4:
            assert stored == pytest.approx(other, rel=1e-5, abs=1e-7)


def published_gptq(weight, inputs, bits):
    """Frantar et al. 2022, algorithm 1, blocks of one column: the inverse, then its Cholesky."""
    w, x = np.array(weight), np.array(inputs)
    h = x.T @ x
    h += np.eye(len(h)) * 0.01 * np.mean(np.diag(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    scale = np.abs(w).max(axis=1) / ((1 << bits - 1) - 1)
    high, codes = (1 << bits - 1) - 1, np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -high, high)
        error = (w[:, j] - codes[:, j] * scale) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes.astype(int).tolist()


@pytest.mark.parametrize("seed", range(60))
def test_gptq_as_published(seed):
    rng = random.Random(seed)
    m, n, k = rng.choice([1, 2, 5]), rng.choice([1, 2, 3, 8, 17]), rng.choice([1, 4, 40])
    mix = [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(n)]
    inputs = mq.matmul([[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(k)], mix)
    weight = [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(m)]
    bits = rng.choice([2, 3, 4, 8])
    found = mq.gptq(weight, inputs, bits)
    assert [codes for codes, _, _ in found] == published_gptq(weight, inputs, bits)


@pytest.mark.parametrize("seed", range(10))
def test_loss_and_divergence(seed):
    torch = pytest.importorskip("torch")
    rng = random.Random(seed)
    vocab_size, names = rng.randint(2, 9), []
    for _ in range(rng.randint(1, 5)):
        names.append([0, *(rng.randrange(vocab_size) for _ in range(rng.randint(0, 6))), 0])
    full, other = (mq.GPT(vocab_size, rng, d_model=4).frozen() for _ in range(2))
    for model in full, other:
        for rows in model.weights.values():
            rows[:] = mq.scaled(rows, [9.0] * len(rows[0]))
    p, q = (torch.tensor([row for name in names for row in model.run(name[:-1], mq.KVCache(1))],
                         dtype=torch.float64) for model in (full, other))
    letters = torch.tensor([letter for name in names for letter in name[1:]])
    loss = torch.nn.functional.cross_entropy(q, letters).item()
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True,
                                    reduction="batchmean").item()
    found = mq.judge(other, names, mq.predictions(full, names))
    assert found == pytest.approx((loss, kl), rel=1e-9, abs=1e-12)
