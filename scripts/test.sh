#!/usr/bin/env bash
# Installs the packages of the tests, checks style and types, and runs the suite, two files at a time (WORKERS=4: four).
# Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/models/test_fixtures.py -k lars
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
install_requirements "$dev"
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
for script in scripts/*.sh scripts/*/*.sh .ci/run; do bash -n "$script"; done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
