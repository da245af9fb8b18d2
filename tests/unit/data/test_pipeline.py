"""The way of samples through the object store, and the dealing of rows; whole streams are in tests/integration."""

import pickle
from pathlib import Path

import pytest
import ray
import torch
from ray.train import DataConfig

from eagle3_ray.data import pipeline
from eagle3_ray.data.batch import pack_samples
from eagle3_ray.data.packing import BinSchedule
from eagle3_ray.data.pipeline import (
    TENSORS,
    SampleArrays,
    bin_execution_options,
    build_bin_dataset,
    read_arrays,
    to_sample,
)
from eagle3_ray.data.source import IndexedFile, read_samples
from tests.makers import make_spec, write_sample

LENGTHS = [20, 2, 50]


def through_the_store(arrays: list[SampleArrays]) -> tuple[list[SampleArrays], int]:
    """What arrives, in memory that cannot be written, and how many bytes lay in the pickle itself."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(arrays, protocol=5, buffer_callback=buffers.append)
    arrived: list[SampleArrays] = pickle.loads(content, buffers=[bytes(buffer.raw()) for buffer in buffers])
    return arrived, len(content)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("total_seq_len", [32, 80])
@pytest.mark.filterwarnings("error")  # of torch, about memory that cannot be written
def test_samples_from_a_task_pack_like_those_read_here(
    tmp_path: Path, version: int, dtype: torch.dtype, total_seq_len: int
) -> None:
    spec = make_spec(version)
    for length in LENGTHS:
        write_sample(tmp_path / f"{length}.pt", length, version, seed=length, dtype=dtype)
        files = [IndexedFile(str(tmp_path / f"{length}.pt"), length)]
        arrays, bad_files = read_arrays(files, spec, total_seq_len)
        arrived, num_pickled = through_the_store(arrays)
        assert bad_files == []
        assert num_pickled < 2000  # the states went beside it
        assert all(len(state) == min(length, total_seq_len + 1) for state in arrived[0].states)
        expected = pack_samples(read_samples(files, spec), total_seq_len, spec)
        found = pack_samples([to_sample(sample) for sample in arrived], total_seq_len, spec)
        assert found.num_tokens == expected.num_tokens
        for name in TENSORS:
            tensor, wanted = found.__dict__[name], expected.__dict__[name]
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name


@pytest.mark.parametrize(("bins_per_step", "num_workers"), [(1, 1), (2, 2), (7, 3)])
def test_rows_of_many_deals_reach_their_ranks(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, bins_per_step: int, num_workers: int
) -> None:
    monkeypatch.setattr(pipeline, "MIN_STEPS_PER_DEAL", 2)
    schedule = BinSchedule(23, bins_per_step, num_workers, epochs=2)
    start, end = 1, schedule.total_steps
    dataset = build_bin_dataset(schedule, start, end)
    node_ids = [ray.get_runtime_context().get_node_id()] * num_workers
    config = DataConfig(execution_options=bin_execution_options())
    shards = [split["train"] for split in config.configure({"train": dataset}, num_workers, None, node_ids)]
    refs = [ray.remote(rows_of).remote(shard, num_workers) for shard in shards]
    for rank, rows in enumerate(ray.get(refs)):
        expected = [schedule.row(s, rank, m) for s in range(start, end) for m in range(schedule.micro_steps)]
        assert rows == expected


def rows_of(shard: ray.data.DataIterator, num_workers: int) -> list[int]:
    """All rows that a rank is dealt."""
    return list(pipeline.iter_dealt(shard, num_workers))
