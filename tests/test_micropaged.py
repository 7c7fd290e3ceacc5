"""micropaged: the pool's invariants, the engine against one-at-a-time, the bugs and the figures."""
import random
import re
from collections import Counter
from copy import copy

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import micropaged as paged

SEEDS = st.integers(0, 10 ** 6)


def tiny(seed, n_layers=1, context=40):
    """-> (a small random model with float weights, rng)"""
    rng = random.Random(seed)
    model = paged.GPT(5, rng, n_layers, 4, 2, context)
    for p in model.parameters():
        p.data *= 6.0                    # so that predictions differ visibly from uniform
    return model.frozen(), rng


def state(pool):
    """All that an operation that fails may not change."""
    return (list(pool.free_blocks), list(pool.tables), list(pool.references), list(pool.digests),
            [[dict(slot) for slot in block] for block in pool.memory])


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocate, append, fork and free; memory is written as a model would write it."""

    def __init__(self):
        super().__init__()
        self.pool = None

    @precondition(lambda self: self.pool is None)
    @rule(n_blocks=st.integers(1, 9), block_size=st.integers(1, 4), caching=st.booleans())
    def build(self, n_blocks, block_size, caching):
        self.pool, self.texts = paged.BlockPool(n_blocks, block_size, caching), []
        self.computed = set()            # (block, slot) whose key was written for the present text

    def fill(self, table, text, start):
        """Write what a model would compute: a key that depends on the whole prefix."""
        size = self.pool.block_size
        for i in range(start, len(text)):
            self.pool.memory[table[i // size]][i % size][0] = tuple(text[:i + 1])

    def state(self):
        return state(self.pool), [(list(t), list(t.tokens)) for t, _ in self.texts]

    def attempt(self, n_wanted, action):
        """The action, or OutOfBlocks exactly when fewer than n_wanted blocks are free."""
        before, free = self.state(), self.pool.n_free
        try:
            result = action()
        except paged.OutOfBlocks:
            assert n_wanted > free and self.state() == before
            return None
        assert n_wanted <= free and self.pool.n_free == free - n_wanted
        return result if result is not None else True

    @precondition(lambda self: self.pool)
    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=16))
    def allocate(self, text):
        size, pool = self.pool.block_size, self.pool
        hits = pool.find(text)
        wanted = -(-len(text) // size) - sum(pool.ref_count(block) > 0 for block in hits)
        result = self.attempt(wanted, lambda: pool.allocate(text))
        if result:
            table, n_cached = result
            assert n_cached == len(hits) * size < len(text) and table[:len(hits)] == hits
            assert pool.prefix_caching or n_cached == 0
            self.fill(table, text, n_cached)
            self.texts.append((table, list(text)))

    @precondition(lambda self: self.pool and self.texts)
    @rule(which=st.integers(0, 99), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def append(self, which, more):
        table, text = self.texts[which % len(self.texts)]
        size, last = self.pool.block_size, table[-1]
        copies = len(text) % size > 0 and self.pool.ref_count(last) > 1
        wanted = -(-(len(text) + len(more)) // size) - len(table) + copies
        if self.attempt(wanted, lambda: self.pool.append(table, more)):
            assert (last in table) == (not copies)
            text += more
            self.fill(table, text, len(text) - len(more))

    @precondition(lambda self: self.pool and 0 < len(self.texts) < 8)
    @rule(which=st.integers(0, 99))
    def fork(self, which):
        table, text = self.texts[which % len(self.texts)]
        twin = self.attempt(0, lambda: self.pool.fork(table))
        assert twin == table and twin is not table
        self.texts.append((twin, list(text)))

    @precondition(lambda self: self.pool and self.texts)
    @rule(which=st.integers(0, 99))
    def free(self, which):
        table, _ = self.texts.pop(which % len(self.texts))
        last_owner = [block for block in table if self.pool.ref_count(block) == 1]
        self.attempt(-len(last_owner), lambda: self.pool.free(table))
        before = state(self.pool)
        for wrong in (table, list(table), paged.BlockTable(table), copy(table)):
            for action in (self.pool.free, self.pool.fork, lambda t: self.pool.append(t, [1])):
                with pytest.raises(ValueError, match="not in use"):
                    action(wrong)
        assert state(self.pool) == before

    @precondition(lambda self: self.pool)
    @rule()
    def free_all(self):
        while self.texts:
            self.pool.free(self.texts.pop()[0])
        assert self.pool.n_free == self.pool.n_blocks and not any(self.pool.references)

    @invariant()
    def every_block_is_free_or_referenced(self):
        if self.pool:
            named = Counter(block for table, _ in self.texts for block in table)
            free = list(self.pool.free_blocks)
            assert sorted(free + list(named)) == list(range(self.pool.n_blocks))
            assert all(self.pool.ref_count(b) == named[b] for b in range(self.pool.n_blocks))
            assert self.pool.n_free == len(free)

    @invariant()
    def no_token_is_lost_or_changed(self):
        if self.pool:
            size = self.pool.block_size
            for table, text in self.texts:
                assert table.tokens == text and len(table) == -(-len(text) // size)
                for i in range(len(text)):
                    assert self.pool.memory[table[i // size]][i % size][0] == tuple(text[:i + 1])

    @invariant()
    def the_cache_names_full_blocks_by_their_whole_prefix(self):
        if self.pool:
            for block, digest in enumerate(self.pool.digests):
                if digest is None:
                    continue
                assert self.pool.prefix_caching
                text = self.pool.memory[block][-1][0]
                assert len(text) % self.pool.block_size == 0
                owners = [t for t, _ in self.texts if block in t]
                assert all(t.tokens[:len(text)] == list(text) for t in owners)


PoolMachine.TestCase.settings = settings(deadline=None, max_examples=2000, stateful_step_count=25)
TestPool = PoolMachine.TestCase


def traces(most=16):
    request = st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=most),
                        st.integers(1, most), st.integers(0, 8), st.integers(0, 99))
    return st.lists(request, min_size=1, max_size=6)


@given(SEEDS, traces(), st.integers(1, 5), st.integers(0, 4), st.booleans(), st.integers(1, 6),
       st.booleans())
@settings(deadline=None, max_examples=60)
def test_any_trace_ends_with_the_outputs_of_each_alone(seed, trace, block_size, extra, caching,
                                                       max_batch, static):
    """extra == 0: the pool holds the longest request and not a block more."""
    model, _ = tiny(seed)
    n_blocks = extra + max(-(-(len(p) + n - 1) // block_size) for p, n, *_ in trace)
    engine = paged.Engine(model, paged.BlockPool(n_blocks, block_size, caching), max_batch, static)
    requests = [engine.submit(*request) for request in trace]
    for _ in range(9 + 40 * sum(n for _, n, *_ in trace)):
        if not engine.waiting and not engine.running:
            break
        engine.step()
        live = [r.block_table for r in engine.running]
        named = Counter(block for table in live for block in table)
        assert sorted([*engine.pool.free_blocks, *named]) == list(range(n_blocks))
        assert all(engine.pool.ref_count(b) == named[b] for b in range(n_blocks))
        assert len(engine.running) <= max_batch
    assert sorted(map(id, engine.finished)) == sorted(map(id, requests))
    assert engine.pool.n_free == n_blocks
    for r, (prompt, n_tokens, arrival, seed) in zip(requests, trace):
        twin, cache = paged.Request(prompt, n_tokens, arrival, seed), paged.KVCache(1)
        while not twin.take(model.run(twin.tokens[cache.length:], cache, cache.length)[-1]):
            pass
        assert (r.tokens, r.logits) == (twin.tokens, twin.logits)
        assert len(r.tokens) == len(prompt) + n_tokens
        assert len(r.history) - r.history.count("·") - r.history.count("x") == n_tokens
        assert r.history.count("▒") >= 1 and r.history[-1] in "▒█"


@given(SEEDS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_paged_cache_is_a_cache(seed, n_layers, block_size, n_prompt):
    """Two sequences in turns in one pool, in chunks, in blocks in any order."""
    model, rng = tiny(seed, n_layers)
    pool = paged.BlockPool(24, block_size)
    pool.free_blocks = rng.sample(range(24), 24)
    texts = [[rng.randrange(5) for _ in range(12)] for _ in "ab"]
    wholes = [model.run(text, paged.KVCache(n_layers)) for text in texts]
    tables = [pool.allocate(text[:n_prompt]) for text in texts]
    logits = paged.run_batch(model, pool, tables)
    assert logits == [whole[n_prompt - 1] for whole in wholes]
    for end in range(n_prompt + 1, 13):
        for (table, _), text in zip(tables, texts):
            pool.append(table, text[end - 1:end])
        logits = paged.run_batch(model, pool, [(t, end - 1) for t, _ in tables])
        assert logits == [whole[end - 1] for whole in wholes]


def test_a_prompt_seen_before_still_runs_its_last_token():
    for n in range(1, 14):
        pool = paged.BlockPool(20, 4)
        pool.free(pool.allocate([7] * n)[0])
        table, n_cached = pool.allocate([7] * n)
        assert n_cached == (n - 1) // 4 * 4 < n and len(table.tokens) == n
    model, _ = tiny(0)
    rows = paged.show_prefix_caching(model, [[1] * n for n in (8, 9, 12, 3, 8)])
    assert [row[2] for row in rows] == [row[3] for row in rows] == [0, 8, 8, 0, 4]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=6),
       st.integers(1, 4))
def test_the_cache_finds_all_full_blocks_of_the_longest_start_seen_and_no_more(texts, size):
    pool = paged.BlockPool(100, size)
    for i, text in enumerate(texts):
        table, n_cached = pool.allocate(text)
        starts = [n for n in range(0, len(text), size)           # the last token is never among them
                  if n == 0 or any(other[:n] == text[:n] for other in texts[:i])]
        assert n_cached == starts[-1]
        pool.free(table)


def test_prefixes_differ_by_anything_before():
    pool = paged.BlockPool(20, 2)
    pool.allocate([1, 2, 3, 4, 5])
    for text, cached in (([1, 2, 3, 4, 9], 4), ([1, 2, 9, 9, 9], 2), ([9, 2, 3, 4, 5], 0),
                         ([3, 4, 1, 2, 5], 0), ([1, 23, 4, 5, 6], 0), ((1, 2, 3, 4, 5), 4)):
        assert pool.allocate(text)[1] == cached
    assert paged.BlockPool(20, 2, False).allocate([1, 2, 3])[1] == 0


def test_generated_blocks_are_found_too():
    pool = paged.BlockPool(9, 2)
    table, _ = pool.allocate([1])
    pool.append(table, [2, 3])
    pool.append(table, [4])
    assert pool.allocate([1, 2, 3, 4, 5])[1] == 4


def test_eviction_takes_the_least_recently_used_and_ends_before_starts():
    pool = paged.BlockPool(4, 1)
    old, new = pool.allocate([1, 2])[0], pool.allocate([3, 4])[0]
    pool.free(old)
    pool.free(new)
    assert list(pool.free_blocks) == [old[1], old[0], new[1], new[0]]
    table, n_cached = pool.allocate([1, 5])          # uses the old start again: now it is the newest
    assert n_cached == 1 and table == [old[0], old[1]]
    pool.free(table)
    assert pool.allocate([3, 9])[1] == 1             # the new one is still there
    assert list(pool.free_blocks)[0] == table[1]


def test_copy_on_write_copies_once_per_extra_fork():
    paged.COUNT.clear()
    pool = paged.BlockPool(9, 4)
    table, _ = pool.allocate([1, 2, 3, 4, 5])
    twins = [pool.fork(table) for _ in range(2)]
    for i, t in enumerate((table, *twins)):
        pool.append(t, [i])
    assert paged.COUNT["copied"] == 2 and len({t[-1] for t in (table, *twins)}) == 3
    assert len({t[0] for t in (table, *twins)}) == 1 and pool.ref_count(table[0]) == 3
    paged.COUNT.clear()
    pool = paged.BlockPool(9, 4)
    table, _ = pool.allocate([1, 2, 3, 4])           # a full block is never written again
    pool.append(pool.fork(table), [5])
    assert paged.COUNT["copied"] == 0 and len(table) == 1
    model, rng = tiny(0)
    for n, copied in ((15, 7), (16, 0), (17, 7)):
        paged.COUNT.clear()
        prompt, pool = [rng.randrange(5) for _ in range(n)], paged.BlockPool(99, 4)
        paged.branch(model, pool, prompt, 4, lambda _, rows: [(i, i % 5) for i in range(len(rows))], 8)
        assert paged.COUNT["copied"] == copied
        assert pool.n_blocks - pool.n_free == n // 4 + 8 * (-(-(n + 4) // 4) - n // 4)
    *samples, beams = paged.show_sharing(model, [1, 2, 3, 4, 0, 1], rng, n_tokens=4)
    for n, row in zip((2, 8), samples):                  # 6 + 4 tokens: the first block is shared
        assert row == [f"{n} samples", 3 * n, 1 + 2 * n, 1 + 2 * n, n - 1, n - 1]
    assert beams[0] == "4 beams" and beams[1] == 12 and beams[2] <= beams[3] == 9


@pytest.mark.parametrize("n_prompt", [4, 5, 7, 8])
def test_a_prompt_that_fills_its_blocks_is_not_copied(n_prompt, capsys):
    model, rng = tiny(1)
    paged.CHECKS.clear()
    rows = paged.show_sharing(model, [1 + i % 4 for i in range(n_prompt)], rng, n_tokens=3)
    assert [row[4] for row in rows[:2]] == ([1, 7] if n_prompt % 4 else [0, 0])
    assert all(holds for _, holds, _ in paged.CHECKS), paged.CHECKS


def test_pool_refuses_nonsense():
    for arguments in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="blocks of"):
            paged.BlockPool(*arguments)
    pool, other = paged.BlockPool(3, 4), paged.BlockPool(3, 4)
    table, _ = pool.allocate([1])
    for action in (lambda: pool.allocate([]), lambda: pool.append(table, [])):
        with pytest.raises(ValueError, match="0 tokens"):
            action()
    with pytest.raises(ValueError, match="not in use"):
        other.free(table)
    with pytest.raises(paged.OutOfBlocks, match="4 blocks, 2 of 3 free"):
        pool.allocate([2] * 13)


def test_engine_refuses_what_never_fits_and_goes_on():
    model, _ = tiny(0)
    engine = paged.Engine(model, paged.BlockPool(4, 4))
    with pytest.raises(ValueError, match="10 [+] 8 tokens; room for 16"):
        engine.submit([1] * 10, 8)
    roomy = paged.Engine(model, paged.BlockPool(40, 4))
    with pytest.raises(ValueError, match="40 [+] 2 tokens; room for 40"):
        roomy.submit([1] * 40, 2)
    for prompt, n_tokens in (([], 1), ([1], 0), ([1], -3)):
        with pytest.raises(ValueError, match=f"^{len(prompt)} [+] {n_tokens} tokens"):
            engine.submit(prompt, n_tokens)
    with pytest.raises(ValueError, match="batch of 0"):
        paged.Engine(model, paged.BlockPool(4, 4), 0).submit([1], 1)
    request = engine.submit([1] * 10, 7)
    assert engine.run() == [request] and len(request.tokens) == 17
    first = engine.submit([1] * 13, 3)
    engine.step()
    assert engine.pool.n_free == 0
    second = engine.submit([2] * 13, 3)              # it does not fit yet, but it will
    assert engine.run() == [request, first, second]


def test_first_come_first_served_and_the_youngest_gives_way():
    model, _ = tiny(1)
    engine = paged.Engine(model, paged.BlockPool(5, 4))
    young = engine.submit([2] * 8, 9, arrival=1)
    old = engine.submit([1] * 8, 9)
    engine.run()
    assert engine.finished == [old, young] and old.history == "▒" + 8 * "█"
    assert old.history.count("▒") == 1 < young.history.count("▒") and "x" in young.history
    engine = paged.Engine(model, paged.BlockPool(3, 4))              # here it is the old one who asks
    old, young = engine.submit([1] * 4, 4), engine.submit([2] * 6, 4)
    engine.run()
    assert (old.history, young.history) == ("▒███", "▒xxx▒██")
    batch = paged.Engine(model, paged.BlockPool(9, 4), static=True)
    first, late = batch.submit([1], 3), batch.submit([1], 1, 1)
    batch.run()
    assert (first.history, late.history) == ("▒██", "··▒")


def test_the_preempted_come_back_before_those_who_have_not_run():
    model, _ = tiny(1)
    engine = paged.Engine(model, paged.BlockPool(5, 4), max_batch=2)
    young, late = engine.submit([2] * 8, 9, arrival=1), engine.submit([3], 2, arrival=2)
    old = engine.submit([1] * 8, 9)
    engine.run()
    assert young.history.count("▒") > 1 and old.history.count("▒") == 1
    assert young.arrival + young.history.rindex("▒") <= late.arrival + late.history.index("▒")


def test_at_most_max_batch_run_and_nobody_before_the_arrival():
    model, _ = tiny(1)
    engine = paged.Engine(model, paged.BlockPool(40, 4), max_batch=2)
    requests = [engine.submit([1], 3, arrival) for arrival in (4, 0, 0, 0)]
    engine.run()
    assert [r.history for r in requests] == ["▒██", "▒██", "▒██", "···▒██"]
    assert engine.submit([1], 1, arrival=0).arrival == engine.clock == 7


def test_a_request_that_just_fits_runs_its_prompt_once_and_then_one_token_a_step():
    model, _ = tiny(2, context=9)
    engine = paged.Engine(model, paged.BlockPool(9, 1))
    engine.submit([1, 2, 3, 4, 0], 5)
    paged.COUNT.clear()
    engine.run()
    assert paged.COUNT["run"] == 9 and engine.clock == 5
    weights = [rows for name, rows in model.weights.items() if name not in ("token", "position")]
    assert paged.COUNT["weights read"] == 5 * sum(len(rows) * len(rows[0]) for rows in weights)
    with pytest.raises(ValueError, match="5 [+] 6 tokens"):
        engine.submit([1, 2, 3, 4, 0], 6)


def test_first_fit(capsys):
    assert paged.first_fit("A··B···", 3) == 4
    assert paged.first_fit("A··B···", 1) == 1
    assert paged.first_fit("A··B···", 4) == -1
    paged.CHECKS.clear()
    paged.show_contiguous(2)
    assert "\n  ··BB··DD··\n" in capsys.readouterr().out
    assert paged.CHECKS == [("in one piece: refused with enough free", True, "6 free")]


class Lengths:
    """A random number generator for show_waste: prompts of 30 and outputs of 9."""
    def __init__(self):
        self.turn = 0

    def paretovariate(self, alpha):
        self.turn += 1
        return (9 if self.turn % 2 == 0 else 30) / 16


def test_waste_by_hand(capsys):
    """Nine steps, from 30 tokens to 38 of 39; the last six need a third block of 16."""
    tokens = sum(range(30, 39))
    later = sum(39 - now for now in range(30, 39))
    in_16, in_64 = 3 * 32 + 6 * 48, 9 * 64
    expected = {"the maximum": [tokens, later, 9 * (512 - 39)],
                "a power of two": [tokens, later, 9 * (30 + 16 - 39)],
                "the true length": [tokens, later, 0],
                "blocks of 64": [tokens, later, 9 * (64 - 39)],
                "blocks of 16": [tokens, in_16 - tokens - 6 * 9, 6 * 9]}
    uses = paged.show_waste(Lengths())
    assert list(uses) == list(expected) and sum(expected["blocks of 64"]) == in_64
    for policy, sums in expected.items():
        assert uses[policy] == pytest.approx([100 * n / sum(sums) for n in sums]), policy
    out = capsys.readouterr().out
    for policy, figure in (("the maximum", "20.4"), ("a power of two", "26.8"),
                           ("the true length", "38.2"), ("blocks of 64", "-"), ("blocks of 16", "96.3")):
        row = re.search(rf"^  {policy} +(.+)$", out, re.M).group(1).split()
        assert row == [f"{share:.1f}" for share in uses[policy]] + [figure]


@given(SEEDS, st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_branches_share_and_stay_apart(seed, n_prompt, n_tokens, n_branches, block_size):
    model, rng = tiny(seed)
    prompt = [rng.randrange(5) for _ in range(n_prompt)]
    pool = paged.BlockPool(80, block_size)
    plan = [[(i, rng.randrange(5)) for i in range(n_branches)] for _ in range(n_tokens)]
    moves = iter(plan)
    texts = paged.branch(model, pool, prompt, n_tokens, lambda *_: next(moves), n_branches)
    whole, every = n_prompt // block_size, -(-(n_prompt + n_tokens) // block_size)
    assert 80 - pool.n_free == whole + n_branches * (every - whole)
    assert len(texts) == len(pool.tables) == n_branches          # the parents are all free
    for table in list(pool.tables.values()):
        pool.free(table)
    assert pool.n_free == 80
    for i, (tokens, logits) in enumerate(texts):
        assert tokens == prompt + [step[i][1] for step in plan]
        assert logits == [model.run(tokens, paged.KVCache(1))[-1]]
        assert paged.error(model, tokens, logits) == 0.0
        wrong = [[logits[0][0] + 0.5, *logits[0][1:]]]
        assert paged.error(model, tokens, wrong) == pytest.approx(0.5)


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_beam_search_over_forks_is_beam_search(seed, width, n_tokens, block_size):
    """Against the same search that keeps whole texts and computes each afresh."""
    model, rng = tiny(seed)
    prompt = [rng.randrange(5) for _ in range(3)]

    def log_p(text):
        rows = model.run(text[:-1], paged.KVCache(1))[len(prompt) - 1:]
        return -sum(paged.cross_entropy(row, t) for row, t in zip(rows, text[len(prompt):]))

    beams = [prompt]
    for _ in range(n_tokens):
        beams = sorted((b + [t] for b in beams for t in range(5)), key=log_p)[-width:]
    pool = paged.BlockPool(80, block_size)
    texts = paged.branch(model, pool, prompt, n_tokens,
                         lambda *state: paged.likeliest(*state, width))
    assert sorted(list(tokens) for tokens, _ in texts) == sorted(beams)
    assert len(pool.tables) == len(beams)


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_exhibits(seed, measured):
    correct, *bugs = measured("micropaged", seed)["symptoms"].items()
    assert correct == ("none", 0.0) and len(bugs) == 5
    for bug, symptom in bugs:
        assert symptom > 1e-4, bug


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_key_figures(seed, measured):
    results = measured("micropaged", seed)
    memory = {name: uses[0] for name, uses in results["memory"].items()}
    assert memory["the maximum"] < memory["a power of two"] < memory["the true length"]
    assert memory["blocks of 64"] < memory["blocks of 16"]
    assert memory["blocks of 16"] > 2 * memory["the maximum"]
    *samples, beams = results["branches"]
    for row in samples:
        assert row[2] == row[3] < row[1] and row[4] == row[5] == int(row[0].split()[0]) - 1
    assert beams[0] == "4 beams" and beams[2] <= beams[3] < beams[1]
    alone, static, continuous = results["batching"]
    assert [row[0] for row in results["batching"]] == ["one at a time", "static batches", "continuous"]
    assert continuous[1] < static[1] < alone[1]
    assert alone[3] == "1.0" and alone[-1] == 0
    assert all(row[2] == row[3] < row[1] for row in results["prompts"])
    cached = [row[2] for row in results["prompts"]]
    assert min(cached[1], cached[2], cached[4]) >= 16 > cached[3]    # three of four begin alike
    assert cached[0] == 0 and cached[-1] > results["prompts"][-1][1] / 2


@pytest.mark.parametrize("bug", ["NothingToRun", "HashAlone", "NeverCopies", "FreesTwice", "StaleCount"])
def test_a_bug_is_one_change_of_the_class_that_has_it(bug):
    """What a subclass does not override is the correct server's."""
    broken = getattr(paged, bug)
    changed = {name for name in vars(broken) if not name.startswith("__")}
    assert changed == {"NothingToRun": {"n_to_run"}, "HashAlone": {"digest"},
                       "NeverCopies": {"copy_on_write"}, "FreesTwice": {"verify", "free"},
                       "StaleCount": {"place"}}[bug]


