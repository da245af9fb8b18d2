"""`export`: turn a checkpoint into the folder a server loads, and say how to serve it."""

from eagle3_ray.config import ExportSettings
from eagle3_ray.export import export_checkpoint


def run(settings: ExportSettings) -> None:
    """Export a checkpoint.

    Raises:
        CheckpointError: The checkpoint's draft is not whole or does not fit its config.
        ExportError: The checkpoint is uncommitted, the output is not free, or the server would compute
            something else.
    """
    draft = export_checkpoint(settings.checkpoint_path, settings.output_path, settings.format)
    size = f"{draft.num_tensors} tensors, {draft.num_bytes / 1e6:.1f} MB"
    print(f"exported  {settings.checkpoint_path} -> {draft.path}")
    print(f"checked   {size}, reopened and equal")
    print(f"serve     {draft.serve_command}")
