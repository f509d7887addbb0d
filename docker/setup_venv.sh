#!/usr/bin/env bash
# Makes .venv from docker/dev.txt, or returns at once where it is already what the lock says.
#
#   docker/setup_venv.sh [PYTHON]      PYTHON: the CPython 3.12 to use; found by itself when left out
#
# Changes nothing outside the repository but the caches of pip and uv. An interrupted set-up has no
# stamp, so the next call takes it up again; a changed lock, script or place has another stamp.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=${1:-}
HOME=${HOME:-/}
repository=$PWD

say() { printf 'setup: %s\n' "$*" >&2; }

stamp=.venv/.stamp-$({
  cat docker/dev.txt pyproject.toml docker/setup_venv.sh
  printf '%s\n' "$repository"
} | sha256sum | cut -c1-16)

# The interpreter is asked for too: an uninstalled pyenv version leaves a dangling link in .venv.
ready() { [ -e "$stamp" ] && [ -x .venv/bin/python ] && [ -x .venv/bin/headroom ]; }

if ready; then exit 0; fi

mkdir -p .cache
exec 9>.cache/setup.lock
if ! flock -n 9; then
  say "another set-up is at work in $repository: waiting for it"
  flock 9
fi
if ready; then exit 0; fi
started=$SECONDS

# The lock is held, so what lies there is a killed set-up's.
rm -rf .cache/setup.*/
scratch=$(mktemp -d "$repository/.cache/setup.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# True where $1 runs and is CPython 3.12; a pyenv shim can stand on the PATH and yet fail.
is_python312() {
  "$1" -c 'import sys; sys.exit(sys.implementation.name != "cpython" or sys.version_info[:2] != (3, 12))' \
    >/dev/null 2>&1
}

looked=()
python=''
try() {
  [ -z "$python" ] || return 0
  looked+=("$1")
  if is_python312 "$1"; then python=$1; fi
}

find_python() {
  if [ -n "$wanted" ]; then
    try "$wanted"
    return
  fi
  local found
  # Every one on the PATH: behind a pyenv shim that fails may stand one that runs.
  while read -r found; do try "$found"; done < <(type -ap python3.12 python3 python)
  [ ${#looked[@]} -gt 0 ] || looked+=("python3.12, python3 and python on the PATH (none there)")
  # HOME and PYENV_ROOT may be missing (CI, sudo): the account's own folder is asked for as well.
  local home
  home=$(getent passwd "$(id -u 2>/dev/null)" 2>/dev/null | cut -d: -f6) || true
  for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12 \
    "${home:-$HOME}"/.pyenv/versions/3.12.*/bin/python3.12 \
    "$HOME"/.local/share/uv/python/cpython-3.12.*/bin/python3.12; do
    try "$found"
  done
  if [ -z "$python" ] && command -v uv >/dev/null; then
    if found=$(UV_PYTHON_DOWNLOADS=never uv python find --no-project 3.12 2>/dev/null); then
      try "$found"
    else
      looked+=("uv python find 3.12")
    fi
  fi
}

# The uv of the lock, with the lock's hashes, put into $scratch by the pip of the interpreter $1.
fetch_uv() {
  awk '/^uv==/ {on = 1} on && !/^(uv==|    --hash)/ {exit} on {print}' docker/dev.txt \
    | sed '$ s/ *\\$//' >"$scratch/uv.txt"
  local pip=("$1" -m pip)
  if ! "${pip[@]}" --version >/dev/null 2>&1; then
    # Debian's interpreters come without pip, and without ensurepip where python3-venv is missing.
    "$1" -m venv "$scratch/pip" >/dev/null 2>&1 || return 1
    pip=("$scratch/pip/bin/python" -m pip)
  fi
  PIP_ROOT_USER_ACTION=ignore "${pip[@]}" install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --require-hashes --target "$scratch/uv" --requirement "$scratch/uv.txt" >&2 </dev/null || return 1
  uv=$scratch/uv/bin/uv
}

uv=''
find_uv() {
  local version interpreter
  version=$(sed -n 's/^uv==\([^ ]*\).*/\1/p' docker/dev.txt)
  if [ "$(.venv/bin/uv --version 2>/dev/null | cut -d' ' -f2)" = "$version" ]; then
    # A copy: uv would otherwise replace itself while it runs.
    cp .venv/bin/uv "$scratch/uv-now" && uv=$scratch/uv-now
    return
  fi
  while read -r interpreter; do
    if fetch_uv "$interpreter"; then return; fi
  done < <(if [ -n "$python" ]; then echo "$python"; else type -ap python3; fi)
  # Not the lock's version, but it checks the same hashes; .venv/bin/uv is the lock's from then on.
  uv=$(command -v uv || true)
}

refuse_python() {
  say "needs CPython 3.12 and found none that runs. Looked at:"
  printf '         %s\n' "${looked[@]}" >&2
  [ $# -eq 0 ] || say "$1"
  say "ways out:"
  say "  apt-get install python3.12 python3.12-venv   (Ubuntu 24.04, Debian with a backport)"
  say "  pyenv install 3.12"
  say "  uv python install 3.12"
  say "  make setup PYTHON=/path/to/python3.12"
  exit 1
}

find_python
if [ -n "$wanted" ] && [ -z "$python" ]; then refuse_python "PYTHON was given, so nothing else was tried"; fi
find_uv
if [ -z "$uv" ]; then
  [ -n "$python" ] || refuse_python "nor pip, ensurepip or uv to download one with"
  say "$python has neither pip nor ensurepip, and no uv is on the PATH."
  say "ways out: apt-get install python3-venv, or put uv on the PATH"
  exit 1
fi

export UV_PYTHON_DOWNLOADS=never
if [ -z "$python" ]; then
  say "no CPython 3.12 on this machine: uv downloads one into .cache/python"
  export UV_PYTHON_INSTALL_DIR=$repository/.cache/python
  UV_PYTHON_DOWNLOADS=manual "$uv" python install --no-bin 3.12 >&2 \
    || refuse_python "uv could not download one either (its message stands above)"
  for found in .cache/python/cpython-3.12.*/bin/python3.12; do try "$repository/$found"; done
  [ -n "$python" ] || refuse_python
fi

rm -f .venv/.stamp-*
if ! is_python312 .venv/bin/python; then
  say "making .venv with $python"
  rm -rf .venv
  "$python" -m venv --without-pip .venv
fi
say "installing what docker/dev.txt says"
# Wheels only: a machine without a compiler must get the same packages.
"$uv" pip sync --quiet --python .venv/bin/python --require-hashes --only-binary :all: docker/dev.txt
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
touch "$stamp"
say "done in $((SECONDS - started)) s"
