"""How a RayJob can be wrong, and what must be said of it: one table for the schema, one for the rules beyond it."""

from typing import Any

from tests.k8s.manifests import Manifest

HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
POD = "template.spec"
CONTAINER = "template.spec.containers.0"
REMOVED = object()

Breaks = dict[str, tuple[dict[str, Any], str]]


def put(manifest: Manifest, path: str, value: Any) -> None:
    """Set or remove what stands at a path such as `spec.rayClusterSpec.workerGroupSpecs.0.replicas`; `~` is a dot."""
    *steps, last = [int(step) if step.isdecimal() else step.replace("~", ".") for step in path.split(".")]
    inner: Any = manifest
    for step in steps:
        inner = inner.setdefault(step, {}) if isinstance(step, str) else inner[step]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value


# What is changed in the overlay single-node's eagle3-train, path -> value; and what must be said of it.
SCHEMA_BREAKS: Breaks = {
    "unknown_field": ({"spec.submisionMode": "HTTPMode"}, ".spec.submisionMode: no such field"),
    "unknown_field_in_pod": ({f"{HEAD}.{POD}.volumes.0.emptydir": {}}, ".volumes[0].emptydir: no such field"),
    "wrong_type": ({"spec.backoffLimit": "3"}, ".spec.backoffLimit: must be of type integer, found '3'"),
    "start_param_not_text": ({f"{HEAD}.rayStartParams.num-cpus": 0}, ".num-cpus: must be of type string, found 0"),
    "too_small": ({"spec.preRunningDeadlineSeconds": 0}, ".preRunningDeadlineSeconds: must be at least 1, found 0"),
    "not_a_quantity": ({f"{WORKERS}.{CONTAINER}.resources.limits.memory": "lots"}, ".memory: 'lots' does not match"),
    "missing_field": ({f"{HEAD}.{CONTAINER}.name": REMOVED}, ".containers[0].name: is required"),
    "variable_twice": (
        {f"{HEAD}.{CONTAINER}.env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
        ".env: holds ('A',) twice",
    ),
    "not_in_enum": ({"spec.rayClusterSpec.authOptions.mode": "tokens"}, ".mode: must be one of "),
    "label_not_text": ({"metadata.labels.a": 1}, ".metadata.labels.a: must be of type string, found 1"),
    "no_name": ({"metadata.name": REMOVED}, ".metadata.name: is required"),
    "unknown_metadata": ({"metadata.nmespace": "a"}, ".metadata.nmespace: no such field"),
    "no_spec": ({"spec": REMOVED}, ".spec: is required"),
    "unknown_kind": ({"kind": "RayJobs"}, "apiVersion ray.io/v1, kind RayJobs: there is no check for this kind"),
}

RULE_BREAKS: Breaks = {
    # what the operator minds and the schema does not
    "submission_mode_misspelt": (
        {"spec.submissionMode": "HttpMode"},
        "submissionMode HttpMode must be one of HTTPMode",
    ),
    "ttl_without_shutdown": (
        {"spec.shutdownAfterJobFinishes": False},
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true",
    ),
    "suspend_without_shutdown": (
        {"spec.shutdownAfterJobFinishes": REMOVED, "spec.suspend": True},
        "suspend needs shutdownAfterJobFinishes: true",
    ),
    "kueue_without_shutdown": (
        {"spec.shutdownAfterJobFinishes": False, "metadata.labels.kueue~x-k8s~io/queue-name": "a"},
        "(Kueue) needs shutdownAfterJobFinishes: true",
    ),
    "kueue_with_autoscaling": (
        {"spec.rayClusterSpec.enableInTreeAutoscaling": True, "metadata.labels.kueue~x-k8s~io/queue-name": "a"},
        "(Kueue) does not allow enableInTreeAutoscaling",
    ),
    "name_too_long": ({"metadata.name": "e" * 48}, "the name has 48 characters, at most 47 are allowed"),
    "name_of_other_letters": ({"metadata.name": "3-Train"}, "the name 3-Train must be lower-case letters"),
    "sidecar_with_submitter_config": (
        {"spec.submissionMode": "SidecarMode", "spec.submitterConfig": {"backoffLimit": 1}},
        "SidecarMode does not allow submitterConfig",
    ),
    "sidecar_with_submitter_pod": (
        {
            "spec.submissionMode": "SidecarMode",
            "spec.submitterPodTemplate": {"spec": {"containers": [{"name": "submitter"}]}},
        },
        "SidecarMode does not allow submitterPodTemplate",
    ),
    "sidecar_with_restarts": (
        {"spec.submissionMode": "SidecarMode", f"{HEAD}.{POD}.restartPolicy": "Always"},
        "SidecarMode needs restartPolicy Never on the head",
    ),
    "autoscaler_v2_with_restarts": (
        {
            "spec.rayClusterSpec.enableInTreeAutoscaling": True,
            "spec.rayClusterSpec.autoscalerOptions": {"version": "v2"},
            f"{WORKERS}.{POD}.restartPolicy": "OnFailure",
        },
        "workers: restartPolicy OnFailure must be Never under version v2 of the autoscaler",
    ),
    "negative_retries": ({"spec.backoffLimit": -1}, "backoffLimit must be at least 0, found -1"),
    "no_deadline_at_all": ({"spec.activeDeadlineSeconds": 0}, "activeDeadlineSeconds must be at least 1, found 0"),
    "authentication_left_empty": ({"spec.rayClusterSpec.authOptions": {}}, "authOptions must say mode: token and a"),
    "authentication_overruled": (
        {f"{WORKERS}.{CONTAINER}.env.0.value": "disabled"},
        "workers: RAY_AUTH_MODE disabled overrules authOptions",
    ),
    "ranks_on_the_head": ({f"{HEAD}.rayStartParams": {}}, 'head: rayStartParams num-cpus must be "0", found None'),
    "resources_twice": ({f"{HEAD}.resources": {"CPU": "1"}}, "head: resources and rayStartParams num-cpus exclude"),
    "mount_without_volume": (
        {f"{WORKERS}.{CONTAINER}.volumeMounts.3.name": "dta"},
        "workers: /data mounts the volume dta, which the pod lacks",
    ),
    "waits_for_ever": ({"spec.preRunningDeadlineSeconds": REMOVED}, "preRunningDeadlineSeconds is needed"),
    # what this project minds
    "other_ray": ({"spec.rayClusterSpec.rayVersion": "2.9.0"}, "rayVersion 2.9.0 must be that of constraints.txt"),
    "two_images": (
        {f"{WORKERS}.{CONTAINER}.image": "eagle3-ray:0.1.0-cpu"},
        "workers: image eagle3-ray:0.1.0-cpu must be that of the head, eagle3-ray:0.1.0",
    ),
    "latest": (
        {f"{HEAD}.{CONTAINER}.image": "a:5000/eagle3-ray:latest"},
        "must have the tag 0.1.0 or 0.1.0-cpu, not latest",
    ),
    "no_tag": ({f"{HEAD}.{CONTAINER}.image": "a:5000/eagle3-ray"}, "must have the tag 0.1.0 or 0.1.0-cpu, not none"),
    "unknown_config_map": (
        {f"{HEAD}.{POD}.volumes.2.configMap.name": "eagle3-settings"},
        "head: the ConfigMap eagle3-settings is not among these manifests",
    ),
    "unknown_claim": (
        {f"{WORKERS}.{POD}.volumes.3.persistentVolumeClaim.claimName": "dta"},
        "workers: the claim dta is not among these manifests",
    ),
    "unknown_secret": (
        {f"{HEAD}.{CONTAINER}.envFrom.0.secretRef.name": "credentials"},
        "the Secret credentials is not one of those that k8s/README.md has you make",
    ),
    "unknown_secret_of_a_variable": (
        {f"{HEAD}.{CONTAINER}.env.0": {"name": "A", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "a"}}}},
        "the Secret wandb is not one of those",
    ),
    "other_program": (
        {"spec.entrypoint": "python train.py"},
        "entrypoint python train.py: expected eagle3-ray and one of",
    ),
    "unknown_verb": ({"spec.entrypoint": "eagle3-ray trian"}, "expected eagle3-ray and one of"),
    "unknown_flag": ({"spec.entrypoint": "eagle3-ray train --sav-path /a"}, "--sav-path"),
    "file_not_mounted": (
        {"spec.entrypoint": "eagle3-ray train --config /etc/eagle3/other.yaml"},
        "--config /etc/eagle3/other.yaml: no ConfigMap among these manifests puts it there",
    ),
    "flag_of_wrong_value": (
        {"spec.entrypoint": "eagle3-ray train --config /etc/eagle3/train.yaml --epochs 0"},
        "--epochs 0: must be at least 1",
    ),
    "path_beside_the_claims": (
        {"spec.entrypoint": "eagle3-ray train --config /etc/eagle3/train.yaml --save-path /runs/a"},
        "head: save_path /runs/a must lie on a claim that the head and the workers mount",
    ),
    "path_on_scratch_space": (
        {"spec.entrypoint": "eagle3-ray train --config /etc/eagle3/train.yaml --save-path /tmp/a"},
        "workers: save_path /tmp/a must lie on a claim that the head and the workers mount",
    ),
    "relative_path": (
        {"spec.entrypoint": "eagle3-ray train --config /etc/eagle3/train.yaml --data-path data"},
        "data_path data must be an absolute path, or a URL",
    ),
    "too_few_cpus": (
        {
            f"{WORKERS}.{CONTAINER}.resources": {
                key: {"cpu": "8", "memory": "9Gi", "nvidia.com/gpu": "8"} for key in ("requests", "limits")
            }
        },
        "8 ranks need 9 CPUs, 1 of them for tasks; the workers have 8 CPUs, 8 GPUs and places for 8 ranks",
    ),
    "more_ranks_than_gpus": (
        {"spec.entrypoint": "eagle3-ray train --config /etc/eagle3/train.yaml --num-workers 9"},
        "9 ranks need 10 CPUs, 1 of them for tasks; the workers have 32 CPUs, 8 GPUs and places for 8 ranks",
    ),
    "squeezed": ({f"{HEAD}.{CONTAINER}.resources.requests.cpu": "1"}, "head: resources need requests equal to limits"),
    "no_memory_limit": (
        {f"{HEAD}.{CONTAINER}.resources": {key: {"cpu": "2"} for key in ("requests", "limits")}},
        "head: resources need requests equal to limits, of cpu and memory at least",
    ),
    "half_a_cpu": (
        {f"{HEAD}.{CONTAINER}.resources": {key: {"cpu": "500m", "memory": "1Gi"} for key in ("requests", "limits")}},
        "head: cpu 500m must be whole",
    ),
    "may_be_root": ({f"{HEAD}.{POD}.securityContext.runAsNonRoot": False}, "head: securityContext needs runAsNonRoot"),
    "keeps_capabilities": (
        {f"{WORKERS}.{CONTAINER}.securityContext.capabilities": {"drop": ["NET_RAW"]}},
        "workers: securityContext needs capabilities: {'drop': ['ALL']}",
    ),
    "home_not_writable": (
        {f"{HEAD}.{CONTAINER}.volumeMounts.1.mountPath": "/home/other"},
        "head: /home/ray needs an emptyDir",
    ),
    "killed_while_saving": (
        {f"{HEAD}.{POD}.terminationGracePeriodSeconds": 30},
        "head: RAY_JOB_STOP_WAIT_TIME_S 240 must be 60 or more, and at most terminationGracePeriodSeconds, 30",
    ),
    "ray_waits_too_little": (
        {f"{HEAD}.{CONTAINER}.env": [{"name": "RAY_AUTH_MODE", "value": "token"}]},
        "head: RAY_JOB_STOP_WAIT_TIME_S 3 must be 60 or more",
    ),
    "nobody_tells_the_driver": ({f"{HEAD}.{CONTAINER}.lifecycle": REMOVED}, "head: preStop must run"),
    "not_chosen_by_label": (
        {"metadata.labels": {}},
        "the label app.kubernetes.io/component is needed",
    ),
}
