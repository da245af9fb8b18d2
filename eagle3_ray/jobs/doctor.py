"""`doctor`: every check that `train` makes before it trains, and what the run would take; nothing is trained.

The checks call what `train` calls, in its order. One that finds a problem does not end the others: those that go on
from what it would have found are skipped, and say so. Nothing is written that stays, but the samples' index cache.

    Ray - workers - object store             save path - nodes - versions, places
    run folder - data                        data - steps - resume
    verifier - layers - data                           `- disk, memory, time
                 `- vocabulary - draft
"""

import contextlib
import functools

from eagle3_ray.background import in_background
from eagle3_ray.config import DoctorSettings, TrainSettings
from eagle3_ray.jobs.checks import (
    see_data,
    see_draft,
    see_layers,
    see_nodes,
    see_object_store,
    see_places,
    see_pretrained,
    see_ray,
    see_resume,
    see_run_folder,
    see_save_path,
    see_verifier,
    see_versions,
    see_vocabulary,
    see_workers,
)
from eagle3_ray.jobs.findings import Outcome, Report, Seen
from eagle3_ray.jobs.outlook import see_disk, see_memory, see_steps, see_time
from eagle3_ray.jobs.train import read_verifier, with_absolute_paths
from eagle3_ray.model.pretrained import PretrainedDraft
from eagle3_ray.stopping import when_stopped


@when_stopped("; nothing was changed")
def run(settings: DoctorSettings) -> None:
    """Make and tell every check.

    Raises:
        Eagle3RayError: Of the kind of the first problem, once all checks are told.
    """
    report = Report()
    with contextlib.ExitStack() as stack:
        examine(with_absolute_paths(settings), settings.time_steps, report, stack)
    report.finish()


def examine(settings: TrainSettings, num_timed_steps: int, report: Report, stack: contextlib.ExitStack) -> None:
    """Make the checks in order; Ray runs until the stack is closed."""
    reading = in_background(functools.partial(read_verifier, settings.verifier_name_or_path), "verifier")
    started = report.check("Ray", lambda: see_ray(stack))
    workers = report.check("workers", lambda: see_workers(settings), [started])
    verifier = report.check("verifier", lambda: see_verifier(reading.result()))
    layers = report.check("layers", lambda: see_layers(settings, verifier.value), [verifier])
    report.check("object store", lambda: see_object_store(settings, verifier.value, layers.value), [started, layers])
    folder = report.check("run folder", lambda: see_run_folder(settings))
    checkpoint = None if folder.seen is None else folder.value
    data = report.check("data", lambda: see_data(settings, verifier.value, layers.value, checkpoint), [started, layers])
    pretrained: Outcome[PretrainedDraft | None] = Outcome("pretrained", Seen(None, "none is named"))
    if settings.from_pretrained is not None:
        pretrained = report.check(
            "pretrained", lambda: see_pretrained(settings, verifier.value, layers.value, checkpoint), [layers]
        )
    vocabulary = report.check(
        "vocabulary",
        lambda: see_vocabulary(settings, verifier.value, pretrained.value),
        [started, verifier, pretrained],
    )
    draft = report.check(
        "draft", lambda: see_draft(settings, verifier.value, vocabulary.value, layers.value), [vocabulary, layers]
    )
    save_path = report.check("save path", lambda: see_save_path(settings))
    nodes = report.check("nodes", lambda: see_nodes(settings, save_path, data, verifier), [started])
    report.check("versions", lambda: see_versions(nodes.value), [nodes])
    report.check("places", lambda: see_places(nodes.value), [nodes])
    steps = report.check(
        "steps",
        lambda: see_steps(settings, data.value.split.plan, workers.value, folder.value),
        [workers, data, folder],
    )
    if checkpoint is not None:
        report.check(
            "resume",
            lambda: see_resume(settings, checkpoint, draft.value, vocabulary.value, data.value, steps.value),
            [draft, data, steps],
        )
    report.check(
        "disk",
        lambda: see_disk(save_path.value, draft.value, settings, workers.value, steps.value),
        [save_path, draft, workers, steps],
    )
    report.check(
        "memory",
        lambda: see_memory(settings, draft.value, data.value.split, workers.value, steps.value, nodes.value),
        [draft, data, workers, steps, nodes],
    )
    if num_timed_steps:
        report.check(
            "time",
            lambda: see_time(
                settings, verifier.value, draft.value, vocabulary.value.mapping, data.value.split, workers.value,
                steps.value, num_timed_steps,
            ),
            [draft, data, workers, steps],
        )  # fmt: skip
