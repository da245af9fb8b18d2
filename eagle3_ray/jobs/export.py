"""`export`: turn a checkpoint into the folder a server loads, and say how to serve it."""

from eagle3_ray.console import say
from eagle3_ray.export import export_checkpoint
from eagle3_ray.verbs import ExportSettings


def run(settings: ExportSettings) -> None:
    """Export a checkpoint.

    Raises:
        CheckpointError: The checkpoint's draft is not whole or does not fit its config.
        ExportError: The checkpoint is uncommitted, the output is not free, or the server would compute
            something else.
    """
    draft = export_checkpoint(settings.checkpoint_path, settings.output_path, settings.format)
    size = f"{draft.num_tensors} tensors, {draft.num_bytes / 1e6:.1f} MB"
    say(f"exported  {settings.checkpoint_path} -> {draft.path}", "exported", path=str(draft.path))
    say(f"checked   {size}, reopened and equal")
    say(f"serve     {draft.serve_command}", "serve", command=draft.serve_command)
