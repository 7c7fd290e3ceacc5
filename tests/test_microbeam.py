"""microbeam: filters, searches, speculation and its bugs."""
import itertools
import math
import random
import re

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
    (lambda: mb.top_k([1.0], math.inf), "inf"),
    (lambda: mb.top_p([1.0], 1.1), "1.1"), (lambda: mb.top_p([1.0], -0.1), "-0.1"),
    (lambda: mb.min_p([1.0], 2.0), "2.0"), (lambda: mb.min_p([1.0], math.nan), "nan"),
    (lambda: mb.top_k([], 1), "0 tokens"), (lambda: mb.top_p([0.5, 0.6], 0.5), "0.6"),
    (lambda: mb.min_p([1.5, -0.5], 0.5), "-0.5"), (lambda: mb.top_k([math.nan, 1.0], 1), "nan"),
    (lambda: mb.speculative_distribution([1.0], [0.5, 0.5]), "1 tokens"),
    (lambda: mb.speculative_step([[1.0]], [[1.0]], [0], random.Random(0)), "1 tokens, 1 rows"),
    (lambda: mb.speculative_step([[0.5, 0.5]] * 2, [[1.0, 0.0]], [1], random.Random(0)), "token=1"),
    (lambda: mb.speculative_step([[0.5, 0.5]] * 2, [[1.0, 0.0]], [-2], random.Random(0)), "token=-2"),
    (lambda: mb.expected_tokens(1.5, 2), "1.5"), (lambda: mb.expected_tokens(0.5, -1), "-1"),
    (lambda: mb.expected_tokens(0.5, 1.5), "1.5"), (lambda: mb.expected_tokens(math.nan, 1), "nan"),
    (lambda: mb.beam_search(lambda x: [0.0], [], 0, 1, 1), r"\[\]"),
    (lambda: mb.beam_search(lambda x: [0.0], [0], 0, 0, 1), "width=0"),
    (lambda: mb.beam_search(lambda x: [0.0], [0], 0, 1, 0), "max_len=0"),
    (lambda: mb.beam_search(lambda x: [0.0], [0], 5, 1, 1), "eos 5"),
    (lambda: mb.exact_search(lambda x: [0.3], [0], 0, 1), "0.3"),
    (lambda: mb.exact_search(lambda x: [0.0], [0], 0, 0), "max_len=0"),
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
    assert mb.expected_tokens(0.6, 7) == pytest.approx((1 - 0.6 ** 8) / (1 - 0.6))
    assert mb.speedup(0.3, 1, 0.5) < 1.0 < mb.speedup(0.6, 1, 0.5)   # a gain needs alpha > c


def models(seed):
    rng = random.Random(seed)
    pair = [mb.GPT(5, rng, n_layers, d_model) for n_layers, d_model in ((2, 8), (1, 4))]
    for p in pair[0].parameters() + pair[1].parameters():
        p.data *= 6.0
    return [model.frozen() for model in pair], rng


@pytest.fixture
def rounds(monkeypatch):
    """Every call of speculative_step and what it returned."""
    calls, step = [], mb.speculative_step

    def recorded(p_rows, q_rows, drafted, rng):
        accepted, token = step(p_rows, q_rows, drafted, rng)
        calls.append((p_rows, q_rows, list(drafted), accepted, token))
        return accepted, token
    monkeypatch.setattr(mb, "speculative_step", recorded)
    return calls


@pytest.mark.parametrize("rule", [mb.PLAIN, ("temperature", 0.5), ("top-k", 2)])
@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_speculating_on_caches_sees_what_one_by_one_sees(seed, gamma, rule, rounds):
    """Both models read this text and no other, and the rule is applied to both."""
    (target, draft), rng = models(seed)
    for _ in range(4):
        rounds.clear()
        tokens, text = mb.speculate(target, draft, gamma, rule, rng, (0, 3)), [0, 3]
        for p_rows, q_rows, drafted, accepted, token in rounds:
            assert len(drafted) == gamma and 0 not in text[1:] and len(text) <= mb.MAX_LEN
            assert p_rows == [mb.probs_after(target, text + drafted[:i], rule) for i in range(gamma + 1)]
            assert q_rows == [mb.probs_after(draft, text + drafted[:i], rule) for i in range(gamma)]
            text += [*accepted, token]
        assert tokens == text[2:len(tokens) + 2]                 # what follows the end is cut off
        assert tokens[-1] == 0 or len(tokens) == mb.MAX_LEN - 1
        assert 0 not in tokens[:-1]


