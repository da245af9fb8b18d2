"""`python -m tests.k8s.check`: renders every overlay and says what is wrong with it. No cluster is needed."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.k8s import operator_rules, project_rules
from tests.k8s.manifests import (
    OVERLAYS,
    REPOSITORY,
    SECRETS_TEMPLATE,
    Manifest,
    ManifestError,
    parse,
    render,
    title,
)
from tests.k8s.schema import problems_of


def problems(manifests: list[Manifest]) -> Iterator[str]:
    """Yield what is wrong with a rendered overlay: what the schema refuses first, the rules for what is left."""
    for manifest in manifests:
        found = list(problems_of(manifest))
        if not found:
            found = [problem for rule in project_rules.RULES for problem in rule(manifest)]
        if not found and manifest["kind"] == "RayJob":
            found = [problem for rule in operator_rules.RULES for problem in rule(manifest)]
            found += [problem for job_rule in project_rules.JOB_RULES for problem in job_rule(manifest, manifests)]
        yield from (f"{title(manifest)}: {problem}" for problem in found)


def main(folders: Sequence[Path] = OVERLAYS) -> int:
    """Check folders and print a line for each; return 1 if anything is wrong."""
    yamllint = [str(Path(sys.executable).parent / "yamllint"), "--strict", "--config-file", "k8s/.yamllint", "k8s"]
    failed = subprocess.run(yamllint, cwd=REPOSITORY).returncode
    try:
        template = parse(SECRETS_TEMPLATE.read_text(encoding="utf-8"))
        rendered = {str(folder.relative_to(REPOSITORY)): render(folder) for folder in folders}
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, manifests in {SECRETS_TEMPLATE.name: template, **rendered}.items():
        found = list(problems(manifests))
        print(f"{name}: {len(found)} problems" if found else f"{name}: {len(manifests)} objects, all good")
        for problem in found:
            print(f"  {problem}")
        failed = failed or bool(found)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
