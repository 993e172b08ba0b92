"""Whose request is answered next, and who is turned away."""

import pytest

from mlx_fastvlm.server.fair_queue import FairQueue


def taken(queue):
    return [queue.take() for _ in range(len(queue))]


def test_clients_take_turns_and_each_keeps_its_order():
    queue = FairQueue(10)
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.put(name[0], name)
    assert taken(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_newcomer_waits_for_one_request_of_each_other_client_at_most():
    queue = FairQueue(10)
    for name in ("a1", "a2", "a3"):
        queue.put("a", name)
    assert queue.take() == "a1"
    queue.put("b", "b1")
    assert taken(queue) == ["a2", "b1", "a3"]


@pytest.mark.parametrize("count", range(8))
def test_what_is_upcoming_is_what_will_be_taken(count):
    queue = FairQueue(10)
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.put(name[0], name)
    queue.take()
    upcoming = queue.upcoming(count)
    assert upcoming == taken(queue)[:count]


def test_a_full_queue_turns_away_who_fills_it():
    queue = FairQueue(3)
    assert [queue.put("a", name) for name in ("a1", "a2", "a3")] == [None] * 3
    assert queue.put("a", "a4") == "a4"
    assert queue.put("b", "b1") == "a3"
    assert queue.put("b", "b2") == "b2"  # as many as the other has
    assert taken(queue) == ["a1", "b1", "a2"]


def test_what_is_not_wanted_leaves_and_frees_its_room():
    queue = FairQueue(2)
    queue.put("a", 1)
    queue.put("b", 2)
    assert queue.remove_if(lambda item: item == 1) == [1]
    assert queue.put("c", 3) is None
    assert taken(queue) == [2, 3]
    with pytest.raises(IndexError):
        queue.take()
