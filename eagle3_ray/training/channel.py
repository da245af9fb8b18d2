"""Between the driver and rank 0, through one actor: progress goes up, the order to stop comes down.

    rank 0   `Channel.tell(item)`, which never waits                  ->  driver   `Channel.take()`, one at a time
    rank 0   a thread in `Channel.wait_for_stop`, from the first step <-  driver   `Channel.order_stop()`

No step waits for the actor: rank 0 looks at a `threading.Event`, and the all-reduce that each step does anyway tells
the other ranks.
"""

import asyncio
import contextlib
import threading
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class ChannelActor:
    """What both ends talk to. An asyncio actor: a waiter whose process is gone holds nothing up."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._early: dict[tuple[str, int], Any] = {}
        self._num_queued: dict[str, int] = {}
        self._is_queued = asyncio.Condition()
        self._stop_ordered = asyncio.Event()
        self._is_heard = False

    async def tell(self, teller: str, number: int, item: Any) -> None:
        """Take the item that this process tells as its `number`-th; calls may come in another order than made."""
        self._early[teller, number] = item
        num_queued = self._num_queued.get(teller, 0)
        while (teller, num_queued) in self._early:
            self._items.put_nowait(self._early.pop((teller, num_queued)))
            num_queued += 1
        self._num_queued[teller] = num_queued
        async with self._is_queued:
            self._is_queued.notify_all()

    async def wait_until_queued(self, teller: str, num_items: int) -> None:
        """Wait until that many items of a process are there."""
        async with self._is_queued:
            await self._is_queued.wait_for(lambda: self._num_queued.get(teller, 0) >= num_items)

    async def take(self) -> Any:
        """Return the oldest item; wait for one."""
        return await self._items.get()

    async def order_stop(self) -> bool:
        """Order rank 0 to stop, and tell whether it listens: it does once it has made a step that it could save."""
        self._stop_ordered.set()
        return self._is_heard

    async def wait_for_stop(self) -> None:
        """Wait until a stop is ordered."""
        self._is_heard = True
        await self._stop_ordered.wait()


class Channel:
    """A handle to the actor, for either end; a copy in another process is a teller of its own."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._num_told = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Channel, (self._actor,)

    def tell(self, item: object) -> None:
        """Tell the driver. Never waits, and a driver that is gone is not the run's concern."""
        self._actor.tell.remote(_this_process(), self._num_told, item)
        self._num_told += 1

    def flush(self) -> None:
        """Wait until all that was told has arrived: a process that ends takes what is still on its way with it."""
        with contextlib.suppress(RayError):
            ray.get(self._actor.wait_until_queued.remote(_this_process(), self._num_told))

    def take(self) -> Any:
        """Return the oldest item told; wait for one."""
        return ray.get(self._actor.take.remote())

    def order_stop(self) -> bool:
        """Order rank 0 to stop; False if it has not made a step yet."""
        is_heard: bool = ray.get(self._actor.order_stop.remote())
        return is_heard

    def listen_for_stop(self, stop_ordered: threading.Event) -> None:
        """Set the event, in a thread of its own, once the driver orders to stop."""

        def listen() -> None:
            try:
                ray.get(self._actor.wait_for_stop.remote())
            except RayError:
                return  # the driver is gone, and so will be this worker
            stop_ordered.set()

        threading.Thread(target=listen, name="stop", daemon=True).start()

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def _this_process() -> str:
    teller: str = ray.get_runtime_context().get_worker_id()
    return teller


def open_channel() -> Channel:
    """Start the actor on the driver's own node: it must not be lost with a node of workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Channel(ray.remote(num_cpus=0)(ChannelActor).options(scheduling_strategy=here).remote())
