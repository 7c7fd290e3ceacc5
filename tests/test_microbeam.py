"""microbeam: filters, searches, speculation and its bugs."""
import itertools
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

import microbeam as mb

WEIGHTS = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 10 ** 6)


def distribution(weights):
    return [w / sum(weights) for w in weights]


def random_distribution(rng, n, zeros=False):
    weights = [rng.expovariate(1.0) for _ in range(n)]
    if zeros:
        weights = [w if rng.random() < 0.6 else 0.0 for w in weights]
        weights[rng.randrange(n)] = 1.0
    return distribution(weights)


@given(WEIGHTS, st.integers(1, 12), st.floats(0, 1))
def test_filters_keep_proportions_and_the_top(weights, k, share):
    p = distribution(weights)
    for new in (mb.top_k(p, k), mb.top_p(p, share), mb.min_p(p, share)):
        assert len(new) == len(p) and sum(new) == pytest.approx(1.0, abs=1e-12)
        scale = max(new) / max(p)
        assert scale >= 1.0 - 1e-12
        least_kept = min(a for a, x in zip(p, new) if x)
        for a, x in zip(p, new):
            assert x == 0.0 or x == pytest.approx(a * scale, abs=1e-12)
            assert a < least_kept or x > 0.0                      # a floor: ties stay together


@given(WEIGHTS, st.floats(0, 1))
def test_top_p_is_the_smallest_set(weights, share):
    p = distribution(weights)
    kept = [a for a, x in zip(p, mb.top_p(p, share)) if x]
    assert sum(kept) >= share - 1e-9
    assert sum(a for a in kept if a > min(kept)) < share + 1e-9


