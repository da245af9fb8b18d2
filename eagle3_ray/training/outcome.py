"""What a rank learns of an update once it is made, one step behind: its gradient norm, an order, a NaN."""

from eagle3_ray.errors import NonFiniteError
from eagle3_ray.training.progress import Note
from eagle3_ray.training.rank import Rank, describe_files
from eagle3_ray.training.step import StepOutcome

MAX_LEFT_OUT_IN_A_ROW = 10  # a bin or two may be bad; more of them one after the other are the draft's fault


def learn_outcome(rank: Rank) -> None:
    """Take note of the gradient norm of the last step queued, and of orders to stop or to save that it carried.

    sync: waits for that step. The ranks call it alike.

    Raises:
        NonFiniteError: A gradient was NaN or Inf, and so the update was left out, with `--on-nonfinite stop`; or one
            too many in a row. On all ranks alike.
    """
    if rank.pending is None:
        return
    pending, rank.pending = rank.pending, None
    outcome = pending.result.wait()
    rank.is_stopping = outcome.wishes.stop
    rank.is_saving |= outcome.wishes.save  # until it is done: two steps may be learnt of before that
    if outcome.is_left_out:
        take_note_of_left_out(rank, pending.step, outcome)
    else:
        rank.grad_norm, rank.num_left_out_in_a_row = outcome.grad_norm, 0


def take_note_of_left_out(rank: Rank, step: int, outcome: StepOutcome) -> None:
    """Count an update that was left out, and tell the user of it. Errors as in `learn_outcome`."""
    happened = f"step {step}: the gradient norm is {outcome.grad_norm}."
    held = f"its bins held {describe_files(rank.train_source, rank.job.schedule, step)}"
    if rank.job.settings.on_nonfinite == "stop":
        raise NonFiniteError(f"{happened} Nothing was updated; {held}. With --on-nonfinite skip a run goes on.")
    rank.num_left_out += 1
    rank.num_left_out_in_a_row += 1
    if rank.num_left_out_in_a_row > MAX_LEFT_OUT_IN_A_ROW:
        raise NonFiniteError(
            f"{happened} So it was in the {MAX_LEFT_OUT_IN_A_ROW} steps before: the draft has diverged. "
            "Lower --lr and start over, or remove the newest checkpoints and go on from an older one."
        )
    if rank.is_first:
        text = f"{happened} The update is left out ({rank.num_left_out} so far); {held}"
        rank.job.channel.tell(Note(text, "left_out", {"step": step, "left_out": rank.num_left_out}))
