"""What the driver decides once and every rank reads: one frozen description of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from eagle3_ray.config import TrainSettings
from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.packing import BinSchedule
from eagle3_ray.data.pipeline import BinSource
from eagle3_ray.data.samples import raise_bad_file
from eagle3_ray.data.vocab import VocabMapping
from eagle3_ray.model.config import DraftConfig
from eagle3_ray.model.verifier import VerifierInfo
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.channel import Channel
from eagle3_ray.training.run_folder import CommittedCheckpoint, is_step_folder
from eagle3_ray.training.stagnation import Stagnation


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
        schedule: Which rank computes which training bin when; of an elastic run, where there are as many as there may.
        validation_schedule: The same for one pass over the validation bins, or None.
        stop_step: Optimizer updates after which to stop; fewer than the schedule's if the user wants to pause there.
        identity: What a checkpoint must share with this run to be resumed from.
        channel: Where rank 0 tells how far it is, and is told to stop.
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
    channel: Channel

    @property
    def save_dir(self) -> StoragePath:
        """The run folder."""
        return self.settings.save_path

    def on_workers(self, num_workers: int) -> "TrainJob":
        """Return the same run, steps and bins of a step included, dealt out to so many ranks."""
        schedule, validation = replace(self.schedule, num_workers=num_workers), self.validation_schedule
        if validation is not None:
            validation = replace(validation, bins_per_step=num_workers, num_workers=num_workers)
        return replace(self, schedule=schedule, validation_schedule=validation)

    def leave_out_bad_file(self, file: BadFile) -> None:
        """Have a file that has gone bad left out, of which the driver takes note; or end the run.

        Raises:
            SampleFormatError: The run has no place for bad files.
        """
        if self.settings.on_bad_sample == "fail":
            raise_bad_file(file)
        self.channel.tell(file)

    def owes_validation(self, checkpoint: CommittedCheckpoint) -> bool:
        """Tell whether a run was stopped at the end of an epoch, before its validation: that comes first now."""
        is_epoch_end = checkpoint.step % self.schedule.steps_per_epoch == 0
        return is_epoch_end and is_step_folder(checkpoint.path.name)

    def is_complete(self, checkpoint: CommittedCheckpoint) -> bool:
        """Tell whether nothing is left to do after this checkpoint."""
        if self.settings.dry_run:
            return True
        has_ended = checkpoint.step >= self.stop_step or self.has_stagnated(checkpoint.stagnation)
        return has_ended and not self.owes_validation(checkpoint)

    def has_stagnated(self, stagnation: Stagnation) -> bool:
        """Tell whether the run ends early, since validation has not improved for long enough."""
        return stagnation.is_over(self.settings.early_stop_epochs)