def test_filters_by_hand():
    p = [0.1, 0.4, 0.2, 0.3, 0.0]
    assert mb.top_k(p, 1) == [0, 1, 0, 0, 0]
    assert mb.top_k(p, 2) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert mb.top_k(p, 99) == pytest.approx(p)
    assert mb.top_p(p, 0.0) == [0, 1, 0, 0, 0] and mb.top_p(p, 1.0) == pytest.approx(p)
    assert mb.top_p(p, 0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert mb.top_p(p, 0.9) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9, 0])   # 0.4 + 0.3 + 0.2 < 0.9
    assert mb.min_p(p, 0.0) == pytest.approx(p) and mb.min_p(p, 1.0) == [0, 1, 0, 0, 0]
    assert mb.min_p(p, 0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    tied = [0.25, 0.25, 0.25, 0.25]
    assert mb.top_k(tied, 2) == mb.top_p(tied, 0.1) == mb.min_p(tied, 1.0) == tied
    tail = [1.0 - 1e-17, 1e-17]
    assert all(mb.top_p(tail, 1.0))


def test_temperature():
    assert mb.apply_temperature([1.0, 3.0, 3.0, -math.inf], 0.0) == [0.0, 0.5, 0.5, 0.0]
    assert mb.apply_temperature([0.0, math.log(3)], 1.0) == pytest.approx([0.25, 0.75])
    assert mb.apply_temperature([0.0, math.log(3)], 0.5) == pytest.approx([0.1, 0.9])
    assert mb.apply_temperature([1.0, 2.0], 1e-310) == [0.0, 1.0]
    assert mb.apply_temperature([1e308, -1e308], 1e9) == [1.0, 0.0]


@pytest.mark.parametrize("call, value", [
    (lambda: mb.apply_temperature([1.0], -0.5), "-0.5"), (lambda: mb.apply_temperature([], 1.0), r"\[\]"),
    (lambda: mb.apply_temperature([1.0], math.nan), "nan"),
    (lambda: mb.apply_temperature([-math.inf], 1.0), "-inf"),
    (lambda: mb.top_k([1.0], 0), "0"), (lambda: mb.top_k([1.0], 1.5), "1.5"),
    (lambda: mb.top_p([1.0], 1.1), "1.1"), (lambda: mb.top_p([1.0], -0.1), "-0.1"),
    (lambda: mb.min_p([1.0], 2.0), "2.0"), (lambda: mb.min_p([1.0], math.nan), "nan"),
    (lambda: mb.top_k([], 1), "0 tokens"), (lambda: mb.top_p([0.5, 0.6], 0.5), "0.6"),
    (lambda: mb.min_p([1.5, -0.5], 0.5), "-0.5"), (lambda: mb.top_k([math.nan, 1.0], 1), "nan"),
    (lambda: mb.speculative_distribution([1.0], [0.5, 0.5]), "1 tokens"),
    (lambda: mb.speculative_step([[1.0]], [[1.0]], [0], random.Random(0)), "1 tokens, 1 rows"),
    (lambda: mb.speculative_step([[0.5, 0.5]] * 2, [[1.0, 0.0]], [1], random.Random(0)), "token 1"),
    (lambda: mb.speculative_step([[0.5, 0.5]] * 2, [[1.0, 0.0]], [-2], random.Random(0)), "token -2"),
    (lambda: mb.expected_tokens(1.5, 2), "1.5"), (lambda: mb.expected_tokens(0.5, -1), "-1"),
    (lambda: mb.expected_tokens(0.5, 1.5), "1.5"),
    (lambda: mb.beam_search(lambda x: [0.0], [], 0, 1, 1), r"\[\]"),
    (lambda: mb.beam_search(lambda x: [0.0], [0], 0, 0, 1), "width 0"),
    (lambda: mb.beam_search(lambda x: [0.0], [0], 0, 1, 0), "length 0"),
    (lambda: mb.beam_search(lambda x: [0.0], [0], 5, 1, 1), "eos 5"),
    (lambda: mb.exact_search(lambda x: [0.3], [0], 0, 1), "0.3"),
    (lambda: mb.exact_search(lambda x: [0.0], [0], 0, 0), "max_len 0"),
    (lambda: mb.exact_search(lambda x: [-math.inf, 0.0], [0], 0, 3), "at most 3")])
def test_bad_arguments_are_named(call, value):
    with pytest.raises(ValueError, match=value):
        call()


def table_step(seed, vocab_size, zeros=False):
    """A random language model: a distribution per prefix, remembered."""
    rows, rng = {}, random.Random(seed)

    def step(prefix):
        assert isinstance(prefix, list)
        if tuple(prefix) not in rows:
            p = random_distribution(rng, vocab_size, zeros)
            rows[tuple(prefix)] = [math.log(x) if x else -math.inf for x in p]
        return rows[tuple(prefix)]
    return step


@pytest.mark.parametrize("seed", range(30))
def test_a_wide_beam_is_exact_and_a_beam_of_one_is_greedy(seed):
    vocab_size, max_len = 2 + seed % 4, 1 + seed % 5
    step = table_step(seed, vocab_size)
    best = mb.exact_search(step, [1, 1], 0, max_len)
    wide = mb.beam_search(step, [1, 1], 0, vocab_size ** max_len, max_len)
    assert wide[0] == (best[0], pytest.approx(best[1]))
    assert len(wide) == sum((vocab_size - 1) ** n for n in range(max_len))      # all that can end
    for tokens, score in wide:
        assert tokens.index(0) == len(tokens) - 1 <= max_len - 1
        assert score == pytest.approx(sum(step([1, 1, *tokens[:i]])[t] for i, t in enumerate(tokens)))
    assert [score for _, score in wide] == sorted((score for _, score in wide), reverse=True)
    greedy = []
    while len(greedy) < max_len and 0 not in greedy:
        row = step([1, 1, *greedy])
        greedy.append(row.index(max(row)))
    narrow = mb.beam_search(step, [1, 1], 0, 1, max_len)
    assert len(narrow) <= 1
    if greedy[-1] == 0:
        assert narrow[0][0] == greedy


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_early_stop_loses_nothing_and_order_is_by_penalty(seed, penalty):
    """A full-width beam ranks all that can end; a narrow one finds what it would without stopping."""
    step = table_step(seed, 3)
    ends = [tokens + (0,) for n in range(5) for tokens in itertools.product((1, 2), repeat=n)]
    def value(tokens):
        score = sum(step([1, *tokens[:i]])[t] for i, t in enumerate(tokens))
        return score / ((5 + len(tokens)) / 6) ** penalty
    expected = sorted(ends, key=value, reverse=True)
    full = mb.beam_search(step, [1], 0, 60, 5, penalty)
    assert [tuple(tokens) for tokens, _ in full] == expected
    def total(tokens):
        return sum(step([1, *tokens[:i]])[t] for i, t in enumerate(tokens))
    for width in (1, 2, 3):
        live, finished = [()], []
        for _ in range(5):
            children = sorted(((*x, t) for x in live for t in range(3)), key=total, reverse=True)
            finished += [x for x in children[:width] if x[-1] == 0]
            live = [x for x in children if x[-1] != 0][:width]
        found = mb.beam_search(step, [1], 0, width, 5, penalty)
        assert [tuple(tokens) for tokens, _ in found] == sorted(finished, key=value, reverse=True)[:width]


@given(SEEDS, st.integers(1, 8), st.booleans())
@settings(deadline=None, max_examples=100)
def test_speculation_is_exact_for_any_pair(seed, n, zeros):
    rng = random.Random(seed)
    p, q = (random_distribution(rng, n, zeros) for _ in "pq")
    assert mb.speculative_distribution(p, q) == pytest.approx(p, abs=1e-12)
    accepted, _ = mb.outcomes(p, q, q, mb.residual(p, q))
    assert sum(accepted) == pytest.approx(sum(map(min, p, q)), abs=1e-12)
    assert mb.total_variation(p, q) == pytest.approx(1.0 - sum(map(min, p, q)), abs=1e-12)


@given(SEEDS, st.integers(0, 4))
@settings(deadline=None, max_examples=25)
def test_sequences_are_exact(seed, gamma):
    rows, rng = {}, random.Random(seed)

    def of(model):
        return lambda prefix: rows.setdefault((model, prefix), random_distribution(rng, 3, True))
    p_of = of("p")
    found = mb.sequence_distribution(p_of, of("q"), gamma, 3)
    assert sum(found.values()) == pytest.approx(1.0)
    for (a, b, c), chance in found.items():
        assert chance == pytest.approx(p_of(())[a] * p_of((a,))[b] * p_of((a, b))[c], abs=1e-12)


@pytest.mark.parametrize("gamma", range(4))
def test_the_enumeration_drafts_gamma_tokens_a_round(gamma, monkeypatch):
    """A sampler that redraws from p gives 3/8 where it tests a draft, and the right 1/2 elsewhere."""
    monkeypatch.setattr(mb, "residual", lambda p, q: p)
    found = mb.sequence_distribution(lambda text: [0.5, 0.5], lambda text: [0.25, 0.75], gamma, 3)
    accepted, redrawn = [0.25, 0.5], [0.125, 0.125]

    def chance(text, n=0):               # n drafts accepted in this round
        if not text:
            return 1.0
        if n == gamma:
            return 0.5 * chance(text[1:])
        return accepted[text[0]] * chance(text[1:], n + 1) + redrawn[text[0]] * chance(text[1:])
    assert found == {text: pytest.approx(chance(text)) for text in itertools.product((0, 1), repeat=3)}


def test_speculative_step_draws_what_the_enumeration_says():
    """First token and number accepted, 20,000 times; limits at six standard deviations."""
    p_rows = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]
    q_rows, rng, n = [[0.2, 0.2, 0.6], [0.4, 0.4, 0.2]], random.Random(3), 20_000
    first, both, last = [0, 0, 0], 0, [0, 0, 0]
    for _ in range(n):
        drafted = [mb.draw(q, rng) for q in q_rows]
        accepted, token = mb.speculative_step(p_rows, q_rows, drafted, rng)
        assert accepted == drafted[:len(accepted)]
        first[(accepted + [token])[0]] += 1
        if len(accepted) == 2:
            both += 1
            last[token] += 1
    for count, p in zip(first, p_rows[0]):
        assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p))
    chance = 0.6 * 0.4                   # the products of Σ min(p, q)
    assert abs(both - n * chance) < 6 * math.sqrt(n * chance * (1 - chance))
    for count, p in zip(last, p_rows[2]):
        assert abs(count - both * p) < 6 * math.sqrt(both * p * (1 - p))


