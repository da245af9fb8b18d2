"""Which samples `train` plans with, and which it leaves out: as `--on-bad-sample` says, and as the run began."""

import sys

import ray

from eagle3_ray.config import TrainSettings
from eagle3_ray.console import say
from eagle3_ray.data.bad_files import BadFile
from eagle3_ray.data.index import SampleIndex, Survey, build_index, survey_folder
from eagle3_ray.data.planned import read_planned, write_planned
from eagle3_ray.data.quarantine import Quarantine
from eagle3_ray.data.samples import SampleSpec
from eagle3_ray.data.source import ANOTHER_LENGTH
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.run_folder import SAMPLES, CommittedCheckpoint


def choose_samples(
    settings: TrainSettings, spec: SampleSpec, checkpoint: CommittedCheckpoint | None, quarantine: Quarantine
) -> SampleIndex:
    """Look at all files, and return the samples to plan with.

    A run that goes on plans with the files it began with, whatever became of them: they have their place in the plan
    even where they are left out.

    Args:
        settings: of the run.
        spec: what each sample must look like.
        checkpoint: what the run goes on from, if anything.
        quarantine: is told which files are left out.

    Raises:
        DataError: There is no sample, or more bad files than the settings allow.
        ClusterError: A task was lost for good.
    """
    data_path = str(settings.data_path)
    if settings.on_bad_sample == "fail":
        return build_index(data_path, spec, settings.scan)
    planned = None if checkpoint is None else read_planned(settings.save_path / SAMPLES, data_path)
    if planned is None:
        survey = survey_folder(data_path, spec, settings.scan, max_named=sys.maxsize)
        quarantine.begin(survey.num_files, survey.bad_files.named.values())
        quarantine.check()
        index = survey.to_index()
    else:
        quarantine.read(len(planned.paths))
        survey = survey_folder(data_path, spec, settings.scan, sys.maxsize, leave_out=quarantine.paths)
        for file in files_gone_bad(planned, survey, quarantine.paths):
            quarantine.leave_out(file)
        quarantine.check()
        index = planned
    return index


def tell_left_out(quarantine: Quarantine) -> None:
    """Tell the user how many files are left out, if any."""
    if quarantine.paths:
        say(
            f"{describe_left_out(quarantine)}; {quarantine.path} lists them",
            "bad_samples",
            files=len(quarantine.paths),
            path=str(quarantine.path),
        )


def describe_left_out(quarantine: Quarantine) -> str:
    """Say how many files are left out."""
    return f"{len(quarantine.paths):,} of {quarantine.num_files:,} .pt files are no usable samples and left out"


def files_gone_bad(planned: SampleIndex, survey: Survey, known: frozenset[str]) -> list[BadFile]:
    """Return the files of the plan that are no longer what they were, but for those known to be bad."""
    gone_bad = []
    for path, num_tokens in zip(planned.paths, planned.num_tokens.tolist(), strict=True):
        if path in known:
            continue
        if path in survey.bad_files.named:
            gone_bad.append(survey.bad_files.named[path])
        elif path not in survey.facts:
            gone_bad.append(BadFile(path, ("gone",), "is gone, was there when the run began."))
        elif survey.facts[path].num_tokens != num_tokens:
            found = survey.facts[path].num_tokens
            text = f"has {found} tokens, had {num_tokens} when the run began."
            gone_bad.append(BadFile(path, (ANOTHER_LENGTH,), text))
    return gone_bad


def record_samples(job: TrainJob, quarantine: Quarantine, is_new: bool) -> None:
    """Store in the run folder what a run is planned with, and what it leaves out.

    Args:
        job: the run.
        quarantine: what it leaves out.
        is_new: it does not go on from a checkpoint.

    Raises:
        DataError: The run folder cannot be written.
        StorageError: It lies on an object store that cannot be written.
    """
    if is_new:
        sources = [ref for ref in (job.train_source, job.validation_source) if ref is not None]
        write_planned(job.save_dir / SAMPLES, [source.index for source in ray.get(sources)])
    if is_new or job.settings.on_bad_sample == "quarantine":
        quarantine.store()
