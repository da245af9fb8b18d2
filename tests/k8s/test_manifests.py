"""Every overlay renders to what a cluster would take, and each rule that says so notices when it is broken."""

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import operator_rules, project_rules
from tests.k8s.breaks import REMOVED, RULE_BREAKS, SCHEMA_BREAKS, put
from tests.k8s.check import problems
from tests.k8s.manifests import OVERLAYS, REPOSITORY, SECRETS_TEMPLATE, Manifest, ManifestError, of_kind, parse, render
from tests.k8s.schema import check_value

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the manifests; it is not here")

cached_render = functools.cache(render)


def rendered(overlay: str) -> list[Manifest]:
    """An overlay's objects, for a test to break."""
    return copy.deepcopy(cached_render(REPOSITORY / "k8s" / "overlays" / overlay))


def job_of(manifests: list[Manifest], name: str = "eagle3-train") -> Manifest:
    return next(job for job in of_kind(manifests, "RayJob") if job["metadata"]["name"] == name)


def broken(changes: dict[str, Any]) -> tuple[Manifest, list[Manifest]]:
    """The overlay single-node with a changed eagle3-train."""
    manifests = rendered("single-node")
    job = job_of(manifests)
    for path, value in changes.items():
        put(job, path, value)
    return job, manifests


@pytest.mark.parametrize("overlay", [folder.name for folder in OVERLAYS])
def test_an_overlay_has_no_problem(overlay: str) -> None:
    assert list(problems(rendered(overlay))) == []


@pytest.mark.parametrize("kind", [*SCHEMA_BREAKS, *RULE_BREAKS])
def test_what_is_broken_is_named(kind: str) -> None:
    changes, said = (SCHEMA_BREAKS | RULE_BREAKS)[kind]
    found = list(problems(broken(changes)[1]))
    assert any(said in problem for problem in found), found


def test_every_rule_has_its_break() -> None:
    """A rule that nothing in the table breaks could be empty."""
    told_by: set[Callable[..., Any]] = set()
    for changes, said in RULE_BREAKS.values():
        job, manifests = broken(changes)
        told_by |= {rule for rule in operator_rules.RULES if said in "\n".join(rule(job))}
        told_by |= {rule for rule in project_rules.JOB_RULES if said in "\n".join(rule(job, manifests))}
        told_by |= {rule for rule in project_rules.RULES if said in "\n".join(rule(job))}
    assert told_by == {*operator_rules.RULES, *project_rules.JOB_RULES, *project_rules.RULES} - {
        project_rules.secret_values  # broken below: it is not about jobs
    }


@pytest.mark.parametrize("overlay", [folder.name for folder in OVERLAYS])
def test_jobs_are_of_the_three_verbs_and_share_one_image(overlay: str) -> None:
    jobs = of_kind(rendered(overlay), "RayJob")
    assert {job["metadata"]["name"] for job in jobs} >= {"eagle3-generate", "eagle3-vocab-mapping", "eagle3-train"}
    for job in jobs:
        assert (
            job["metadata"]["name"]
            == job["spec"]["jobId"]
            == f"eagle3-{job['metadata']['labels'][project_rules.COMPONENT]}"
        )
    assert len(set(re.findall(r"image: (\S+)", yaml.dump(jobs)))) == 1


def test_settings_that_the_schema_refuses_are_named() -> None:
    manifests = rendered("single-node")
    settings = of_kind(manifests, "ConfigMap")[0]
    settings["data"]["train.yaml"] += "epoch: 3\n"
    assert any("epoch (in " in problem and "did you mean epochs?" in problem for problem in problems(manifests))


def test_ranks_are_counted_over_all_nodes() -> None:
    manifests = rendered("multi-node")
    job = job_of(manifests)
    job["spec"]["entrypoint"] += " --num-workers 33"
    assert any("33 ranks need 34 CPUs" in found and "128 CPUs, 32 GPUs" in found for found in problems(manifests))


