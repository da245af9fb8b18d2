"""`docker stop` of a container that trains: it saves the step it is in, and the same command goes on from there."""

from pathlib import Path

import pytest

from tests.containers.engine import Containers, committed_steps, last_metrics, wait_until

TRAIN = ("train", "--config", "/data/one/run/run.yaml", "--save-path", "/data/stopped", "--log-every-steps", "1")
STOPPED_BY_SIGTERM = 143


@pytest.mark.usefixtures("one_host")
def test_a_stopped_container_saves_its_step_and_the_next_one_goes_on(containers: Containers, data_dir: Path) -> None:
    run_dir = data_dir / "stopped"
    name = containers.start(*TRAIN)
    # The line of the first step: more than two epochs are left.
    wait_until(lambda: " of the epoch" in containers.logs(name), 300, lambda: containers.logs(name))
    containers.call("stop", "-t=120", name, timeout_s=150)
    stopped = containers.wait(name, 10)
    assert stopped.exit_code == STOPPED_BY_SIGTERM, stopped.output
    saved = committed_steps(run_dir)[-1]
    assert saved < committed_steps(data_dir / "one" / "run")[-1]
    assert (run_dir / f"step-{saved:06d}" / "COMMITTED").exists(), "saved because of the stop, not at an epoch's end"

    finished = containers.run(*TRAIN, timeout_s=600)
    assert finished.exit_code == 0, finished.output
    assert f"going on from /data/stopped/step-{saved:06d} (step {saved} of" in finished.output
    assert last_metrics(run_dir) == last_metrics(data_dir / "one" / "run")
