# Sourced by launch/demo.sh and tests/run.sh: makes .venv once and installs the package into it.
# usage: . launch/environment.sh EXTRAS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mbctrl needs Python 3.10 or newer: set PYTHON=..." >&2; exit 1; }
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || { echo "the venv module is missing: apt install python3-venv" >&2; exit 1; }
fi
stamp=".venv/mbctrl-$1-$(cat setup.py pyproject.toml launch/environment.sh | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "installing mbctrl[$1] into .venv (once) ..."
    .venv/bin/python -m pip install --quiet --upgrade pip
    # First on its own, so that the platform's build of the version the tests ran with is taken.
    .venv/bin/python -m pip install --quiet "torch==2.13.0"
    .venv/bin/python -m pip install --quiet --editable ".[$1]"
    touch "$stamp"
fi

# Off-screen rendering of the video: a GPU driver brings EGL; without one Mesa does. Only the video needs it.
if [ "$(uname -s)" = Linux ] && ! ldconfig -p 2>/dev/null | grep -qE "libOSMesa|libEGL_(nvidia|mesa)"; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update -qq && apt-get install -y -qq libegl1 libegl-mesa0 libgl1-mesa-dri) >/dev/null 2>&1 ||
            echo "could not install Mesa: the run goes on without a video" >&2
    else
        echo "no off-screen OpenGL found: the run goes on without a video (Debian, Ubuntu: apt install libegl1 libegl-mesa0)" >&2
    fi
fi
