#!/usr/bin/env bash
# A Docker engine for tests: the one that answers already, else a private one whose data, socket
# and process id lie under DIR.
#
#   tests/docker_engine.sh start DIR   prints the engine's address, for DOCKER_HOST
#   tests/docker_engine.sh env DIR     prints "export DOCKER_HOST=..." of the private engine
#   tests/docker_engine.sh private DIR [OPTION...]   never the one that answers; options of dockerd
#   tests/docker_engine.sh stop DIR    stops the private engine that DIR/pid names, and no other
#
# Ends with 3, and the reason on stderr, where the machine does not allow an engine.
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[ $# -ge 2 ] || usage
verb=$1
dir=$(realpath -m "$2")
shift 2

# The kernel allows 107 characters for a socket's path, a clone can lie deeper; 8 digits tell clones apart.
short=$(printf '%s' "$dir" | sha256sum | cut -c1-8)
run=/run/headroom-engine-$short
host=unix://$run/docker.sock
bridge=hr$short
# A subnet of its own in 10.64.0.0/10: two clones' engines must not give out the same addresses.
subnet=10.$((64 + 0x${short:0:2} % 64)).$((0x${short:2:2})).1/24

cannot() {
  printf 'no Docker engine: %s\n' "$*" >&2
  exit 3
}

answers() { docker -H "$1" info >/dev/null 2>&1; }

# The process that DIR/pid names, where it is a dockerd and was started on that very file.
alive() {
  [ -s "$dir/pid" ] && pid=$(cat "$dir/pid") \
    && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] \
    && tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qxF -- "--pidfile=$dir/pid"
}

missing() {
  local program
  for program in docker dockerd iptables ip; do
    command -v "$program" >/dev/null || printf '%s ' "$program"
  done
}

install_missing() {
  [ -n "$(missing)" ] || return 0
  [ "${CI:-}" = true ] || cannot "$(missing)not installed (apt-get install docker.io iptables iproute2; done by itself under CI=true)"
  command -v apt-get >/dev/null || cannot "$(missing)not installed, and no apt-get to install them with"
  # One apt-get at a time on a machine: tests/chromium.sh may run in the tests' other process.
  exec 8>/run/headroom-apt.lock
  flock 8
  export DEBIAN_FRONTEND=noninteractive
  {
    apt-get update -q
    apt-get install -y -q --no-install-recommends docker.io iptables iproute2 debootstrap busybox-static
  } >>"$dir/apt.log" 2>&1 || cannot "apt-get failed: $(tail -n 3 "$dir/apt.log")"
  [ -z "$(missing)" ] || cannot "apt-get did not bring $(missing)"
  exec 8>&-
}

start() {
  local theirs=${DOCKER_HOST:-unix:///var/run/docker.sock}
  if answers "$theirs"; then
    echo "$theirs"
    return
  fi
  private
}

private() {
  mkdir -p "$dir"
  exec 9>"$dir/lock"
  flock 9
  if alive && answers "$host"; then
    echo "$host"
    return
  fi
  [ "$(id -u)" -eq 0 ] || cannot "none answers, and only root can start one"
  export PATH=$PATH:/usr/sbin:/sbin
  install_missing
  if alive; then stop; fi

  install -d -m 700 "$run"
  rm -f "$dir/pid" "$run/docker.sock"
  # Its own bridge: a second daemon on docker0 gives out the first one's addresses.
  if ! ip link show "$bridge" >/dev/null 2>&1; then
    ip link add name "$bridge" type bridge || cannot "the kernel refuses a network bridge (no CAP_NET_ADMIN?)"
    ip addr add "$subnet" dev "$bridge"
    ip link set "$bridge" up
  fi
  setsid dockerd --data-root="$dir/data" --exec-root="$run/exec" --host="$host" --pidfile="$dir/pid" \
    --bridge="$bridge" "$@" >>"$dir/log" 2>&1 </dev/null 9>&- &
  local launched=$! deadline=$((SECONDS + 60))
  while [ "$SECONDS" -lt "$deadline" ]; do
    if answers "$host"; then
      echo "$host"
      return
    fi
    kill -0 "$launched" 2>/dev/null || cannot "dockerd ended at once: $(tail -n 3 "$dir/log")"
    sleep 0.1
  done
  cannot "dockerd did not answer within 60 s: $(tail -n 3 "$dir/log")"
}

stop() {
  local pid deadline=$((SECONDS + 60))
  if alive; then
    kill -TERM "$pid"
    while alive; do
      if [ "$SECONDS" -ge "$deadline" ]; then
        printf 'dockerd (process %s) did not stop within 60 s\n' "$pid" >&2
        exit 1
      fi
      sleep 0.1
    done
  fi
  if command -v ip >/dev/null && ip link show "$bridge" >/dev/null 2>&1; then ip link delete "$bridge"; fi
  # A container with host networking leaves its namespace mounted here.
  umount "$run"/exec/netns/* 2>/dev/null || true
  rm -rf "$run"
}

case $verb in
  start) start ;;
  private) private "$@" ;;
  stop) stop ;;
  env) echo "export DOCKER_HOST=$host" ;;
  *) usage ;;
esac
