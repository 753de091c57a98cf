#!/usr/bin/env bash
# Trains a recipe on this machine in the background, where it outlives the terminal:
#
#     launch/local.sh recipes/NAME.yaml [key=value ...]
#
# `kill -USR1` of the process that it names saves a checkpoint after the current step and ends the run.
# PYTHON is the interpreter that has eapo_megatron (default python3), LOGS where the log goes (default: here).
set -euo pipefail

train=("${PYTHON:-python3}" -m eapo_megatron.cli train "$@")
"${train[@]}" --dry-run >/dev/null # what is wrong with the recipe shows here
log=${LOGS:-.}/$(basename "$1" .yaml)-$(date +%Y%m%d-%H%M%S).log
setsid "${train[@]}" >"$log" 2>&1 &
echo "process $!, log $log"
