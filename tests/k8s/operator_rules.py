"""What KubeRay's operator refuses, or quietly does otherwise, although the schema allows it; one function a rule.

Read in the operator's validation of RayJobs and in what it makes of their pods (KubeRay 1.7). A job that breaks such
a rule is accepted by the API server and then never starts, or starts as something else than was written.
"""

import re
from collections.abc import Iterator

from tests.k8s.manifests import Manifest, pod_groups

SUBMISSION_MODES = ("HTTPMode", "K8sJobMode", "SidecarMode", "InteractiveMode")
# 63 for a DNS label, less what the operator appends: a suffix for the cluster and one for its services.
MAX_NAME_LENGTH = 47
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def name(job: Manifest) -> Iterator[str]:
    """The operator appends to a job's name, and the result must stay a DNS label."""
    found = job["metadata"]["name"]
    if len(found) > MAX_NAME_LENGTH:
        yield f"the name has {len(found)} characters, at most {MAX_NAME_LENGTH} are allowed"
    if DNS_LABEL.fullmatch(found) is None:
        yield f"the name {found} must be lower-case letters, digits and -, and begin with a letter"


def submission_mode(job: Manifest) -> Iterator[str]:
    """The schema takes any text here."""
    found = job["spec"].get("submissionMode", "K8sJobMode")
    if found not in SUBMISSION_MODES:
        yield f"submissionMode {found} must be one of {', '.join(SUBMISSION_MODES)}"


def sidecar_mode(job: Manifest) -> Iterator[str]:
    """A submitter in the head's pod has no pod and no restarts of its own."""
    spec = job["spec"]
    if spec.get("submissionMode") != "SidecarMode":
        return
    for option in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if option in spec:
            yield f"SidecarMode does not allow {option}"
    if next(pod_groups(job)).pod.get("restartPolicy", "Never") != "Never":
        yield "SidecarMode needs restartPolicy Never on the head, or none"


def shutdown(job: Manifest) -> Iterator[str]:
    """What is done after the end is done only to clusters that are shut down."""
    spec = job["spec"]
    if spec.get("shutdownAfterJobFinishes"):
        return
    if spec.get("ttlSecondsAfterFinished", 0):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("suspend"):
        yield "suspend needs shutdownAfterJobFinishes: true"
    if QUEUE_LABEL in job["metadata"].get("labels", {}):
        yield f"the label {QUEUE_LABEL} (Kueue) needs shutdownAfterJobFinishes: true"


def kueue(job: Manifest) -> Iterator[str]:
    """Kueue reserves the whole cluster before it starts."""
    if QUEUE_LABEL in job["metadata"].get("labels", {}) and job["spec"]["rayClusterSpec"].get(
        "enableInTreeAutoscaling"
    ):
        yield f"the label {QUEUE_LABEL} (Kueue) does not allow enableInTreeAutoscaling"


def numbers(job: Manifest) -> Iterator[str]:
    """The schema has no bounds for these."""
    for field, least in {"activeDeadlineSeconds": 1, "backoffLimit": 0, "ttlSecondsAfterFinished": 0}.items():
        found = job["spec"].get(field, least)
        if found < least:
            yield f"{field} must be at least {least}, found {found}"


def autoscaler(job: Manifest) -> Iterator[str]:
    """Version 2 of the autoscaler replaces pods itself."""
    cluster = job["spec"]["rayClusterSpec"]
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        return
    for group in pod_groups(job):
        policy = group.pod.get("restartPolicy", "Never")
        if policy != "Never":
            yield f"{group.name}: restartPolicy {policy} must be Never under version v2 of the autoscaler"


def authentication(job: Manifest) -> Iterator[str]:
    """`authOptions: {}` is accepted and leaves authentication off."""
    options = job["spec"]["rayClusterSpec"].get("authOptions", {})
    if options.get("mode") != "token" or not options.get("secretName"):
        yield "authOptions must say mode: token and a secretName; anything less leaves the cluster open"
    for group in pod_groups(job):
        mode = group.environment.get("RAY_AUTH_MODE", "token")
        if mode != "token":
            yield f"{group.name}: RAY_AUTH_MODE {mode} overrules authOptions; it must be token"


def head_without_work(job: Manifest) -> Iterator[str]:
    """Ranks beside the driver and Ray's services would take their memory."""
    params = next(pod_groups(job)).spec.get("rayStartParams", {})
    if params.get("num-cpus") != "0":
        yield f'head: rayStartParams num-cpus must be "0", found {params.get("num-cpus")!r}'
    if "resources" in job["spec"]["rayClusterSpec"]["headGroupSpec"]:
        yield "head: resources and rayStartParams num-cpus exclude each other"


def mounts(job: Manifest) -> Iterator[str]:
    """A mount without its volume is refused by the API server only when the operator makes the pod."""
    for group in pod_groups(job):
        volumes = {volume["name"] for volume in group.pod.get("volumes", [])}
        for mount in group.container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{group.name}: {mount['mountPath']} mounts the volume {mount['name']}, which the pod lacks"


def waiting(job: Manifest) -> Iterator[str]:
    """Pods that wait for a Secret or a claim wait for ever, unless the job says how long."""
    if "preRunningDeadlineSeconds" not in job["spec"]:
        yield "preRunningDeadlineSeconds is needed: without it a missing Secret or claim hangs the job"


RULES = (
    name,
    submission_mode,
    sidecar_mode,
    shutdown,
    kueue,
    numbers,
    autoscaler,
    authentication,
    head_without_work,
    mounts,
    waiting,
)
