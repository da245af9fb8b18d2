"""A process that reads sample files for `test_fuzzed_samples` and may die of them: a path a line, a verdict a line.

It reads each file as an index does and as a rank does, and holds what comes out against what a sample must be. Memory
and time are bounded, and what a file must never cause (a program, a connection, a file written) is listened for.
"""

import json
import os
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch

from eagle3_ray.data.batch import pack_samples
from eagle3_ray.data.pipeline import read_arrays, to_sample
from eagle3_ray.data.samples import (
    Sample,
    SampleSpec,
    check_finite,
    describe_problems,
    inspect_sample,
    inspect_tokens,
    read_sample,
)
from eagle3_ray.data.source import IndexedFile
from eagle3_ray.errors import SampleFormatError
from tests.makers import make_spec

MEMORY_BYTES = 2**28  # beyond what the process holds before the first file
TIME_LIMIT_S = 30
MAX_TEXT_LENGTH = 4000
TOTAL_SEQ_LEN = 64
FORBIDDEN_EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "subprocess", "socket", "shutil")
SEEN_EVENTS: list[str] = []


def main() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    read_file(sys.argv[1], 1)  # whatever is imported or opened by the first file is by now
    limit_memory()
    sys.addaudithook(note_forbidden)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(TIME_LIMIT_S)
        print(json.dumps(judge(request["path"], request["version"])), flush=True)
        signal.alarm(0)


def limit_memory() -> None:
    """Let no more than `MEMORY_BYTES` be taken from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def note_forbidden(event: str, arguments: tuple[object, ...]) -> None:
    """Note a program started, a connection, a file removed or opened to be written."""
    is_writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if is_writing or event.startswith(FORBIDDEN_EVENTS):
        SEEN_EVENTS.append(f"{event} {arguments}")


def judge(path: str, version: int) -> dict[str, str | None]:
    """Return what the file is, and what is wrong with the reader if anything."""
    SEEN_EVENTS.clear()
    fault = None
    try:
        verdict = read_file(path, version)
    except BaseException:  # noqa: BLE001
        verdict, fault = "fault", traceback.format_exc()
    return {"verdict": verdict, "fault": fault or "; ".join(SEEN_EVENTS) or None}


def read_file(path: str, version: int) -> str:
    """Read the file in every way there is; return "good" or the first problem's kind."""
    spec = make_spec(version)
    tokens = inspect_tokens(path, version, spec.vocab_size)
    inspected = inspect_sample(path, spec)
    for problems in (tokens, inspected):
        if isinstance(problems, list):
            assert problems
            check_text(describe_problems(problems))
    if isinstance(inspected, Sample):
        assert isinstance(tokens, tuple)
        assert torch.equal(tokens[0], inspected.input_ids) and torch.equal(tokens[1], inspected.loss_mask)
    try:
        sample = read_sample(path, spec)
        check_finite(sample)
    except SampleFormatError as error:
        check_text(str(error))
        return inspected[0].kind if isinstance(inspected, list) else "NaN or Inf"
    assert isinstance(inspected, Sample)
    check_sample(sample, spec)
    return "good"


def check_text(text: str) -> None:
    """A text that any terminal and any log takes."""
    text.encode()
    assert 0 < len(text) < MAX_TEXT_LENGTH, text


def check_sample(sample: Sample, spec: SampleSpec) -> None:
    """All that a sample must be, and that it packs, here and from a task."""
    num_tokens = len(sample.input_ids)
    assert sample.input_ids.dtype == torch.int64 and sample.input_ids.shape == (num_tokens,) and num_tokens > 0
    assert all(0 <= token < spec.vocab_size for token in sample.input_ids.tolist())
    assert sample.loss_mask.dtype == torch.bool and sample.loss_mask.shape == (num_tokens,)
    widths = [state.shape[1] for state in sample.aux_states]
    assert sum(widths) == spec.num_aux_layers * spec.hidden_size and sample.last_state.shape[1] == spec.hidden_size
    for state in (*sample.aux_states, sample.last_state):
        assert state.dim() == 2 and len(state) == num_tokens and state.is_floating_point()
        assert not state.requires_grad and torch.isfinite(state).all()
    packed = pack_samples([sample], TOTAL_SEQ_LEN, spec)
    assert not packed.aux_states.requires_grad and torch.isfinite(packed.last_state).all()
    (arrays,), _ = read_arrays([IndexedFile(sample.path, num_tokens)], spec, TOTAL_SEQ_LEN)
    again = pack_samples([to_sample(arrays)], TOTAL_SEQ_LEN, spec)
    assert torch.equal(packed.last_state, again.last_state) and torch.equal(packed.aux_states, again.aux_states)


if __name__ == "__main__":
    main()
