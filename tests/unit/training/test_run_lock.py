"""One run at a time in a run folder: who holds it is named, and who dies lets it go."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from eagle3_ray.errors import CheckpointError
from eagle3_ray.storage import ObjectPath
from eagle3_ray.training.run_folder import LOCK
from eagle3_ray.training.run_lock import hold_run

HOLD = """
import subprocess, sys
from pathlib import Path
from eagle3_ray.training.run_lock import hold_run

with hold_run(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    child.wait()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the folder, and has a child as the driver has its Ray; its first line is the child's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_run_is_refused_and_told_who_holds_the_folder_until_the_first_is_killed(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    began = datetime.now(UTC)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    with pytest.raises(CheckpointError) as caught, hold_run(tmp_path):
        pass
    assert caught.value.exit_code == 4
    found = re.fullmatch(
        rf"{re.escape(str(tmp_path))}: another run writes there, process {holder.pid} on host "
        rf"{re.escape(socket.gethostname())} since (\S+)\. "
        r"Wait until it ends, stop it, or choose another --save-path\.",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    assert abs((datetime.fromisoformat(found[1]) - began).total_seconds()) < 600
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    os.kill(child, 0)  # the child lives on, and holds nothing
    with hold_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process_id"] == os.getpid()


def test_the_lock_is_let_go_at_the_end_of_the_block_however_it_ends(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), hold_run(tmp_path):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} on host"), hold_run(tmp_path):
                pass
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_what_a_dead_run_left_in_the_file_means_nothing_and_is_written_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "elsewhere", "process_id": 1, "since": "2020-01-01T00:00:00Z"}' * 9)
    with hold_run(tmp_path):
        assert set(json.loads((tmp_path / LOCK).read_text())) == {"host", "process_id", "since"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_holder_that_has_not_written_its_name_yet_is_refused_to_all_the_same(text: str, tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(text)
        file.flush()
        with pytest.raises(CheckpointError, match="another run writes there, which has only begun"), hold_run(tmp_path):
            pass


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_the_file_system_refuses_locks_the_run_goes_on_with_a_warning(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold_run(tmp_path), hold_run(tmp_path):
        pass
    said = (
        f"warning: {tmp_path}: its file system refuses locks ({os.strerror(refusal)}); nothing keeps a second run out"
    )
    assert capsys.readouterr().out.count(said) == 2


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(CheckpointError, match=r"run\.lock: cannot be written \(Is a directory\)"), hold_run(tmp_path):
        pass


def test_an_object_store_has_no_lock_and_is_not_asked_for_one() -> None:
    with hold_run(ObjectPath("s3://nowhere/run")), hold_run(ObjectPath("s3://nowhere/run")):
        pass