def test_expected_tokens_and_published_speedups():
    assert mb.expected_tokens(0.5, 2) == 1.75 and mb.expected_tokens(1.0, 4) == 5.0
    assert mb.expected_tokens(0.0, 3) == 1.0 == mb.expected_tokens(0.7, 0)
    assert round(mb.speedup(0.75, 7, 0.02), 1) == 3.2                # Leviathan et al.: 3.2 expected
    assert round(mb.speedup(0.82, 7, 0.11), 1) == 2.5
    assert mb.speedup(0.3, 1, 0.5) < 1.0 < mb.speedup(0.6, 1, 0.5)   # a gain needs alpha > c


def greedy(logits):
    return mb.apply_temperature(logits, 0.0)


def models(seed):
    rng = random.Random(seed)
    pair = [mb.GPT(5, rng, n_layers, d_model) for n_layers, d_model in ((2, 8), (1, 4))]
    for p in pair[0].parameters() + pair[1].parameters():
        p.data *= 6.0
    return [model.frozen() for model in pair], rng


@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_speculating_on_caches_sees_what_one_by_one_sees(seed, gamma):
    (target, draft), rng = models(seed)
    tree = mb.PrefixTree(target)
    for _ in range(4):
        tokens, rows, rounds = mb.speculate(target, draft, gamma, mb.softmax, rng, (0, 3))
        assert rows == [mb.softmax(tree.logits((0, 3, *tokens[:i]))) for i in range(len(tokens))]
        assert 0 not in tokens[:-1] and len(rounds) >= len(tokens) / (gamma + 1)
    plain, fast = (mb.speculate(target, draft, n, greedy, rng)[0] for n in (0, gamma))
    assert plain == fast


