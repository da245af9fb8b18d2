"""What a task on a node sees of the places that a run needs; no Ray: the tasks run here."""

import re
from pathlib import Path

import pytest

from eagle3_ray.errors import ClusterError
from eagle3_ray.jobs.checks import see_places, see_versions
from eagle3_ray.jobs.nodes import NodeReport, Places, existing_part, file_to_see, look_around, own_versions
from eagle3_ray.model.verifier import read_verifier_config
from tests.makers import write_sample


def make_places(folder: Path, parity: Path, name: str) -> Places:
    verifier = read_verifier_config(str(parity / "verifier"))
    return Places((folder, name), folder / "logs" / "new", (str(folder / "data" / "0.pt"),), 1, verifier)


def test_a_node_that_sees_everything_tells_no_problem_and_leaves_nothing(tmp_path: Path, parity: Path) -> None:
    write_sample(tmp_path / "data" / "0.pt")
    before = sorted(tmp_path.rglob("*"))
    with file_to_see(tmp_path) as name:
        report = look_around(make_places(tmp_path, parity, name))
    assert report.problems == () and report.versions == own_versions() and report.host
    assert sorted(tmp_path.rglob("*")) == before


def test_a_node_tells_every_place_it_does_not_see(tmp_path: Path, parity: Path) -> None:
    places = make_places(tmp_path, parity, "written-by-the-driver-elsewhere")
    (tmp_path / "logs").write_text("a file")
    problems = look_around(places).problems
    assert len(problems) == 3
    assert problems[0].startswith(f"--save-path: {tmp_path} is not the folder that the driver sees there.")
    assert problems[1].startswith(f"{tmp_path}/logs: cannot be written to (File exists). Choose another --log-dir")
    assert problems[2].startswith(f"{tmp_path}/data/0.pt: cannot be opened") and "every node must see" in problems[2]


def test_places_that_are_not_known_are_not_looked_for() -> None:
    assert look_around(Places(None, None, (), 1, None)).problems == ()


def test_what_a_node_cannot_use_is_a_problem_of_the_cluster() -> None:
    reports = [NodeReport("a", own_versions(), (), None), NodeReport("b", own_versions(), ("x: cannot",), None)]
    with pytest.raises(ClusterError, match="not every node can use all it needs:\nb: x: cannot"):
        see_places(reports)


def test_another_torch_is_a_problem_and_another_numpy_a_warning() -> None:
    here = own_versions()
    same, other = NodeReport("a", here, (), None), {**here, "torch": "2.0.0"}
    assert see_versions([same]).advice == "" and f"torch {here['torch']}" in see_versions([same]).found
    with pytest.raises(ClusterError, match=re.escape(f"torch is 2.0.0 on b, {here['torch']} here. Run the same")):
        see_versions([same, NodeReport("b", other, (), None)])
    warned = see_versions([same, NodeReport("b", {**here, "numpy": "1.0"}, (), None)])
    assert warned.advice and warned.found == f"numpy is 1.0 on b, {here['numpy']} here."


def test_the_part_of_a_path_that_is_there_is_found(tmp_path: Path) -> None:
    assert existing_part(tmp_path) == tmp_path
    assert existing_part(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "a").symlink_to("nowhere")
    assert existing_part(tmp_path / "a" / "b") == tmp_path / "a"
