#!/usr/bin/env bash
# Sets up everything and runs the tests.
# usage: bash tests/run.sh [PYTEST ARGUMENTS]
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh" all,cuda,ur,franka,servo,dev
exec .venv/bin/python -m pytest "$@"