def test_without_rollback_the_rows_are_wrong():
    wrong = 0
    for seed in range(6):
        (target, draft), rng = models(seed)
        tree = mb.PrefixTree(target)
        tokens, rows, _ = mb.speculate(target, draft, 3, mb.softmax, rng, truncate=False)
        wrong += rows != [mb.softmax(tree.logits((0, *tokens[:i]))) for i in range(len(tokens))]
    assert wrong >= 3


@pytest.mark.parametrize("seed", range(4))
def test_the_draft_reads_this_text_and_is_filtered_too(seed):
    """Else it guesses worse, and only the cost tells: Σ min(p, q) is not that of both models run afresh."""
    def choose(logits):
        return mb.top_k(mb.softmax(logits), 2)
    (target, draft), rng = models(seed)
    trees = [mb.PrefixTree(model) for model in (target, draft)]
    for _ in range(10):
        tokens, _, rounds = mb.speculate(target, draft, 3, choose, rng)
        assert 0 in tokens or len(tokens) >= mb.MAX_LEN
        start = 0
        for n_accepted, chances in rounds:
            for i, chance in enumerate(chances):
                if start + i <= len(tokens):                     # what follows the end was cut off
                    p, q = (choose(tree.logits((0, *tokens[:start + i]))) for tree in trees)
                    assert chance == pytest.approx(sum(map(min, p, q)), abs=1e-12)
            start += n_accepted + 1


def test_prefix_tree_is_the_model():
    (target, _), _ = models(1)
    tree = mb.PrefixTree(target)
    whole = target.run([0, 2, 3, 1], mb.KVCache(2))
    for i in (3, 1, 2, 0):
        assert tree.logits([0, 2, 3, 1][:i + 1]) == whole[i]
    expected = [math.log(x) for x in mb.softmax(whole[0])]
    assert tree.log_probs([0]) == pytest.approx(expected)
    assert tree.score([2, 3]) == pytest.approx(
        math.log(mb.softmax(whole[0])[2]) + math.log(mb.softmax(whole[1])[3]))


@pytest.mark.parametrize("seed", [42, 0])
def test_key_figures(seed, measured):
    results = measured("microbeam", seed)
    assert all(results["checks"].values())
    losses = list(results["losses"].values())
    assert max(losses[1:]) < losses[0] - 0.4
    search, quality, bugs = results["search"], results["quality"], results["bugs"]
    assert sum(search["errors"][16, 0.0]) <= sum(search["errors"][1, 0.0])
    assert quality["temperature", 0.0][0] > quality["temperature", 0.4][0] > quality["temperature", 1.5][0]
    assert quality["temperature", 0.0][1] == pytest.approx(1 / 150)
    for gamma, (alpha, per_pass, formula) in results["speculation"].items():
        assert per_pass == pytest.approx(formula, rel=0.1) and 1.0 <= per_pass <= gamma + 1
        assert gamma == 0 or 0.6 < alpha < 1.0
    assert max(bugs["caches rolled back"]) == 0.0
    assert min(map(min, (bugs["redraws from p, not the residual"], bugs["top-p, q rescaled after the test"]))) >= 0.0
    assert sum(bugs["scores"][0]) > sum(bugs["scores"][1]) + 0.1      # raw sums: a worse text is chosen
    assert max(bugs["drafts greedily, tests by p/q"]) > 0.1 and max(bugs["caches not rolled back"]) > 0.01
    assert results["losing_batch"][0.9] > results["losing_batch"][0.6] > 1


def test_no_position_is_run_twice_by_plain_decoding():
    (target, draft), rng = models(2)
    mb.COUNT.clear()
    tokens, _, _ = mb.speculate(target, draft, 0, mb.softmax, rng)
    work = mb.COUNT.pop("multiply-adds")
    target.run([0, *tokens[:-1]], mb.KVCache(2))
    assert mb.COUNT["multiply-adds"] == work


