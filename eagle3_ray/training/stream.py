"""What Ray Train calls at every start of the workers to have their bins: the hook for resuming in mid-epoch.

It runs in Ray's controller, which therefore imports this module and none of the model.
"""

import ray.data

from eagle3_ray.data.pipeline import build_bin_dataset
from eagle3_ray.training.job import TrainJob
from eagle3_ray.training.run_folder import latest_committed


def build_train_stream(job: TrainJob) -> ray.data.Dataset:
    """Stream from the newest whole checkpoint on. Ray calls this anew at every start of the workers."""
    checkpoint = latest_committed(job.save_dir)
    start = 0 if checkpoint is None else checkpoint.step
    # A restart after the last checkpoint was committed has nothing left to read, but Ray wants a dataset.
    end = max(job.stop_step, start + 1)
    return build_bin_dataset(job.schedule, start, end)
