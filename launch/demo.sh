#!/usr/bin/env bash
# Sets up everything and runs the main job: a simulated Panda, torque-controlled, reaches three poses under MPC.
# usage: bash launch/demo.sh [SCENARIO [--SETTING VALUE ...]]
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" all
if [ $# -eq 0 ]; then set -- launch/panda_reach_sim.yaml; fi
exec .venv/bin/mbctrl run "$@"
