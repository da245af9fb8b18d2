"""What the container tests share: the image, a folder every container sees as /data, and one short demo in it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import Cluster, Containers, Finished, find_engine


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's side of /data. The containers' user is another one than the host's: everybody may write."""
    folder = tmp_path_factory.mktemp("data")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def containers(data_dir: Path) -> Iterator[Containers]:
    """Containers of the image under test."""
    image, engine = os.environ.get("EAGLE3_IMAGE"), find_engine()
    if image is None:
        pytest.skip("`make image-test` builds the image and names it in EAGLE3_IMAGE")
    assert engine is not None, "neither a running Docker engine nor podman is here"
    opened = Containers(engine, image, data_dir)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def one_host(containers: Containers, data_dir: Path) -> Finished:
    """The short demo in one container, under /data/one."""
    (data_dir / "one").mkdir()
    (data_dir / "one").chmod(0o777)
    finished = containers.run(
        "demo", "--short", "--output-path", "/data/one", options=["--network=none"], timeout_s=900
    )
    assert finished.exit_code == 0, finished.output
    return finished


@pytest.fixture(scope="session")
def cluster(containers: Containers) -> Iterator[Cluster]:
    """A Ray cluster of two containers."""
    started = Cluster(containers)
    try:
        started.start_head()
        started.start_worker()
        yield started
    finally:
        started.close()
