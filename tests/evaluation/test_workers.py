"""Work side by side: all of it done, none of it piled up."""

import os
import threading
import time

import pytest

from tumorjax.errors import UserError
from tumorjax.evaluation.records import Outcome
from tumorjax.evaluation.workers import ahead, count_of, in_processes

# Worker processes find functions by their module's name, so these are tumorjax's own or Python's.


def test_outcomes_that_are_known_need_no_process():
    known = [Outcome(str(number)) for number in range(5)]
    assert list(in_processes(os.kill, known, 2)) == known


def test_without_processes_the_work_is_done_here():
    def work(case):
        return Outcome(f"{case}-{os.getpid()}", fresh=True)

    pieces = [("a",), Outcome("b"), ("c",)]
    here = os.getpid()
    assert [o.case for o in in_processes(work, pieces, 0)] == [f"a-{here}", "b", f"c-{here}"]


def test_work_is_taken_only_as_fast_as_it_is_done():
    """With one process no more than two pieces are out at a time."""
    taken, done = [], []

    def pieces():
        for number in range(8):
            taken.append(number)
            # What was taken before this one and has not come back: running or waiting.
            assert len(taken) - 1 - len(done) <= 2
            yield (0.05,)

    for outcome in in_processes(time.sleep, pieces(), 1):
        done.append(outcome)
    assert len(done) == 8


def test_a_killed_process_is_said_in_one_line():
    with pytest.raises(UserError, match=r"worker process was killed.*--config\.workers"):
        list(in_processes(os._exit, [(1,), (1,)], 1))


def test_one_item_is_worked_on_ahead_and_no_more():
    begun, threads = [], set()

    def work(item):
        begun.append(item)
        threads.add(threading.get_ident())
        return item * item

    results = []
    for item, future in ahead(work, range(5)):
        results.append((item, future.result()))
        time.sleep(0.05)
        assert begun == list(range(min(item + 2, 5)))
    assert results == [(n, n * n) for n in range(5)]
    assert threads != {threading.get_ident()}


def test_errors_come_with_their_item():
    def work(item):
        if item == 1:
            raise ValueError("bad")
        return item

    pairs = list(ahead(work, range(3)))
    assert [pairs[0][1].result(), pairs[2][1].result()] == [0, 2]
    with pytest.raises(ValueError, match="bad"):
        pairs[1][1].result()


def test_number_of_workers():
    assert count_of(0) == os.cpu_count()
    assert count_of(3) == 3
    with pytest.raises(UserError, match="workers is -1"):
        count_of(-1)
