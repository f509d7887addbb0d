#!/usr/bin/env bash
# Builds the image headroom:STAGE from docker/Dockerfile and prints its id and size.
#
#   docker/build_image.sh STAGE [BASE [TAG]]    STAGE: cpu or tpu
#
# Needs a Docker engine (DOCKER_HOST or the default one) and a client that has BuildKit.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:-}
base=${2:-python:3.12-slim-bookworm}
tag=${3:-headroom:$stage}

refuse() {
  printf 'Error: %s\n' "$1" >&2
  shift
  if [ $# -gt 0 ]; then printf '  %s\n' "$@" >&2; fi
  exit 1
}

case $stage in
  cpu | tpu) ;;
  *) refuse "STAGE is '$stage'; known stages: cpu, tpu" ;;
esac
command -v docker >/dev/null || refuse "there is no docker command on the PATH" \
  "apt-get install docker.io, or use --where process, which needs no image"
docker info >/dev/null 2>&1 || refuse "no Docker engine answers at ${DOCKER_HOST:-the default socket}" \
  "start one (systemctl start docker), or set DOCKER_HOST"

# Of a client without buildx, 20.10 has BuildKit built in and 23 or later has it not.
client=''
for candidate in docker /usr/bin/docker; do
  [ -n "$client" ] || ! command -v "$candidate" >/dev/null || {
    major=$("$candidate" version --format '{{.Client.Version}}' 2>/dev/null | cut -d. -f1)
    if "$candidate" buildx version >/dev/null 2>&1 || [ "${major:-99}" -lt 23 ]; then client=$candidate; fi
  }
done
[ -n "$client" ] || refuse "the docker command here ($(docker --version)) has no BuildKit" \
  "apt-get install docker-buildx-plugin (Docker's packages) or docker.io (Debian's)"

if ! docker image inspect "$base" >/dev/null 2>&1 && ! docker pull --quiet "$base" >/dev/null; then
  refuse "the base image $base is not here and cannot be pulled (Docker's reason is above)" \
    "name one that can: make image STAGE=$stage BASE=registry.example/python:3.12-slim-bookworm" \
    "or load it: docker load < python-3.12-slim-bookworm.tar" \
    "or, for tests on this machine only: tests/stand_in_base.sh $base"
fi

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
# Only what enters the image can make it differ from the commit; files not yet added count.
if [ -n "$(git status --porcelain -- docker jobs runner trainer pyproject.toml README.md 2>/dev/null)" ]; then
  commit+=-dirty
fi
locks=(docker/trainer.txt)
if [ "$stage" = tpu ]; then locks+=(docker/tpu.txt); fi
lock=$(cat "${locks[@]}" | sha256sum | cut -d' ' -f1)
# The plain driver: a buildx builder in a container of its own would not see local images.
DOCKER_BUILDKIT=1 BUILDX_BUILDER='' "$client" build --progress=plain --file docker/Dockerfile --target "$stage" \
  --build-arg "BASE=$base" --build-arg "COMMIT=$commit" --build-arg "LOCK=$lock" --tag "$tag" . >&2
docker image inspect "$tag" --format '{{.Id}} {{.Size}}' \
  | awk -v tag="$tag" '{printf "%s %s %.2f GiB\n", tag, $1, $2 / 1024 ^ 3}'
