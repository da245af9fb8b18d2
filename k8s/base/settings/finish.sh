#!/bin/bash
# Before Kubernetes stops a pod (preStop). On the head: asks the driver to save and waits until it has. On a worker:
# waits until its ranks have, because `ray start` ends them at once. terminationGracePeriodSeconds bounds both.

# processes ARGUMENT PATTERN: the ids of processes whose ARGUMENT-th word matches the pattern.
processes() {
    local folder words
    for folder in /proc/[0-9]*; do
        words=()
        mapfile -d '' -t words 2>/dev/null < "$folder/cmdline"
        # shellcheck disable=SC2053  # a pattern on purpose
        [[ ${words[$1]} == $2 ]] && echo "${folder#/proc/}"
    done
}

drivers() { processes 1 '*/eagle3-ray'; }
ranks() { processes 0 'ray::RayTrainWorker*'; }

# SIGTERM and not `ray job stop`: a stopped RayJob counts as complete, one that failed is tried again and goes on.
# shellcheck disable=SC2046  # one word a process
kill -TERM $(drivers) 2>/dev/null
# Ray rewrites a rank's title with each call, and it is gone meanwhile: only who is missed three times has ended.
missed=0
while ((missed < 3)); do
    if [[ -n $(drivers; ranks) ]]; then missed=0; else missed=$((missed + 1)); fi
    sleep 0.5
done
