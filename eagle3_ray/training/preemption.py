"""A node that is about to be taken away (a spot instance, a drained Kubernetes node): the ranks save while it is there.

Ray Train's watcher tells each worker. The public way to read it, `ray.train.get_preemption_info`, is a barrier of all
ranks through an actor, too slow for every step; here rank 0 alone looks at what its own process was told, and its wish
to save travels with the step's reduction. When the node goes, Ray Train starts the workers anew from that checkpoint;
without `--max-failures` only if it hears of the lost node before it hears of the lost worker.
"""

import time

from ray.train import PreemptionInfo

# The context of a worker has no public name.
from ray.train.v2._internal.execution.context import get_train_context


class PreemptionNotices:
    """Tells of each node once that is about to be taken away."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def read_new(self) -> str | None:
        """Say which nodes are new since the last call, and when they go; None if there are none."""
        info: PreemptionInfo | None = get_train_context().preemption_context.preemption_info
        new = [] if info is None else [node for node in info.preempted_node_ids if node not in self._known]
        if info is None or not new:
            return None
        self._known.update(new)
        ranks = sorted({rank for node in new for rank in info.preempted_node_to_ranks[node]})
        when = "" if info.deadline_ms is None else f" in {max(info.deadline_ms / 1000 - time.time(), 0):.0f} s"
        return f"the node of rank {', '.join(map(str, ranks))} is about to be taken away{when}"
