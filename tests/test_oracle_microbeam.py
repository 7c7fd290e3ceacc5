"""microbeam's filters and beam search against transformers', exact search against brute force."""
import functools
import itertools
import math
import random

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import microbeam as mb


def random_logits(seed):
    rng = random.Random(seed)
    n = rng.choice([1, 2, 3, 7, 30])
    return [rng.gauss(0.0, rng.choice([0.3, 2.0, 8.0])) for _ in range(n)], rng


def warped(logits, *warpers):
    scores = torch.tensor([logits], dtype=torch.float64)
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    return torch.softmax(scores, -1)[0].tolist()


@pytest.mark.parametrize("seed", range(60))
def test_filters(seed):
    logits, rng = random_logits(seed)
    t, k, p = rng.choice([0.1, 0.7, 1.0, 3.0]), rng.randint(1, 40), rng.choice([0.1, 0.5, 0.9, 0.99])
    p += rng.random() * 0.009
    probs, W = mb.softmax(logits), transformers
    assert mb.apply_temperature(logits, t) == pytest.approx(
        warped(logits, W.TemperatureLogitsWarper(t)), abs=1e-10)
    assert mb.top_k(probs, k) == pytest.approx(warped(logits, W.TopKLogitsWarper(k)), abs=1e-10)
    assert mb.top_p(probs, p) == pytest.approx(warped(logits, W.TopPLogitsWarper(p)), abs=1e-10)
    assert mb.min_p(probs, p) == pytest.approx(warped(logits, W.MinPLogitsWarper(p)), abs=1e-10)
    chain = mb.min_p(mb.top_p(mb.top_k(mb.apply_temperature(logits, t), k), p), 0.05)
    assert chain == pytest.approx(warped(
        logits, W.TemperatureLogitsWarper(t), W.TopKLogitsWarper(k), W.TopPLogitsWarper(p),
        W.MinPLogitsWarper(0.05)), abs=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_exact_search_is_brute_force(seed):
    rng = random.Random(seed)
    vocab_size, max_len, rows = rng.randint(3, 5), rng.randint(1, 5), {}

    def step(prefix):
        if tuple(prefix) not in rows:
            rows[tuple(prefix)] = torch.log_softmax(
                torch.tensor([rng.gauss(0.0, 2.0) for _ in range(vocab_size)], dtype=torch.float64), 0).tolist()
        return rows[tuple(prefix)]
    eos = rng.randrange(vocab_size)
    others = [x for x in range(vocab_size) if x != eos]
    best = max((sum(step([1, *text[:i]])[x] for i, x in enumerate(text)), text)
               for n in range(max_len) for start in itertools.product(others, repeat=n)
               for text in [(*start, eos)])
    tokens, score = mb.exact_search(step, [1], eos, max_len)
    assert (tuple(tokens), score) == (best[1], pytest.approx(best[0], abs=1e-10))


@pytest.mark.parametrize("seed", range(50))
def test_beam_search_is_that_of_transformers(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vocab_size, width, max_len = rng.choice([4, 6, 9]), rng.choice([2, 3, 5]), rng.choice([2, 4, 6])
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=8, n_layer=1, n_head=2,
                                     initializer_range=1.0, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double().eval()

    @functools.cache
    def log_probs(prefix):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([prefix])).logits[0, -1], -1).tolist()
    def step(prefix):
        return log_probs(tuple(prefix))
    ours = mb.beam_search(step, [1, 2], 0, width, max_len)
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), num_beams=width, max_new_tokens=max_len,
            do_sample=False, num_return_sequences=width, length_penalty=0.0, early_stopping="never",
            return_dict_in_generate=True, output_scores=True)
    finished = []
    for row, score in zip(theirs.sequences.tolist(), theirs.sequences_scores.tolist()):
        text = row[2:]
        if 0 in text:                    # theirs also returns what max_len cut off; ours does not
            finished.append((text[:text.index(0) + 1], score))
    assert len(finished) <= len(ours)
    for (tokens, score), (their_tokens, their_score) in zip(ours, finished):
        assert tokens == their_tokens
        assert math.isclose(score, their_score, abs_tol=1e-5)         # their scores are in 32 bits
