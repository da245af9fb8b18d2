"""The actor between driver and rank 0: order of what is told, and whether rank 0 is still there to be stopped."""

import asyncio
import threading
from typing import Any

import pytest
import ray

from eagle3_ray.training import channel
from eagle3_ray.training.channel import ChannelActor, open_channel


def test_items_are_taken_in_the_order_they_were_told_in_however_they_arrive() -> None:
    async def tell_and_take() -> list[Any]:
        actor = ChannelActor()
        for number in (2, 0, 0, 3, 1, 2):  # one call overtakes, another is made twice
            await actor.tell("rank", number, f"item {number}")
        await actor.wait_until_queued("rank", 4)
        return [await actor.take() for _ in range(4)]

    assert asyncio.run(tell_and_take()) == [f"item {number}" for number in range(4)]


def test_waiting_for_what_was_told_ends_when_the_last_of_it_comes() -> None:
    async def wait() -> None:
        actor = ChannelActor()
        await actor.tell("rank", 1, "second")
        waiting = asyncio.create_task(actor.wait_until_queued("rank", 2))
        await asyncio.sleep(0)
        assert not waiting.done()
        await actor.tell("rank", 0, "first")
        await waiting

    asyncio.run(wait())


def test_a_stop_is_heard_only_by_a_rank_that_listened_a_while_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LISTEN_S", 0.0)

    async def order() -> None:
        actor = ChannelActor()
        assert not await actor.order_stop()  # no step is made yet
        assert await actor.listen_for_stop()  # ordered before: a rank that starts again is told at once
        assert await actor.order_stop()
        monkeypatch.setattr(channel, "HEARD_FOR_S", 0.0)
        assert not await actor.order_stop()  # it is gone

    asyncio.run(order())


@pytest.mark.usefixtures("ray_cluster")
def test_the_order_to_stop_reaches_the_rank_through_ray_and_an_ended_driver_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "LISTEN_S", 0.1)
    opened, stop_ordered = open_channel(), threading.Event()
    assert not opened.order_stop()
    opened.listen_for_stop(stop_ordered)
    assert stop_ordered.wait(60) and opened.order_stop()
    opened.close()
    with pytest.raises(ray.exceptions.RayActorError):
        opened.take()
    assert not opened.order_stop()
    for thread in threading.enumerate():
        if thread.name == "stop":
            thread.join(60)
            assert not thread.is_alive()