def test_a_secret_with_a_value_is_refused() -> None:
    template = parse(SECRETS_TEMPLATE.read_text(encoding="utf-8"))
    assert list(problems(template)) == []
    assert {secret["metadata"]["name"] for secret in template} == project_rules.SECRETS
    template[0]["stringData"]["auth_token"] = "0123"
    assert list(problems(template)) == [
        "Secret/eagle3-ray-token: stringData.auth_token has a value: leave it empty here and make the Secret by hand"
    ]


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("PersistentVolumeClaim", "spec.accessMode", ["ReadWriteMany"], ".spec.accessMode: no such field"),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany", ".spec.accessModes: must be of type array"),
        ("PersistentVolumeClaim", "spec.accessModes", REMOVED, ".spec: accessModes and resources.requests.storage are"),
        ("PersistentVolumeClaim", "spec.resources.requests.storage", "2 TB", ".storage: '2 TB' does not match"),
        ("PersistentVolumeClaim", "status", {}, ".status: no such field"),
        ("ConfigMap", "stringData", {}, ".stringData: no such field"),
        ("ConfigMap", "data", {"a": 1}, ".data.a: must be of type string, found 1"),
        ("ConfigMap", "data", {"a/b": ""}, ".data.a/b: a key holds letters, digits"),
    ],
)
def test_a_built_in_kind_is_checked_too(kind: str, path: str, value: Any, said: str) -> None:
    manifests = rendered("single-node")
    put(of_kind(manifests, kind)[0], path, value)
    assert any(said in problem for problem in problems(manifests)), list(problems(manifests))


def test_a_keyword_that_the_checker_does_not_know_is_not_skipped() -> None:
    with pytest.raises(AssertionError, match=r"a: the definition uses \['maxItems'\]"):
        list(check_value([], {"type": "array", "items": {}, "maxItems": 1}, "a"))


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ManifestError, match="line 2: a stands there twice"):
        parse("kind: A\nspec: {a: 1, a: 2}\n")


@pytest.mark.parametrize("text", ["- 1\n", "a: 1\n", "kind: [\n"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"not YAML|not an object with a kind"):
        parse(text)


def test_a_prefix_reaches_every_reference(tmp_path: Path) -> None:
    # kustomize knows no RayJob: without k8s/base/rayjob-fields.yaml it would leave the references as they are.
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "mine"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "resources: [../single-node]\nnamePrefix: team-\nimages:\n- {name: eagle3-ray, newName: registry/eagle3-ray}\n"
    )
    manifests = render(overlay)
    assert list(problems(manifests)) == []
    text = yaml.dump(of_kind(manifests, "RayJob"))
    assert set(re.findall(r"claimName: (\S+)", text)) == {"team-eagle3-data", "team-eagle3-checkpoints"}
    assert set(re.findall(r"image: (\S+)", text)) == {"registry/eagle3-ray:0.1.0"}
    assert re.findall(r"name: (team-eagle3-settings-\w{10})\b", text)


def test_other_settings_give_the_config_map_another_name(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "single-node"
    before = of_kind(render(overlay), "ConfigMap")[0]["metadata"]["name"]
    with (tmp_path / "k8s" / "base" / "settings" / "train.yaml").open("a") as file:
        file.write("epochs: 3\n")
    after = render(overlay)
    assert of_kind(after, "ConfigMap")[0]["metadata"]["name"] != before
    assert list(problems(after)) == []


def test_a_base_in_another_order_stops_the_object_store_overlay(tmp_path: Path) -> None:
    # Its patches count volumes: a number that has moved must not remove the wrong one.
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    base = tmp_path / "k8s" / "base" / "rayjob" / "rayjob.yaml"
    lines = base.read_text().splitlines(keepends=True)
    home = next(line for line in lines if "name: home, emptyDir" in line)
    lines.remove(home)
    lines.insert(next(n for n, line in enumerate(lines) if "claimName: eagle3-checkpoints" in line) + 1, home)
    base.write_text("".join(lines))
    render(tmp_path / "k8s" / "overlays" / "single-node")
    with pytest.raises(ManifestError, match=r"testing value .* failed"):
        render(tmp_path / "k8s" / "overlays" / "object-store")


def test_a_folder_that_cannot_be_rendered_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"{tmp_path}: cannot be rendered: "):
        render(tmp_path)


def test_a_missing_kubectl_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ManifestError, match=r"kubectl: not found\. It renders the manifests"):
        render(OVERLAYS[0])


def test_the_shell_script_is_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not here")
    script = REPOSITORY / "k8s" / "base" / "settings" / "finish.sh"
    assert subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False).stdout == ""
