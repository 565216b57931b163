#!/usr/bin/env bash
# Lint, format and tests on a bare machine.
#   bash launch/test.sh [--parity] [pytest arguments]
# --parity also installs torch and ESPnet (about 270 MB with a CPU build of torch) and
# compares every layer with them.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
parity=no
if [ "${1:-}" = --parity ]; then parity=yes; shift; fi
install requirements.txt requirements-test.txt
if [ "$parity" = yes ]; then bash tests/parity/install.sh "$PWD/.venv/bin/python"; fi
ruff check .
ruff format --check .
# Two processes: what tests compile, they compile on one core.
exec python -m pytest -n 2 --dist loadfile "$@"
