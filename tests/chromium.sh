#!/usr/bin/env bash
# Debian's Chromium, for tests of pages: prints its path.
#
#   tests/chromium.sh DIR      DIR: for the log of an installation
#
# Ends with 3, and the reason on stderr, where there is none and none may be installed.
set -euo pipefail

if [ $# -ne 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
dir=$(realpath -m "$1")

cannot() {
  printf 'no Chromium: %s\n' "$*" >&2
  exit 3
}

find_it() { command -v chromium || command -v chromium-browser; }

if find_it; then exit 0; fi
[ "${CI:-}" = true ] || cannot "not installed (apt-get install chromium; done by itself under CI=true)"
[ "$(id -u)" -eq 0 ] || cannot "not installed, and only root can install it"
command -v apt-get >/dev/null || cannot "not installed, and no apt-get to install it with"
mkdir -p "$dir"
# One apt-get at a time on a machine: the tests' other process may install Docker.
exec 9>/run/headroom-apt.lock
flock 9
if find_it; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
{
  apt-get update -q
  apt-get install -y -q --no-install-recommends chromium
} >>"$dir/apt.log" 2>&1 || cannot "apt-get failed: $(tail -n 3 "$dir/apt.log")"
find_it || cannot "apt-get did not bring it"
