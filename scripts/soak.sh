#!/usr/bin/env bash
# Kills runs, damages files and feeds bad input for a given time, and counts losses (docs/reliability.md).
#
#   bash scripts/soak.sh                          half an hour
#   bash scripts/soak.sh --minutes 600 --seed 1 --out soak.json
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
install_requirements "$dev"
cd "$root"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$python" tests/faults/soak.py "$@"
