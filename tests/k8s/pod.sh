#!/bin/bash
# Runs a command as a pod would, without an image: on a read-only root of this machine's own programs, as user 1000
# without capabilities, in namespaces of its own. tests/k8s/rehearsal.py uses it, inside an outer `unshare` of root.
#
# usage: pod.sh start NAME ADDRESS MOUNTS WORD...   the pod's first process is the command; lasts as long as it does
#        pod.sh exec PID WORD...                    another command in the pod whose `start` has this process id
#
# MOUNTS is a file of lines `ro SOURCE TARGET`, `rw SOURCE TARGET`, `tmp TARGET`. The environment is the caller's.
set -euo pipefail

as_user=(setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs)

start() {
    local name=$1 address=$2 mounts=$3
    shift 3
    if [[ -e /run/netns/$name ]]; then  # the container ended and starts again, or the next one of the pod
        ip netns delete "$name"
    fi
    ip netns add "$name"
    ip link add "v$name" type veth peer name eth0 netns "$name"
    ip link set "v$name" master pods up
    ip -n "$name" addr add "$address/24" dev eth0
    ip -n "$name" link set lo up
    ip -n "$name" link set eth0 up
    # Ray finds its own address by the default route; nobody answers there.
    ip -n "$name" route add default via "${address%.*}.254"
    exec nsenter --net="/run/netns/$name" unshare --mount --pid --fork --kill-child "$0" inside "$mounts" "$@"
}

inside() {
    local mounts=$1 root=/mnt mode source target
    shift
    mount -t tmpfs -o mode=755 root "$root"
    while read -r mode source target; do
        if [[ $mode == tmp ]]; then
            mkdir -p "$root$source"
            mount -t tmpfs -o mode=1777 emptydir "$root$source"
            continue
        fi
        if [[ -d $source ]]; then mkdir -p "$root$target"; else install -D /dev/null "$root$target"; fi
        mount --rbind "$source" "$root$target"
        [[ $mode == rw ]] || mount -o remount,bind,ro "$root$target"
    done < "$mounts"
    mkdir -p "$root/proc" "$root/workspace"
    mount -t proc proc "$root/proc"
    mount -o remount,ro "$root"
    exec /usr/sbin/chroot "$root" "${as_user[@]}" "$@"
}

exec_in() {
    local first
    read -r first _ < "/proc/$1/task/$1/children" || [[ -n $first ]]  # no newline at its end
    shift
    exec nsenter --target "$first" --mount --net --pid --root --wdns=/workspace "${as_user[@]}" "$@"
}

command=$1
shift
case $command in
    start) start "$@" ;;
    inside) inside "$@" ;;
    exec) exec_in "$@" ;;
esac
