"""What the driver decides once and every rank reads: one frozen description of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.packing import BinSchedule
from eagle3_ray.data.pipeline import BinSource
from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.verifier import VerifierInfo
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.progress import ProgressSender


@dataclass(frozen=True)
class TrainJob:
    """A run, fully decided.

    Attributes:
        settings: As the user gave them, every path absolute.
        verifier: Where the frozen tensors are read from.
        draft_config: Shape of the draft.
        mapping: Draft vocabulary.
        train_source: The `BinSource` of the training samples, in the object store.
        validation_source: That of the validation samples, or None without any.
        schedule: Which rank computes which training bin when.
        validation_schedule: The same for one pass over the validation bins, or None.
        stop_step: Optimizer updates after which to stop; fewer than the schedule's if the user wants to pause there.
        identity: What a checkpoint must share with this run to be resumed from.
        progress: Where rank 0 tells how far it is.
    """

    settings: TrainSettings
    verifier: VerifierInfo
    draft_config: DraftConfig
    mapping: VocabMapping
    train_source: "ray.ObjectRef[BinSource]"
    validation_source: "ray.ObjectRef[BinSource] | None"
    schedule: BinSchedule
    validation_schedule: BinSchedule | None
    stop_step: int
    identity: Mapping[str, Any]
    progress: ProgressSender

    @property
    def save_dir(self) -> StoragePath:
        """The run folder."""
        return self.settings.save_path
