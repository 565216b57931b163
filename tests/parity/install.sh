#!/usr/bin/env bash
# Installs what tests/parity compares against; does nothing where it is already there.
#
# ESPnet's wheel comes without its dependencies: it would bring an older sentencepiece and
# importlib-metadata, lightning, h5py and more, none of which the modules under test import.
#
# Usage: tests/parity/install.sh [python]
set -euo pipefail

python=${1:-python}
root=$(cd "$(dirname "$0")/../.." && pwd)
install=("$python" -m pip install --quiet --no-warn-conflicts)
"${install[@]}" --requirement "$root/requirements-parity.txt"
"${install[@]}" --no-deps espnet==202511
