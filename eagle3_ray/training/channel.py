"""Between the driver and the ranks, through one actor: progress goes up, the order to stop comes down.

    rank 0   `Channel.tell(item)`, which never waits                    ->  driver   `Channel.take()`, one at a time
    rank 0   a thread in `Channel.listen_for_stop`, from its first step <-  driver   `Channel.order_stop()`
    any      a thread that calls `Channel.pulse`                       <->  all ranks: where each is, who is stuck

No step waits for the actor: rank 0 looks at a `threading.Event`, and the all-reduce that each step does anyway tells
the other ranks.
"""

import asyncio
import contextlib
import math
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eagle3_ray.training.pulses import Mark, Pulses, Stuck

LISTEN_S = 5.0
HEARD_FOR_S = 60.0  # since rank 0 was last heard: it may be starting again, or be gone for good
FLUSH_TIMEOUT_S = 30.0


class ChannelActor:
    """What both ends talk to. An asyncio actor: a waiter whose process is gone holds nothing up."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._early: dict[tuple[str, int], Any] = {}
        self._num_queued: dict[str, int] = {}
        self._is_queued = asyncio.Condition()
        self._stop_ordered = asyncio.Event()
        self._heard_s = -math.inf
        self._pulses = Pulses()

    async def tell(self, teller: str, number: int, item: Any) -> None:
        """Take the item that this process tells as its `number`-th; calls may come in another order than made."""
        num_queued = self._num_queued.get(teller, 0)
        if number < num_queued:
            return  # told again, since Ray did not see that it had arrived
        self._early[teller, number] = item
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
        return time.monotonic() - self._heard_s < HEARD_FOR_S

    async def listen_for_stop(self) -> bool:
        """Wait a while for the order to stop, and tell whether it has come."""
        self._heard_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_ordered.wait(), LISTEN_S)
        return self._stop_ordered.is_set()

    async def pulse(self, group: str, num_ranks: int, rank: int, mark: Mark, timeout_s: float) -> list[Stuck]:
        """Take note of where a rank is; as `Pulses.take`."""
        return self._pulses.take(group, num_ranks, rank, mark, time.monotonic(), timeout_s)


class Channel:
    """A handle to the actor, for either end; a copy in another process is a teller of its own."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._num_told = 0
        self._lock = threading.Lock()  # checkpoints are told of by a thread of their own

    def __reduce__(self) -> tuple[Any, ...]:
        return Channel, (self._actor,)

    def tell(self, item: object) -> None:
        """Tell the driver. Never waits, and a driver that is gone is not the run's concern."""
        with self._lock:
            self._actor.tell.remote(_this_process(), self._num_told, item)
            self._num_told += 1

    def flush(self) -> None:
        """Wait until all that was told has arrived: a process that ends takes what is still on its way with it."""
        with contextlib.suppress(RayError):
            ray.get(self._actor.wait_until_queued.remote(_this_process(), self._num_told), timeout=FLUSH_TIMEOUT_S)

    def take(self) -> Any:
        """Return the oldest item told; wait for one."""
        return ray.get(self._actor.take.remote())

    def order_stop(self) -> bool:
        """Order rank 0 to stop, as often as one likes; False if it has not made a step yet, or is gone."""
        try:
            is_heard: bool = ray.get(self._actor.order_stop.remote())
        except RayActorError:
            return False
        return is_heard

    def listen_for_stop(self, stop_ordered: threading.Event) -> None:
        """Set the event, in a thread of its own, once the driver orders to stop."""

        def listen() -> None:
            # Goes on until the process ends, through its last save too: the driver gives up a rank that is not heard.
            while True:
                try:
                    is_ordered = ray.get(self._actor.listen_for_stop.remote())
                except RayError:
                    return  # the driver is gone, and so will be this worker
                if is_ordered:
                    stop_ordered.set()
                    time.sleep(LISTEN_S)

        threading.Thread(target=listen, name="stop", daemon=True).start()

    def pulse(self, group: str, num_ranks: int, rank: int, mark: Mark, timeout_s: float) -> list[Stuck]:
        """Tell where a rank is, and learn who is stuck; nobody if the driver is gone, and so will be this worker."""
        stuck: list[Stuck] = []
        with contextlib.suppress(RayError):
            stuck = ray.get(self._actor.pulse.remote(group, num_ranks, rank, mark, timeout_s))
        return stuck

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def _this_process() -> str:
    teller: str = ray.get_runtime_context().get_worker_id()
    return teller


def open_channel() -> Channel:
    """Start the actor on the driver's own node: it must not be lost with a node of workers."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # A call that a broken connection has lost is made again; each can be made twice.
    options = {"scheduling_strategy": here, "max_task_retries": -1}
    return Channel(ray.remote(num_cpus=0)(ChannelActor).options(**options).remote())
