#!/bin/sh
# Makes .venv with the engine (editable) and what its tests need. Safe to run again: it ends at once when nothing changed.
#
#   PYTHON=/path/to/python sh Utilities/setup.sh      use this interpreter (3.11, 3.12 or 3.13)
#
# Where torch comes from is pip's own business: its configuration and PIP_* variables apply (for a CPU-only build, for example).
set -eu

cd "$(dirname "$0")/.."
ROOT=$(pwd -P)
VENV=.venv
TORCH=$(sed -n 's/^torch==/torch==/p' Utilities/constraints.txt)
HATCHLING=$(sed -n 's/^hatchling==/hatchling==/p' Utilities/constraints.txt)

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# A standard CPython 3.11-3.13; free-threaded builds have no torch wheels of their own.
right_version() {
    "$1" -c 'import sys, sysconfig
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))' >/dev/null 2>&1
}
can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

APT_UPDATED=
apt_install() {
    if [ -z "$APT_UPDATED" ]; then
        apt-get update -qq -o Acquire::Retries=1 >/dev/null 2>&1 || true # a partly failing mirror may still serve what is needed
        APT_UPDATED=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1
}

# Prints the first fitting interpreter, or nothing.
WITHOUT_VENV=
find_python() {
    pyenv=${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}/versions
    for python in python3.12 python3.11 python3.13 python3 \
        "$pyenv"/3.12*/bin/python3 "$pyenv"/3.11*/bin/python3 "$pyenv"/3.13*/bin/python3; do
        right_version "$python" || continue
        if can_make_venv "$python"; then
            FOUND=$python
            return
        fi
        WITHOUT_VENV=${WITHOUT_VENV:-$python}
    done
}

choose_python() {
    FOUND=
    if [ -n "${PYTHON:-}" ]; then
        right_version "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13: name one that is, or leave PYTHON out."
        can_make_venv "$PYTHON" || fail "PYTHON=$PYTHON has no venv module: install it (Debian, Ubuntu: the python3-venv package)."
        FOUND=$PYTHON
        return
    fi
    find_python
    [ -z "$FOUND" ] || return 0
    if [ -n "$WITHOUT_VENV" ]; then
        package=$("$WITHOUT_VENV" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if can_apt && say "installing $package" && apt_install "$package" && can_make_venv "$WITHOUT_VENV"; then
            FOUND=$WITHOUT_VENV
            return
        fi
        fail "$WITHOUT_VENV has no venv module: install $package and run this again."
    fi
    fail "no Python 3.11, 3.12 or 3.13 was found: install one (python.org, your system's packages or pyenv), or name it with PYTHON=/path/to/python."
}

# Libraries that slicer-core needs to draw without a screen, and Qt to start. The engine itself needs none of them.
missing_libraries() {
    "$VENV/bin/python" - <<'PROBE'
import ctypes
import glob

WANTED = {
    "libegl1": ["libEGL.so.1"],
    "libgl1": ["libGL.so.1"],
    "libegl-mesa0": ["libEGL_mesa.so.0", "libEGL_nvidia.so.0"],
    "libxkbcommon0": ["libxkbcommon.so.0"],
    "libdbus-1-3": ["libdbus-1.so.3"],
    "libfontconfig1": ["libfontconfig.so.1"],
    "libfreetype6": ["libfreetype.so.6"],
    "libx11-6": ["libX11.so.6"],
    "libgssapi-krb5-2": ["libgssapi_krb5.so.2"],
    "libglib2.0-0": ["libglib-2.0.so.0"],
}


def loads(name):
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


missing = [package for package, names in WANTED.items() if not any(map(loads, names))]
drivers = ("dri/*_dri.so", "libgallium*.so")
if not any(glob.glob(f"/usr/lib{where}/{driver}") for where in ("", "64", "/*-linux-gnu*") for driver in drivers):
    missing.append("libgl1-mesa-dri")
print(*missing)
PROBE
}

check_libraries() {
    [ "$(uname -s)" = Linux ] || return 0
    missing=$(missing_libraries)
    [ -n "$missing" ] || return 0
    if can_apt; then
        say "installing system libraries: $missing"
        for package in $missing; do
            apt_install "$package" || true # what is still missing is named below
        done
        missing=$(missing_libraries)
        [ -n "$missing" ] || return 0
    fi
    say "the engine works, but tests that draw with Slicer's libraries may not: install (Debian, Ubuntu names) $missing"
}

# The state that an installation belongs to: what is asked for, where it lies, and the interpreter.
state() {
    {
        printf '%s\n' "$ROOT"
        cat pyproject.toml Utilities/constraints.txt Utilities/setup.sh
        "$VENV/bin/python" -VV
    } 2>&1 | cksum
}

STAMP=$VENV/.setup-done
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check install "$@"; }

if ! { right_version "$VENV/bin/python" && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(state)" ]; }; then
    if ! right_version "$VENV/bin/python"; then
        choose_python
        say "making $VENV with $("$FOUND" -V) ($FOUND)"
        "$FOUND" -m venv --clear "$VENV"
    fi
    rm -f "$STAMP"
    say "installing $TORCH (the largest download)"
    pip --progress-bar off -c Utilities/constraints.txt "$TORCH" || fail "$TORCH could not be installed: see pip's message above."
    say "installing the engine and what its tests need"
    # The build backend comes first, so that nothing is fetched outside the constraints.
    pip -q -c Utilities/constraints.txt "$HATCHLING" || fail "the build tool could not be installed: see pip's message above."
    pip -q -c Utilities/constraints.txt --no-build-isolation -e '.[test,slicer]' \
        || fail "the engine's packages could not be installed: see pip's message above."
    state >"$STAMP"
    say "done"
fi
check_libraries