def test_a_text_that_goes_on_may_win_only_at_its_full_length():
    """Ending at once costs 1, going on 1.3: more, but less per length when it ends as token 10."""
    def step(prefix):
        if len(prefix) == 1:
            return [-1.0, -1.3, -math.inf]
        return [0.0, -math.inf, -math.inf] if len(prefix) == 10 else [-math.inf, 0.0, -math.inf]
    assert mb.beam_search(step, [1], 0, 1, 10, 1.0) == [([1] * 9 + [0], -1.3)]
    assert mb.beam_search(step, [1], 0, 1, 10) == [([0], -1.0)]


def test_samples_end_at_the_limit():
    class Endless:
        def logits(self, prefix):
            return [-1e9, 0.0]
    assert mb.sample(Endless(), mb.softmax, random.Random(0)) == [1] * mb.MAX_LEN


def test_memorised_names_are_noticed(measured):
    assert any(row[2] > 0.0 for row in measured("microbeam")["quality"].values())


def test_the_chi_square_notices_a_sampler_that_writes_the_draft(monkeypatch):
    names = [[0, 1, 2, 0], [0, 2, 1, 0]]
    target, draft = (mb.PrefixTree(mb.GPT(6, random.Random(seed), d_model=4).frozen())
                     for seed in (1, 2))
    for tree, k in ((target, 1), (draft, 2)):
        tree.logits = lambda prefix, k=k: [float(i == k) for i in range(6)]

    def wrong_step(p_rows, q_rows, drafted, rng):
        return list(drafted), mb.draw(q_rows[-1], rng)

    for step, holds in ((mb.speculative_step, True), (wrong_step, False)):
        monkeypatch.setattr(mb, "speculative_step", step)
        mb.CHECKS.clear()
        mb.show_exactness(target, draft, names, random.Random(3))
        assert [ok for claim, ok, _ in mb.CHECKS if "chi-square" in claim] == [holds]


def test_the_chi_square_of_six_tokens_has_five_degrees_of_freedom():
    tree = mb.PrefixTree(mb.GPT(6, random.Random(1), d_model=4).frozen())
    mb.CHECKS.clear()
    mb.show_exactness(tree, tree, [[0, 1, 0]], random.Random(3), n=60)
    numbers = next(numbers for claim, _, numbers in mb.CHECKS if "chi-square" in claim)
    assert float(numbers.split("<")[1]) == pytest.approx(5 + 2 * math.sqrt(5 * 14) + 28, abs=0.06)


def test_the_roofline_by_hand():
    """A large model alone waits for memory: weights, and a key and a value of 1,024 tokens."""
    peak, bandwidth = 8 * 989e12, 8 * 3.35e12
    cache, attention = 2 * 2 * 80 * 1024 * 1024, 4 * 80 * 8192 * 1024
    assert mb.pass_seconds("target", 1, 1) == pytest.approx((2 * 70.6e9 + cache) / bandwidth)
    assert mb.pass_seconds("target", 32, 1) == pytest.approx((2 * 70.6e9 + 32 * cache) / bandwidth)
    assert mb.pass_seconds("target", 999, 5) == pytest.approx(
        999 * 5 * (2 * 70.6e9 + attention) / peak)


def test_the_batch_that_loses(measured):
    for alpha, batch in measured("microbeam")["losing_batch"].items():
        gains = []
        for n in (batch - 1, batch):
            draft, one, five = (mb.pass_seconds(name, n, k) for name, k in
                                (("draft", 1), ("target", 1), ("target", 5)))
            gains.append(sum(alpha ** i for i in range(5)) * one / (4 * draft + five))
        assert gains[0] >= 1.0 > gains[1]


@pytest.mark.parametrize("seed", [0, 36, 39])
def test_no_text_is_longer_than_plain_decoding_would_make_it(seed):
    """With seeds 36 and 39 greedy texts do not end by themselves, and a round may overshoot."""
    (target, draft), rng = models(seed)

    def greedy(logits):
        return mb.apply_temperature(logits, 0.0)
    plain, fast = (mb.speculate(target, draft, gamma, greedy, rng)[0] for gamma in (0, 4))
    assert plain == fast and len(fast) <= mb.MAX_LEN


def test_one_model_cannot_be_its_own_draft():
    (target, _), rng = models(0)
    with pytest.raises(ValueError, match="one object"):
        mb.speculate(target, target, 2, mb.softmax, rng)
