"""`plan.json` of the run folder: what a run is planned with, in numbers, and what it runs on; `report` shows it.

The driver writes it anew each time the workers are about to start: it tells of the machines that were last at it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from eagle3_ray.errors import CheckpointError, DataError
from eagle3_ray.storage import StoragePath, write_atomically


@dataclass(frozen=True)
class SplitNumbers:
    """How the samples trained on, or those validated on, are packed.

    Attributes:
        samples: Files.
        tokens: Of all of them.
        bins: They are packed into.
        fill_frac: Share (0..1) of the bins' positions that belong to samples.
        dropped: Samples without a supervised token, in no bin.
        cut: Samples longer than a bin.
    """

    samples: int
    tokens: int
    bins: int
    fill_frac: float
    dropped: int
    cut: int


@dataclass(frozen=True)
class StepNumbers:
    """The run's steps; it ends or pauses after `stop_step`."""

    bins_per_step: int
    steps_per_epoch: int
    total_steps: int
    stop_step: int


@dataclass(frozen=True)
class MachineNumbers:
    """What the run has of the cluster, and the machine of its driver.

    Attributes:
        workers: Ranks; of an elastic run, as many as there may be.
        cpus_per_worker: CPUs of each.
        use_gpu: Whether each has a GPU.
        nodes: Of the cluster.
        num_gpus: Of the cluster.
        gpu_kinds: As Ray names them.
        driver_cpus: CPUs that the driver may use.
        driver_processor: What its system calls it.
        driver_memory_bytes: Of its machine.
        driver_system: Name and release.
    """

    workers: int
    cpus_per_worker: int
    use_gpu: bool
    nodes: int
    num_gpus: int
    gpu_kinds: tuple[str, ...]
    driver_cpus: int
    driver_processor: str
    driver_memory_bytes: int
    driver_system: str


@dataclass(frozen=True)
class PlanRecord:
    """All of the file; `validation` is None where nothing is validated on."""

    training: SplitNumbers
    validation: SplitNumbers | None
    steps: StepNumbers
    machine: MachineNumbers
    versions: Mapping[str, str]


def write_plan(path: StoragePath, record: PlanRecord) -> None:
    """Store a run's numbers.

    Raises:
        CheckpointError: The disk cannot be written.
        StorageError: The object store cannot be written.
    """
    try:
        write_atomically(path, json.dumps(asdict(record), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}).") from error


def read_plan(path: StoragePath) -> PlanRecord | None:
    """Return a run's numbers; None of a run that stored none.

    Raises:
        DataError: The file is damaged.
        StorageError: The object store cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
        machine = record["machine"]
        return PlanRecord(
            training=SplitNumbers(**record["training"]),
            validation=None if record["validation"] is None else SplitNumbers(**record["validation"]),
            steps=StepNumbers(**record["steps"]),
            machine=MachineNumbers(**{**machine, "gpu_kinds": tuple(machine["gpu_kinds"])}),
            versions={str(name): str(version) for name, version in record["versions"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error!r}), expected the numbers that train stores there. Move it away: "
            "train writes it anew when the run goes on."
        ) from error
