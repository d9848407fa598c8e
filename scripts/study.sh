#!/usr/bin/env bash
# A study of all methods as a queue that can be stopped and continued at any time: the whole of CIFAR-10, 40 epochs each.
#
#   bash scripts/study.sh OUT --data CIFAR10        (train/<class>/ and val/<class>/)
#
# --list shows what is left, --table writes the tables; all flags: python tools/study.py --help. PYTHON comes from the
# environment.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/../tools/study.py" "$@"
