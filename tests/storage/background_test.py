"""Items come in order, one ahead: claims about `storage.background`."""

import threading

import pytest

from research.storage.background import BackgroundWorker, prefetch


@pytest.mark.parametrize("count", [0, 1, 5])
def test_items_come_in_order_and_none_twice(count):
    assert list(prefetch(iter(range(count)))) == list(range(count))


def test_the_next_item_is_made_while_this_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def items():
        for event in made:
            event.set()
            yield event

    for i, _ in enumerate(prefetch(items())):
        if i < 2:
            assert made[i + 1].wait(timeout=10)
        assert not any(event.is_set() for event in made[i + 2 :])


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        raise ValueError("second")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="second"):
        next(found)


def test_no_thread_outlives_a_loop_that_ends_early():
    before = threading.active_count()
    for _ in prefetch(range(10)):
        break
    assert threading.active_count() == before


def test_calls_in_the_background_come_in_order_one_at_a_time():
    done, go = [], threading.Event()
    worker = BackgroundWorker()
    worker.call(lambda: (go.wait(), done.append(0)))
    assert not done  # the caller goes on
    go.set()
    for i in range(1, 5):
        worker.call(done.append, i)
    worker.wait()
    assert done == list(range(5))


def test_an_error_in_the_background_is_raised_by_the_next_call():
    worker = BackgroundWorker()
    worker.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        worker.call(print)
    worker.close()
