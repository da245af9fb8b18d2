"""The numbers of a run's plan, and of what it runs on, for `plan.json` of the run folder."""

import os
import platform
from pathlib import Path

import ray

from eagle3_ray.data.pipeline import BinSource
from eagle3_ray.jobs.cluster import WorkerRequest, cluster_resources
from eagle3_ray.machine import usable_cpus
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.plan_file import MachineNumbers, PlanRecord, SplitNumbers, StepNumbers, write_plan
from eagle3_ray.training.run_folder import PLAN
from eagle3_ray.versions import installed_versions

ACCELERATOR = "accelerator_type:"  # how Ray names a kind of GPU among a cluster's resources


def record_plan(job: TrainJob, workers: WorkerRequest) -> None:
    """Store the numbers in the run folder. Errors as in `write_plan`."""
    schedule, validation = job.schedule, job.validation_source
    record = PlanRecord(
        training=describe_split(ray.get(job.train_source)),
        validation=None if validation is None else describe_split(ray.get(validation)),
        steps=StepNumbers(schedule.bins_per_step, schedule.steps_per_epoch, schedule.total_steps, job.stop_step),
        machine=describe_machine(workers),
        versions={"python": platform.python_version(), **installed_versions()},
    )
    write_plan(job.save_dir / PLAN, record)


def describe_split(source: BinSource) -> SplitNumbers:
    """Return how one part of the samples is packed."""
    plan = source.plan
    num_tokens = int(source.index.num_tokens.sum())
    return SplitNumbers(
        len(source.index.paths), num_tokens, len(plan.bins), plan.fill_frac, plan.num_dropped, plan.num_cut
    )


def describe_machine(workers: WorkerRequest) -> MachineNumbers:
    """Return what the run has of the cluster, and what the driver's own machine is."""
    resources = cluster_resources()
    kinds = sorted(name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    return MachineNumbers(
        workers=workers.num_workers,
        cpus_per_worker=workers.cpus_per_worker,
        use_gpu=workers.use_gpu,
        nodes=sum(node["Alive"] for node in ray.nodes()),
        num_gpus=int(resources.get("GPU", 0)),
        gpu_kinds=tuple(kinds),
        driver_cpus=usable_cpus(),
        driver_processor=processor_name(Path("/proc/cpuinfo")),
        driver_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        driver_system=f"{platform.system()} {platform.release()}",
    )


def processor_name(cpuinfo: Path) -> str:
    """Return what the system calls its processor, or its architecture where it does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()
