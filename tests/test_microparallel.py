"""microparallel: collectives, both kinds of parallelism, and processes that never outlive a failure."""
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe, active_children
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

os.environ["PYTHONDONTWRITEBYTECODE"] = "1"      # for the processes that the script starts
import microparallel as mp
from collection import ROOT

sizes = st.integers(1, 5)


def on_threads(job, arguments):
    """job(rank, world, *arguments[rank]) with a thread for each rank -> results."""
    n = len(arguments)
    pipes, results = [{} for _ in range(n)], [None] * n
    for i in range(n):
        for j in range(i):
            pipes[i][j], pipes[j][i] = Pipe()

    def rank_main(rank):
        try:
            results[rank] = job(rank, mp.World(n, pipes[rank], 5.0), *arguments[rank])
        except Exception as error:
            results[rank] = error
    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ends in pipes:
        for end in ends.values():
            end.close()
    return results


def many(rank, world, job, cases):
    """A job for on_ranks: one process start for many cases -> [(result, counts), ...]."""
    answers = []
    for arguments in cases:
        mp.COUNT.clear()
        answers.append((job(rank, world, *arguments), dict(mp.COUNT)))
    return answers


def processes(marker):
    """Ids of the living processes whose environment has MARKER=marker."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if f"MARKER={marker}".encode() in file.read().split(b"\0"):
                    with open(f"/proc/{entry}/stat") as file:
                        if file.read().rsplit(")", 1)[1].split()[0] != "Z":
                            found.append(int(entry))
        except (OSError, ValueError):
            pass
    return found


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [child for child in map(int, file.read().split())
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


# Collectives --------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=20)
@given(sizes, st.integers(0, 12), st.integers(0, 10 ** 6))
def test_all_reduces_sum_and_give_all_ranks_the_same_bits(p, n, seed):
    rng = random.Random(seed)
    vectors = [[rng.gauss(0.0, 1.0) for _ in range(n)] for _ in range(p)]
    for job in mp.ring_all_reduce, mp.naive_all_reduce:
        results = on_threads(job, [(vector,) for vector in vectors])
        assert all(result == results[0] for result in results)
        assert results[0] == pytest.approx([sum(column) for column in zip(*vectors)], abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(sizes, st.integers(0, 12), st.integers(0, 4))
def test_broadcast_gather_and_scatter(p, n, root):
    vectors = [[float(100 * rank + i) for i in range(n)] for rank in range(p)]
    root %= p
    assert on_threads(mp.broadcast, [(vector, root) for vector in vectors]) == [vectors[root]] * p
    parts = [vectors[rank][:rank % 3] for rank in range(p)]
    assert on_threads(mp.all_gather, [(part,) for part in parts]) == [sum(parts, [])] * p
    scattered = on_threads(mp.reduce_scatter, [(vector,) for vector in vectors])
    assert sum(scattered, []) == [sum(column) for column in zip(*vectors)]
    assert scattered == [mp.chunk(sum(scattered, []), rank, p) for rank in range(p)]


def test_vectors_longer_than_a_pipe_holds():
    n = 200_000
    results = on_threads(mp.ring_all_reduce, [([1.0 + rank] * n,) for rank in range(3)])
    assert results == [[6.0] * n] * 3


def test_errors_of_the_ring():
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} in a world of 2"):
            mp.ring_all_reduce(rank, mp.World(2), [1.0])
    results = on_threads(mp.ring_all_reduce, [([1.0] * 4,), ([1.0] * 6,)])
    assert any(isinstance(result, ValueError) for result in results)
    assert mp.ring_all_reduce(0, mp.World(1), [1.0, 2.0]) == [1.0, 2.0]


# Schedules ----------------------------------------------------------------------------------------
def simulate(schedule, ticks=(1, 2)):
    """Run a schedule by its dependencies alone -> (ticks until the end, most kept per stage)."""
    p, done, at, clock = len(schedule), {}, [0] * len(schedule), [0] * len(schedule)
    alive, most = [0] * p, [0] * p
    while any(at[s] < len(schedule[s]) for s in range(p)):
        moved = False
        for s in range(p):
            if at[s] == len(schedule[s]):
                continue
            way, i = schedule[s][at[s]]
            before = s - 1 if way == "F" else s + 1
            if way == "B":
                assert (s, "F", i) in done
            if 0 <= before < p and (before, way, i) not in done:
                continue
            clock[s] = max(clock[s], done.get((before, way, i), 0)) + ticks[way == "B"]
            done[s, way, i] = clock[s]
            alive[s] += 1 if way == "F" else -1
            most[s] = max(most[s], alive[s])
            at[s] += 1
            moved = True
        assert moved, "the schedule deadlocks"
    return max(clock), most


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from(["gpipe", "1f1b"]),
       st.sampled_from([(1, 1), (1, 2), (2, 3)]))
def test_schedules_do_all_the_work_with_the_bubble_of_the_formula(p, m, kind, ticks):
    schedule = mp.pipeline_schedule(p, m, kind)
    work = {(way, i) for way in "FB" for i in range(m)}
    assert len(schedule) == p
    assert all(len(stage) == 2 * m and set(stage) == work for stage in schedule)
    length, most = simulate(schedule, ticks)
    assert 1 - m * sum(ticks) / length == pytest.approx(mp.bubble_fraction(p, m))
    assert most == [m if kind == "gpipe" else min(p - s, m) for s in range(p)]
    for stage in schedule:               # gradients are added up in one order, whatever the kind
        assert [i for way, i in stage if way == "B"] == list(range(m))


def test_figures_known_from_the_papers():
    assert mp.bubble_fraction(4, 8) == 3 / 11 and mp.bubble_fraction(1, 5) == 0.0
    assert mp.pipeline_schedule(2, 3, "1f1b") == [
        [("F", 0), ("F", 1), ("B", 0), ("F", 2), ("B", 1), ("B", 2)],
        [("F", 0), ("B", 0), ("F", 1), ("B", 1), ("F", 2), ("B", 2)]]
    assert mp.pipeline_schedule(1, 2, "gpipe") == [[("F", 0), ("F", 1), ("B", 0), ("B", 1)]]


@pytest.mark.parametrize("p, m", [(0, 1), (1, 0), (-2, 3), (3, -1)])
def test_bad_numbers_are_refused(p, m):
    for call in (lambda: mp.bubble_fraction(p, m), lambda: mp.pipeline_schedule(p, m, "gpipe")):
        with pytest.raises(ValueError, match=f"{p} stages, {m} microbatches"):
            call()
    with pytest.raises(ValueError, match="no schedule 'zigzag'"):
        mp.pipeline_schedule(2, 2, "zigzag")


# Parallelism --------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [2, 4])
def test_tensor_parallel_equals_one_device(p):
    rng = random.Random(p)
    model, (xs, _) = mp.new_model(rng, 2), mp.new_example(rng)
    ys = mp.forward(0, mp.World(1), model, xs)
    parts = [mp.shard(model, rank, p) for rank in range(p)]
    for result in on_threads(mp.forward, [(part, xs) for part in parts]):
        assert mp.off(result, ys) < 1e-12
    for layer, matrices in enumerate(model):             # the pieces are a partition
        for group in (0, 1):
            for i, matrix in enumerate(matrices[group]):
                assert sum((part[layer][group][i] for part in parts), []) == matrix
        assert all(part[layer][2] == matrices[2] for part in parts)


@pytest.mark.parametrize("p", [2, 4])
def test_messages_of_a_pass_are_those_of_the_formula(p):
    rng = random.Random(p)
    model, example = mp.new_model(rng, 3), mp.new_example(rng)
    parts = [mp.shard(model, rank, p) for rank in range(p)]
    _, counts = mp.on_ranks(mp.pass_both_ways, [(part, example) for part in parts])
    n = mp.SEQ_LEN * mp.D_MODEL
    for part, count in zip(parts, counts):
        assert len(mp.leaves(part)) == 3 * (12 * mp.D_MODEL ** 2 // p + mp.D_MODEL)
        for way in ("forward", "backward"):              # two all-reduces a layer, each a ring
            assert (count[way], count["bytes " + way]) == (6, 6 * 8 * 2 * (p - 1) * n // p)


def test_messages_of_a_pipeline_are_those_of_the_formula():
    rng = random.Random(5)
    model, examples = mp.new_model(rng, 3), [mp.new_example(rng) for _ in range(4)]
    size = 4 * 8 * (1 + mp.SEQ_LEN * mp.D_MODEL)         # a clock and the vectors, 4 microbatches
    for kind in ("gpipe", "1f1b"):
        _, counts = mp.on_ranks(mp.run_stage, [([layer], examples, kind) for layer in model])
        sent = [(count.get("bytes F", 0), count.get("bytes B", 0)) for count in counts]
        assert sent == [(size, 0), (size, size), (0, size)]


def test_a_stage_logs_what_it_did_and_waits_for_its_messages():
    rng = random.Random(6)
    model, examples = mp.new_model(rng, 3), [mp.new_example(rng) for _ in range(4)]
    for kind in ("gpipe", "1f1b"):
        results, _ = mp.on_ranks(mp.run_stage, [([layer], examples, kind) for layer in model])
        logs = [log for _, log, _ in results]
        assert [[work[:2] for work in log] for log in logs] == mp.pipeline_schedule(3, 4, kind)
        done = {(stage, way, i): (begin, end) for stage, log in enumerate(logs)
                for way, i, begin, end in log}
        for (stage, way, i), (begin, end) in done.items():
            assert end - begin == (1 if way == "F" else 2)
            before = stage - 1 if way == "F" else stage + 1
            assert begin >= done.get((before, way, i), (0, 0))[1]
        for log in logs:
            assert all(a[3] <= b[2] for a, b in zip(log, log[1:]))


@pytest.mark.parametrize("p", [2, 4])
def test_a_bias_before_the_all_reduce_is_p_minus_1_times_too_much(p):
    rng = random.Random(p)
    (weight, xs, _, _), _, bias = mp.new_model(rng, 1)[0]
    right = [mp.add(y, bias) for y in mp.linear(xs, weight)]
    for result in on_threads(mp.cut_by_inputs, [(weight, bias, xs)] * p):
        wrong, without = result["bias on both ranks"]
        assert mp.off(without, right) < 1e-12
        assert mp.off(wrong, [[y + (p - 1) * b for y, b in zip(row, bias)] for row in right]) < 1e-12


@pytest.mark.parametrize("p", [2, 4])
def test_relu_of_summands_is_not_relu_of_the_sum(p):
    rng = random.Random(p)
    (weight, xs, _, _), _, bias = mp.new_model(rng, 1)[0]
    right = mp.relu_rows(mp.linear(xs, weight))
    for result in on_threads(mp.cut_by_inputs, [(weight, bias, xs)] * p):
        wrong, without = result["relu before all-reduce"]
        assert mp.off(without, right) < 1e-12
        assert all(a > b - 1e-12 for a, b in zip(mp.leaves(wrong), mp.leaves(right)))
        assert mp.off(wrong, right) > 1e-3


def test_the_future_is_invisible_and_the_past_is_not():
    model = mp.new_model(random.Random(3), 2)

    def logits(tokens):
        xs = [[float(i == token) for i in range(mp.D_MODEL)] for token in tokens]
        return mp.forward(0, mp.World(1), model, xs)
    a, b = logits([1, 2, 3, 4, 5, 6]), logits([1, 2, 3, 0, 5, 6])
    assert a[:3] == b[:3] and all(x != y for x, y in zip(a[3:], b[3:]))


def test_an_example_is_the_running_maximum():
    for seed in range(20):
        vectors, targets = mp.new_example(random.Random(seed))
        tokens = [vector.index(1.0) for vector in vectors]
        assert all(sorted(vector) == [0.0] * (mp.D_MODEL - 1) + [1.0] for vector in vectors)
        assert targets == [max(tokens[:i + 1]) for i in range(mp.SEQ_LEN)]


@pytest.mark.parametrize("seed", [42, 1])
def test_the_story(measured, seed):
    result = measured("microparallel", seed)
    assert all(result["checks"].values()) and len(result["checks"]) >= 10
    losses = result["losses"]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])
    assert result["bytes_sent"] == {
        "broadcast": [9600, 9600, 9600, 0], "all-gather": [7200] * 4, "reduce-scatter": [7200] * 4,
        "ring all-reduce": [14400] * 4, "naive all-reduce": [28800, 9600, 9600, 9600]}
    far = result["tensor_off"]
    assert max(far[2] + far[4]) < 1e-12 and far["training"] < 1e-8
    assert result["pipeline"]["gpipe"] == (pytest.approx(3 / 11), [8] * 4)
    assert result["pipeline"]["1f1b"] == (pytest.approx(3 / 11), [4, 3, 2, 1])
    for bug in ("relu before all-reduce", "bias on both ranks", "gradients not summed"):
        wrong, right = result["bugs"][bug]
        assert right < 1e-12 < 1e-3 < wrong
    assert result["bugs"]["deadlock"].startswith("deadlock: rank 0 TimeoutError: waited 0.3 s")


def test_the_real_world(measured):
    seconds = measured("microparallel")["seconds"]
    # 160 all-reduces of 7/4 x 64 x 8192 x 2 bytes at 50 GB/s; weights and 64 caches / 8 at 4.8 TB/s
    def read(n): return (2 * 70.6e9 + n * 8192 * 327680) / 8 / 4.8e12
    (tensor, pipeline), _ = seconds["70B", "InfiniBand"]
    assert tensor == pytest.approx(read(64) + 160 * 7 / 4 * 64 * 8192 * 2 / 50e9)
    assert pipeline == pytest.approx(8 * (read(8) + 8 * 8192 * 2 / 50e9))
    _, (tensor, pipeline) = seconds["405B", "NVLink"]
    compute = 2 * 405e9 * 8192 / 8 / 989e12
    assert tensor == pytest.approx(compute + 252 * 7 / 4 * 8192 * 16384 * 2 / 450e9)
    assert pipeline == pytest.approx(15 * (compute / 8 + 1024 * 16384 * 2 / 450e9))
    assert all(decode[0] < decode[1] for decode, _ in seconds.values())
    faster = {key: "TP" if prefill[0] < prefill[1] else "PP" for key, (_, prefill) in seconds.items()}
    assert faster == {(model, link): "TP" if link == "NVLink" else "PP" for model, link in seconds}


# Failures -----------------------------------------------------------------------------------------
def quit_job(rank, world, how):
    if rank == 1:
        if how == "error":
            raise KeyError("lost")
        os.kill(os.getpid(), getattr(signal, how))
    return mp.ring_all_reduce(rank, world, [1.0])


def fail_or_sleep(rank, world, seconds):
    if rank == 1:
        raise KeyError("lost")
    time.sleep(seconds)


def test_a_failure_does_not_wait_for_the_others():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="^rank 0 does not answer; rank 1 KeyError: 'lost'$"):
        mp.on_ranks(fail_or_sleep, [(40.0,)] * 2, patience=-8.0)         # an answer within 2 s
    assert time.monotonic() - started < 20 and active_children() == []


def wait_for_a_slow_one(rank, world):
    if rank == 1:
        return mp.receive(world, 0, "a test")
    time.sleep(1.5)


@pytest.mark.parametrize("how, message", [
    ("SIGKILL", r"^rank 0 (lost its peer|TimeoutError: waited 0.3 s for rank 1 in ring all-reduce); rank 1 died, exit code -9$"),
    ("SIGTERM", r"^rank 0 (lost its peer|TimeoutError: waited 0.3 s for rank 1 in ring all-reduce); rank 1 died, exit code -15$"),
    ("SIGSTOP", r"^rank 0 TimeoutError: waited 0.3 s for rank 1 in ring all-reduce; rank 1 does not answer$"),
    ("error", r"^rank 0 (lost its peer|TimeoutError: waited 0.3 s for rank 1 in ring all-reduce); rank 1 KeyError: 'lost'$")])
def test_a_failing_rank_ends_the_run(how, message):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        mp.on_ranks(quit_job, [(how,)] * 2, patience=0.3)
    assert time.monotonic() - started < 15
    assert active_children() == []
    results, _ = mp.on_ranks(mp.ring_all_reduce, [([1.0],)] * 2)         # others are not affected
    assert results == ([2.0], [2.0])


def quit_at_once(rank, world, who):
    if rank == who:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        mp.ring_all_reduce(rank, world, [1.0] * 4)


@pytest.mark.parametrize("who", range(4))
def test_a_death_is_passed_on_around_the_ring(who):
    """Whoever dies, no rank waits for its patience to end: each that loses a peer ends as well."""
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"rank {who} died, exit code -9") as error:
        mp.on_ranks(quit_at_once, [(who,)] * 4, patience=60.0)
    assert str(error.value).count("lost its peer") == 3
    assert time.monotonic() - started < 30 and active_children() == []


def interrupted_job(rank, world):
    os.kill(os.getpid(), signal.SIGINT)                  # as Ctrl-C does, to all of a terminal
    return mp.ring_all_reduce(rank, world, [1.0])


def test_workers_ignore_an_interrupt():
    """In a process of its own, where nothing that a Process needs has been started before."""
    code = "import test_microparallel as t; print(t.mp.on_ranks(t.interrupted_job, [()] * 2)[0])"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run([sys.executable, "-B", "-c", code], env={**os.environ, "PYTHONPATH": path},
                         capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "([2.0], [2.0])\n", "")


def sleeping_job(rank, world):
    time.sleep(30.0)


def test_an_interrupt_ends_the_parent_at_once():
    started = time.monotonic()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        mp.on_ranks(sleeping_job, [()] * 2)
    assert time.monotonic() - started < 15 and active_children() == []
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def wait_in_vain(rank, world):
    mp.receive(world, rank + 1, "a test")


def test_only_if_all_wait_it_is_a_deadlock():
    with pytest.raises(RuntimeError, match="^deadlock: rank 0 TimeoutError: .*; rank 1 .*; rank 2 "):
        mp.on_ranks(wait_in_vain, [()] * 3, patience=0.3)


def test_to_wait_for_a_slow_rank_is_no_deadlock():
    with pytest.raises(RuntimeError, match="^rank 1 TimeoutError: waited 0.3 s for rank 0 in a test$"):
        mp.on_ranks(wait_for_a_slow_one, [()] * 2, patience=0.3)


def big_job(rank, world, n):
    return [float(rank)] * n


def test_results_larger_than_a_pipe_holds():
    results, counts = mp.on_ranks(big_job, [(100_000,)] * 3)
    assert results == tuple([float(rank)] * 100_000 for rank in range(3))
    assert all(not count for count in counts)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="no /proc")


def start(marker, *command):
    return subprocess.Popen(
        command or [sys.executable, "-B", str(ROOT / "microparallel.py")], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "MARKER": marker, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"})


def read_until(process, text):
    for line in process.stdout:
        if text in line.decode():
            return
    raise AssertionError(f"never printed {text!r}: {process.stderr.read().decode()}")


@needs_proc
@pytest.mark.parametrize("line", ["Several devices", "2. The model", "3. Collectives", "4. Tensor",
                                  "gpipe", "6. The bugs"])
def test_interrupt_of_the_whole_group_ends_quietly(line):
    """Ctrl-C in a terminal: every process of the group gets it, at any time of their lives."""
    marker = f"interrupt {os.getpid()} {line}"
    with start(marker) as process:
        read_until(process, line)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert wait_for(lambda: not processes(marker), 10), processes(marker)


@needs_proc
@pytest.mark.parametrize("delay", [0.02, 0.3, 0.6])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_parent(number, delay):
    marker = f"parent {os.getpid()} {number} {delay}"
    with start(marker) as process:
        read_until(process, "3. Collectives")
        assert wait_for(lambda: len(children(process.pid)) == 4)
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -number and err == b""
    assert wait_for(lambda: not processes(marker), 10), processes(marker)


def send_to_one_who_sleeps(rank, world):
    if rank == 0:
        mp.send(world, 1, [0.0] * 10 ** 6, "a test")         # more than a pipe holds
    time.sleep(600)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_in_a_send_does_not_outlive_its_parent(number):
    marker = f"send {os.getpid()} {number}"
    code = "import test_microparallel as t; t.mp.on_ranks(t.send_to_one_who_sleeps, [()] * 2)"
    environment = {**os.environ, "MARKER": marker, "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        assert wait_for(lambda: len(children(process.pid)) == 2)
        time.sleep(2.0)                  # they have begun
        process.send_signal(number)
    assert wait_for(lambda: not processes(marker), 10), processes(marker)


@needs_proc
def test_a_worker_killed_in_the_middle_of_the_story():
    marker = f"worker {os.getpid()}"
    with start(marker) as process:
        read_until(process, "3. Collectives")
        assert wait_for(lambda: len(children(process.pid)) == 4)
        os.kill(children(process.pid)[2], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count(b"\n") == 1, err.decode()
    assert err.startswith(b"microparallel.py: ") and b"rank 2 died, exit code -9" in err
    assert wait_for(lambda: not processes(marker), 10), processes(marker)


@needs_proc
def test_closed_pipe_leaves_no_process():
    marker = f"closed {os.getpid()}"
    with start(marker) as process:
        read_until(process, "3. Collectives")
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141
    assert wait_for(lambda: not processes(marker), 10), processes(marker)


@needs_proc
def test_as_a_module():
    marker = f"module {os.getpid()}"
    with start(marker, sys.executable, "-c", "import microparallel; microparallel.main(seed=1)") as run:
        out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, b"") and b"checks hold" in out
    assert wait_for(lambda: not processes(marker), 10), processes(marker)


def test_without_a_file_to_start_from_it_says_so():
    """As from a notebook cell: a spawned process would look for the code in vain."""
    source = (ROOT / "microparallel.py").read_text(encoding="utf-8")
    run = subprocess.run([sys.executable, "-X", "utf8", "-B", "-"], input=source, text=True,
                         encoding="utf-8", capture_output=True, timeout=60)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("microparallel.py: processes start from a file")