@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_speculation_is_greedy(seed, gamma):
    (target, draft), rng = models(seed)
    plain, fast = (mb.speculate(target, draft, n, mb.GREEDY, rng) for n in (0, gamma))
    assert plain == fast


@pytest.mark.parametrize("seed", range(6))
def test_what_was_rejected_matters_unless_it_is_rolled_back(seed):
    (target, _), _ = models(seed)
    for prefix in [(0, 2), (0, 2, 3, 1), (0, 1, 1)]:
        assert mb.keeps_rejected(target, prefix) > 1e-6
        assert mb.keeps_rejected(target, prefix, truncate=True) == 0.0


def test_a_prefix_is_run_once_and_like_the_whole_text():
    (target, _), _ = models(1)
    whole = target.run([0, 2, 3, 1], mb.KVCache(2))
    for i in (3, 1, 2, 0):
        logits, cache = mb.run_prefix(target, (0, 2, 3, 1)[:i + 1])
        assert logits == whole[i] and cache.length == i + 1
        assert mb.probs_after(target, [0, 2, 3, 1][:i + 1], mb.PLAIN) == mb.softmax(whole[i])
    mb.COUNT.clear()
    mb.run_prefix(target, (0, 2, 3, 1))
    assert not mb.COUNT
    mb.run_prefix(target, (0, 2, 3, 1, 2))                   # one position more, and no other
    work, cache = mb.COUNT["multiply-adds"], mb.KVCache(2)
    target.run([0, 2, 3, 1], cache)
    mb.COUNT.clear()
    target.run([2], cache, 4)
    assert mb.COUNT["multiply-adds"] == work


def test_a_sample_knows_its_probability():
    (target, _), rng = models(3)
    for rule in (mb.PLAIN, ("temperature", 1.5), ("top-k", 2)):
        tokens, log_p = mb.sample(target, rule, rng)
        rows = target.run([0, *tokens[:-1]], mb.KVCache(2))
        assert log_p == pytest.approx(sum(math.log(mb.softmax(row)[x]) for row, x in zip(rows, tokens)))
        assert all(mb.choose(row, rule)[x] > 0.0 for row, x in zip(rows, tokens))


@pytest.mark.parametrize("rule, expected", [
    (mb.PLAIN, [0.1, 0.2, 0.3, 0.4]), (mb.GREEDY, [0, 0, 0, 1]), (("top-k", 2), [0, 0, 3 / 7, 4 / 7]),
    (("top-p", 0.8), [0, 2 / 9, 3 / 9, 4 / 9]), (("min-p", 0.6), [0, 0, 3 / 7, 4 / 7]),
    (("temperature", 0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30])])
def test_rules(rule, expected):
    assert mb.choose([math.log(x) for x in (0.1, 0.2, 0.3, 0.4)], rule) == pytest.approx(expected)


