#!/usr/bin/env bash
# Makes the image TAG that stands for python:3.12-slim-bookworm where no container registry is
# reachable: Debian by debootstrap, and the CPython 3.12 that .venv is made of in /usr/local.
# It trusts the certificates that this machine trusts, so it is for tests here: never push it.
#
#   tests/stand_in_base.sh TAG         DOCKER_HOST names the engine
set -euo pipefail
tag=${1:?usage: tests/stand_in_base.sh TAG}
repository=$(realpath "$(dirname "$0")/..")
python=$repository/.venv/bin/python

refuse() {
  printf 'no stand-in base image: %s\n' "$*" >&2
  exit 3
}

export PATH=$PATH:/usr/sbin:/sbin
[ "$(id -u)" -eq 0 ] || refuse "debootstrap needs root"
[ -x "$python" ] || refuse "no .venv here (make setup)"
if ! command -v debootstrap >/dev/null; then
  [ "${CI:-}" = true ] || refuse "debootstrap is not installed (apt-get install debootstrap)"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q >&2
  apt-get install -y -q --no-install-recommends debootstrap >&2
fi
# The interpreter is this machine's: an older Debian would lack the C library it was built for.
suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
[ "$(sed -n 's/^ID=//p' /etc/os-release)" = debian ] || refuse "this is not Debian (/etc/os-release)"

# The first place that this machine takes the suite from (deb822 or one-line form).
mirror=$(awk -v suite="$suite" '
  /^URIs:/ {uri = $2}
  /^Suites:/ && uri != "" {for (i = 2; i <= NF; i++) if ($i == suite) {print uri; exit}}
  $1 == "deb" {sub(/\[[^]]*\] */, ""); if ($3 == suite) {print $2; exit}}
' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true)
[ -n "$mirror" ] || refuse "apt's configuration names no mirror for $suite"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

# stdlib and executable, not the whole prefix: that may be /usr, or full of somebody's packages.
read -r stdlib executable libpython < <("$python" -c '
import os, sys, sysconfig
var = sysconfig.get_config_var
shared = os.path.join(var("LIBDIR"), var("INSTSONAME")) if var("Py_ENABLE_SHARED") else "-"
print(sysconfig.get_path("stdlib"), os.path.realpath(sys._base_executable), shared)
')

# Whatever Debian package owns a library that the interpreter loads, as the real image chooses them.
mapfile -t packages < <(
  find "$executable" "$stdlib/lib-dynload" -type f -print0 | xargs -0 ldd 2>/dev/null \
    | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | xargs -r realpath | sort -u \
    | xargs -rn1 dpkg-query --search 2>/dev/null | cut -d: -f1 | sort -u
)
include=$(printf '%s,' ca-certificates netbase tzdata "${packages[@]}")
debootstrap --variant=minbase --include="${include%,}" "$suite" "$root" "$mirror" >"$work/log" 2>&1 || {
  tail -n 5 "$work/log" >&2
  refuse "debootstrap of $suite failed (above)"
}
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
  "$root"/usr/share/{doc,man,locale}/*

install -D "$executable" "$root/usr/local/bin/python3.12"
ln -s python3.12 "$root/usr/local/bin/python3"
ln -s python3.12 "$root/usr/local/bin/python"
mkdir -p "$root/usr/local/lib/python3.12"
tar -C "$stdlib" --exclude=./test --exclude=./idlelib --exclude=./turtledemo --exclude=./tkinter \
  --exclude='./config-3.*' --exclude='./site-packages/*' --exclude=__pycache__ -c . \
  | tar -C "$root/usr/local/lib/python3.12" -x
if [ -e "$libpython" ]; then cp "$libpython" "$root/usr/local/lib/"; fi
chroot "$root" ldconfig
chroot "$root" /usr/local/bin/python3 -m ensurepip --default-pip >"$work/log" 2>&1 || {
  tail -n 5 "$work/log" >&2
  refuse "the interpreter's ensurepip does not run in the new root (above)"
}

trust=/etc/ssl/certs/ca-certificates.crt
if [ -s "${SSL_CERT_FILE:-$trust}" ]; then cp "${SSL_CERT_FILE:-$trust}" "$root$trust"; fi
tar -C "$root" -c . | docker import \
  --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' \
  --change "ENV SSL_CERT_FILE=$trust PIP_CERT=$trust REQUESTS_CA_BUNDLE=$trust" \
  --change 'CMD ["python3"]' - "$tag"
