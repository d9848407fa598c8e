#!/usr/bin/env bash
# Installs what the tests need, checks the style, runs the suite. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_fixtures.py -k lars
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
install_requirements "$root/requirements-dev.txt"
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
for script in scripts/*.sh scripts/*/*.sh .ci/run; do bash -n "$script"; done
exec "$python" -m pytest "$@"
