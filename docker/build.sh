#!/usr/bin/env bash
# Build the image, with Docker if its engine runs, else with podman: docker/build.sh gpu|cpu TAG. `make image` calls this.
#   BASE_IMAGE        a Debian 12 with Python 3.11; default: the Dockerfile's, or, where podman reaches no registry but
#                     mmdebstrap is there, a base made of Debian's packages
#   TORCH_CPU_WHEELS  for cpu: the page, or (podman) the local folder, that holds torch's wheel for CPUs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
variant=${1:?gpu or cpu} tag=${2:?a tag}
arguments=(-f docker/Dockerfile -t "$tag" --build-arg "REQUIREMENTS=docker/requirements.$variant.lock")
wheels=
if [ "$variant" = cpu ]; then
    wheels=${TORCH_CPU_WHEELS:?"the page or folder with torch's wheel for CPUs"}
    arguments+=(--build-arg "UV_FIND_LINKS=$wheels")
fi

if docker info >/dev/null 2>&1; then
    if [ -d "$wheels" ]; then
        echo "docker/build.sh: Docker's builder sees no folder of this machine: TORCH_CPU_WHEELS must name a page, not $wheels" >&2
        exit 1
    fi
    [ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    exec docker build "${arguments[@]}" .
fi

command -v podman >/dev/null || { echo "docker/build.sh: neither a running Docker engine nor podman is here." >&2; exit 1; }

# What this machine uses to reach packages (its certificates, pip's settings, a folder of wheels) is mounted for the
# build and is no part of the image.
mount() { [ ! -e "$1" ] || arguments+=(-v "$1:$2:ro"); }
settings=$(mktemp)
trap 'rm -f "$settings"' EXIT
echo 'system-certs = true' > "$settings"
chmod 644 "$settings"
mount "$settings" /etc/uv/uv.toml
mount /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
mount /etc/pip.conf /etc/pip.conf
if [ -d "$wheels" ]; then mount "$wheels" "$wheels"; fi

official=$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)
debian=localhost/eagle3-ray-base:bookworm
if [ -z "${BASE_IMAGE:-}" ] && ! podman image exists "$official" && ! podman pull -q "$official" 2>/dev/null; then
    command -v mmdebstrap >/dev/null || { echo "docker/build.sh: $official cannot be pulled." >&2; exit 1; }
    BASE_IMAGE=$debian
    if ! podman image exists "$debian"; then
        echo "no registry answers: the base is made of Debian's packages"
        mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv bookworm - \
            | podman import -q - "$debian"
    fi
fi
[ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
podman build --isolation chroot --layers -q "${arguments[@]}" .