def test_the_bugs_by_hand():
    """p and q, then each token's chance to be accepted and to be redrawn."""
    p, q = [0.5, 0.5], [0.25, 0.75]
    assert mb.drafts_greedily(p, q) == pytest.approx(0.5 - 1 / 3)    # the second, accepted in 2 of 3
    assert mb.redraws_from_p(p, q) == pytest.approx(0.5 - (0.25 + 0.25 * 0.5))
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]  # cut and rescaled: 5/8, 3/8, 0 and 0, 3/8, 5/8
    assert mb.rescales_late(p, q) == pytest.approx(0.625 - 0.625 * 0.625 / 0.7)
    assert mb.bias(p, q, q, mb.residual(p, q)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("seed", [42, 0])
def test_key_figures(seed, measured):
    results = measured("microbeam", seed)
    assert all(results["checks"].values())
    losses = list(results["losses"].values())
    assert max(losses[1:]) < losses[0] - 0.4
    found, quality, bugs = results["found"], results["quality"], results["bugs"]
    totals = {key: sum(score for _, score in names) for key, names in found.items()}
    assert max(totals, key=totals.get) == ("exact", "-") and totals[16, 0.0] >= totals[1, 0.0]
    log_p, distinct = ([quality["temperature", t][i] for t in (0.0, 0.4, 1.5)] for i in (0, 1))
    assert log_p == sorted(log_p, reverse=True) and distinct == sorted(distinct)
    assert distinct[0] == pytest.approx(1 / 150)
    for gamma, (alpha, chance, per_pass, formula) in results["rounds"].items():
        assert per_pass == pytest.approx(formula, rel=0.1) and 1.0 <= per_pass <= gamma + 1
        assert gamma == 0 or 0.6 < alpha < 1.0 and alpha == pytest.approx(chance, abs=0.15)
    assert max(bugs["cache rolled back"]) == 0.0
    assert max(bugs["drafts greedily, tests by p/q"]) > 0.1 and max(bugs["cache not rolled back"]) > 0.01
    assert max(bugs["redraws from p, not the residual"]) > 0.01
    assert max(bugs["top-p, q rescaled after the test"]) > 0.01
    fair, raw = ([mb.normalised(score, len(name), 1.0) for name, score in found[16, penalty]]
                 for penalty in (1.0, 0.0))
    assert sum(fair) > sum(raw) + 0.1        # raw sums: a worse text is chosen


@pytest.mark.parametrize("gamma", [1, 4])
def test_what_is_counted_of_a_round(gamma, rounds):
    (target, draft), rng = models(5)
    mb.COUNT.clear()
    for _ in range(5):
        mb.speculate(target, draft, gamma, mb.PLAIN, rng)
    n_tests, overlap = 0, 0.0
    for p_rows, q_rows, _, accepted, _ in rounds:
        n = min(len(accepted) + 1, gamma)
        n_tests += n
        overlap += sum(sum(map(min, p, q)) for p, q in zip(p_rows[:n], q_rows[:n]))
    assert mb.COUNT["rounds"] == len(rounds) and mb.COUNT["tests"] == n_tests
    assert mb.COUNT["accepted"] == sum(len(accepted) for _, _, _, accepted, _ in rounds)
    assert mb.COUNT["Σ min(p, q)"] == pytest.approx(overlap)


def test_quality_by_hand(monkeypatch):
    """Two names of 2 tokens, one of 3, one twice; two of the four drawn are among the names to learn."""
    drawn = itertools.cycle([((1, 0), -1.0), ((1, 0), -2.0), ((2, 1, 0), -3.0), ((2, 0), -6.0)])
    monkeypatch.setattr(mb, "sample", lambda model, rule, rng: next(drawn))
    results = mb.show_quality(None, [[0, 1, 0], [0, 3, 3, 3, 0]], None, n=4)
    assert list(results) == mb.RULES
    for figures in results.values():         # lengths: 3/4 and 1/4 of 2 and 3, against 1/2 of 2 and 4
        assert figures == pytest.approx((-3.0, 0.75, 0.5, 0.5))


def test_search_errors_are_those_of_the_printed_table(capsys):
    (target, _), _ = models(2)
    mb.CHECKS.clear()
    found = mb.show_search(target, [[0], [0, 1], [0, 2], [0, 3]])
    modes, printed = found["exact", "-"], capsys.readouterr().out
    assert len(found) == 7
    for (width, penalty), names in found.items():
        missed = sum(score < best - 1e-9 for (_, score), (_, best) in zip(names, modes))
        letters = sum(len(name) - 1 for name, _ in names) / 4
        assert re.search(rf"^  {width} +{penalty} +{letters:.2f} +{missed}$", printed, re.M)
    assert [holds for _, holds, _ in mb.CHECKS] == [True, True]


def test_no_position_is_run_twice_by_plain_decoding():
    (target, draft), rng = models(2)
    mb.COUNT.clear()
    tokens = mb.speculate(target, draft, 0, mb.PLAIN, rng)
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


def test_samples_end_at_the_limit(monkeypatch):
    monkeypatch.setattr(mb, "run_prefix", lambda model, prefix: ([-1e3, 0.0], None))
    tokens, log_p = mb.sample(None, mb.PLAIN, random.Random(0))
    assert tokens == (1,) * mb.MAX_LEN and log_p == pytest.approx(0.0)


def test_memorised_names_are_noticed(measured):
    assert any(row[2] > 0.0 for row in measured("microbeam")["quality"].values())


def wrong_step(p_rows, q_rows, drafted, rng):
    """Accepts whatever was drafted."""
    return list(drafted), mb.draw(q_rows[-1] if q_rows else p_rows[-1], rng)


def outcome_of(run, *arguments):
    mb.CHECKS.clear()
    run(*arguments)
    return [holds for _, holds, _ in mb.CHECKS]


def test_the_chi_square_notices_a_sampler_that_writes_the_draft(monkeypatch):
    p, q = [0.5, 0.3, 0.2, 0.0], [0.4, 0.3, 0.3, 0.0]
    assert outcome_of(mb.check_samples, p, q, random.Random(3)) == [True]
    monkeypatch.setattr(mb, "speculative_step", wrong_step)
    assert outcome_of(mb.check_samples, p, q, random.Random(3)) == [False]


def test_the_chi_square_of_six_tokens_has_five_degrees_of_freedom():
    p = [0.3, 0.0, 0.2, 0.1, 0.1, 0.1, 0.2]
    assert outcome_of(mb.check_samples, p, p, random.Random(3), 60) == [True]
    statistic, limit = map(float, mb.CHECKS[0][2].split(" < "))
    assert limit == pytest.approx(5 + 2 * math.sqrt(5 * 14) + 28, abs=0.06)
    assert 0.0 < statistic < limit


def test_the_checks_of_exactness_notice_a_redraw_from_p(monkeypatch):
    pair, _ = models(4)
    contexts = [(0,), (0, 1), (0, 2, 3)]
    assert outcome_of(mb.check_one_token, pair, contexts) == [True]
    assert outcome_of(mb.check_three_tokens, *pair) == [True]
    monkeypatch.setattr(mb, "residual", lambda p, q: p)
    assert outcome_of(mb.check_one_token, pair, contexts) == [False]
    assert outcome_of(mb.check_three_tokens, *pair) == [False]


def test_the_check_of_greedy_texts_notices_what_is_accepted_wrongly(monkeypatch):
    pair, rng = models(4)
    contexts = [(0,), (0, 1), (0, 2, 3)]
    assert outcome_of(mb.check_greedy, *pair, contexts, rng) == [True]
    monkeypatch.setattr(mb, "speculative_step", wrong_step)
    assert outcome_of(mb.check_greedy, *pair, contexts, rng) == [False]


@pytest.mark.parametrize("alpha", [0.5, 0.6, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("gamma", [1, 4, 8])
def test_the_batch_that_loses(alpha, gamma, c=0.1, ridge=200.0):
    """Against the roofline itself: a pass takes as long as its tokens, or as reading the weights."""
    def gain(batch):
        seconds = gamma * c * max(batch, ridge) + max((gamma + 1) * batch, ridge)
        return mb.expected_tokens(alpha, gamma) * max(batch, ridge) / seconds
    assert gain(1) == pytest.approx(mb.speedup(alpha, gamma, c)) and gain(1) > 1.0
    batch = mb.losing_batch(alpha, gamma, c, ridge)
    assert gain(batch - 0.01) > 1.0 > gain(batch + 0.01)


def test_published_pairs_and_batches_are_printed(capsys):
    mb.show_real_world()
    rows = [line.split() for line in capsys.readouterr().out.split("\n")]
    assert ["T5-small", "7", "0.75", "0.020", "3.16x", "3.4x"] in rows
    assert ["0.8", "2.31x", "172"] in rows


@pytest.mark.parametrize("seed", [0, 36, 39])
def test_no_text_is_longer_than_plain_decoding_would_make_it(seed):
    """With seeds 36 and 39 greedy texts do not end by themselves, and a round may overshoot."""
    (target, draft), rng = models(seed)
    plain, fast = (mb.speculate(target, draft, gamma, mb.GREEDY, rng) for gamma in (0, 4))
    assert plain == fast and len(fast) <= mb.MAX_LEN


@pytest.mark.parametrize("max_len", range(2, 9))
def test_an_end_drawn_beyond_the_limit_does_not_lengthen_the_text(max_len, monkeypatch):
    """Texts that end later than max_len: plain decoding stops there, and so must speculation."""
    monkeypatch.setattr(mb, "MAX_LEN", max_len)
    cut = 0
    for seed in range(25):
        (target, draft), rng = models(seed)
        plain, fast = (mb.speculate(target, draft, gamma, mb.GREEDY, rng) for gamma in (0, 7))
        assert plain == fast and len(fast) <= max_len
        cut += plain[-1] != 0
    assert cut > 0


@pytest.mark.parametrize("gamma", [1, 3])
def test_a_model_that_drafts_for_itself_is_always_right(gamma, rounds):
    (target, _), rng = models(0)
    for _ in range(5):
        mb.speculate(target, target, gamma, mb.PLAIN, rng)
    assert all(len(accepted) == gamma for _, _, _, accepted, _ in rounds)
