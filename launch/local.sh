#!/usr/bin/env bash
# The main job on one machine: environment, data, dense model, gated models, evaluation, report.
#   bash launch/local.sh [config] [workdir] [--config.field=value ...]
# Run again, it resumes, and reuses what is done.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
config=configs/gated_speech/quickstart.py workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then config=$1; shift; fi
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then workdir=$1; shift; fi
install requirements.txt
exec python -m gatedfm.sweep --config="$config" --workdir="$workdir" "$@"