def test_real_world_by_hand(measured):
    real = measured("micropaged")["real_world"]
    assert real["token"] == 128 * 1024
    a100 = {row[0]: row[1:] for row in real["rows"]}["A100 80GB"]
    blocks = int((80e9 - 2 * 8.03e9) / 2097152)
    assert a100 == [blocks, 59, blocks // 63]


@given(SEEDS, st.lists(st.floats(-3, 3), min_size=2, max_size=6))
def test_a_request_draws_from_the_softmax_of_logits_over_0_6(seed, logits):
    request = paged.Request([1], 1, seed=seed)
    request.take(logits)
    p = paged.softmax([x / 0.6 for x in logits])
    assert request.tokens[1:] == random.Random(seed).choices(range(len(p)), p)


def test_an_error_counts_in_both_directions():
    model, _ = tiny(0)
    right = model.run([1, 2], paged.KVCache(1))[-1]
    for step in (0.5, -0.5):
        wrong = [[right[0] + step, *right[1:]]]
        assert paged.error(model, [1, 2], wrong) == pytest.approx(0.5)


def test_digests_keep_tokens_apart():
    pool = paged.BlockPool(20, 2)
    pool.allocate([1, 23, 4])
    assert pool.allocate([12, 3, 4])[1] == 0 and pool.allocate([1, 23, 5])[1] == 2


def test_a_pass_is_counted_once_for_the_whole_batch_and_branches_skip_what_is_cached():
    model, _ = tiny(0)
    pool = paged.BlockPool(40, 2)
    tables = [pool.allocate([token] * 3) for token in (1, 2, 3)]
    paged.COUNT.clear()
    paged.run_batch(model, pool, tables)
    weights = [rows for name, rows in model.weights.items() if name not in ("token", "position")]
    assert paged.COUNT["weights read"] == sum(len(rows) * len(rows[0]) for rows in weights)
    assert paged.COUNT["run"] == 9
    paged.COUNT.clear()
    paged.branch(model, pool, [1, 1, 1, 4], 1, lambda *_: [(0, 2)])
    assert paged.COUNT["run"] == 2 + 1           # of the prompt two tokens are in the cache


def test_pictures_and_figures_are_those_of_the_requests(capsys):
    """Two of A, B and C fit at once into 6 blocks; C is preempted by B and waits for both."""
    model, rng = tiny(3)
    trace = [([1] * 4, 9, 0, 0), ([2] * 4, 9, 0, 1), ([3] * 4, 9, 1, 2), ([4] * 5, 2, 2, 3)]
    expected = []
    for request in trace:
        expected += paged.serve(paged.Engine(model, paged.BlockPool(9, 4)), [request])
    paged.CHECKS.clear()
    alone, _, continuous = paged.show_batching("abcde", model, trace, expected)
    assert paged.CHECKS.pop()[1]
    lines = [line for line in capsys.readouterr().out.split("\n")
             if line[2:4] in ("A ", "B ", "C ", "D ")]
    rows, texts = zip(*(line[4:].split() for line in lines))
    assert [len(line[4:]) - len(line[4:].lstrip()) for line in lines] == [0, 0, 1, 2]
    assert list(texts) == ["".join("abcde"[t] for t in r.tokens[-r.n_tokens:]) for r in expected]
    waits, firsts = sorted(map(len, rows)), [row.index("▒") + 1 for row in rows]
    prefills, steps = sum(row.count("▒") for row in rows), max(map(len, (
        " " * arrival + row for (_, _, arrival, _), row in zip(trace, rows))))
    assert continuous[:2] == ["continuous", steps] and 0 < prefills - 4 < "".join(rows).count("x")
    means = [29 / steps, sum(firsts) / 4, sum(waits) / 4]
    assert continuous[3:] == [*(f"{mean:.1f}" for mean in means), waits[-1], prefills - 4]
    assert alone[1:4] == [29, 3 * (4 + 8) + 5 + 1, "1.0"] and alone[-2:] == [29 - 2, 0]
    expected[2].tokens[-1] += 1                          # a check that can fail
    paged.show_batching("abcdef", model, trace, expected)
    assert not paged.CHECKS.pop()[1]
    capsys.readouterr()
    # After three steps A has gone, B's 10 tokens lie in blocks 1 to 3 and C's in block 4.
    requests = paged.show_paging(model, [([1] * 4, 1), ([2] * 8, 4), ([3] * 2, 2, 2)])
    picture = capsys.readouterr().out.split("\n")[1]
    assert picture.rstrip("·") == "  after step  3 ·BBBC" and picture.count("·") == 76
    assert [len(r.logits) for r in requests] == [1, 4, 2] and paged.CHECKS.pop()[1]


def test_the_figures_of_the_prefix_cache_are_of_the_tokens_really_run(capsys):
    """Of 8, 8 and 9 tokens, 4 and 8 are found in the cache."""
    model, _ = tiny(0)
    paged.CHECKS.clear()
    paged.show_prefix_caching(model, [[1] * 8, [1] * 8, [1] * 9])
    assert f"hit rate, prefill saved: {12 / 25:.0%} of tokens" in capsys.readouterr().out
    assert all(holds for _, holds, _ in paged.CHECKS)


def test_real_world_as_printed(first_run):
    """15 slots of 128 KiB; 4 bytes beside 16 of them; 2,048 tokens a thousand times and once."""
    out = first_run("micropaged").out
    assert f"16 waste at most {15 / 8:.2f} MiB a request; tables add {4 / 2 ** 21:.1e}\n" in out
    assert f"users: {2048 * 131072 / 1e6:.0f} GB, shared {2048 * 131072 / 1e9:.2f} GB" in out
    assert list(paged.MEMORY.values()) == [24e9, 80e9, 80e9, 141e9, 180e9]
