#!/usr/bin/env bash
# The first hour with a GPU: tests on the device, speed, memory and small studies, in stages of at most nine minutes.
#
#   bash scripts/gpu_check.sh OUT --data CIFAR10                (train/<class>/ and val/<class>/, or torchvision's)
#   bash scripts/gpu_check.sh OUT --data CIFAR10 --stage steps data
#   bash scripts/gpu_check.sh OUT --rehearse                    the same on a CPU with tiny sizes, in a few minutes
#
# Each stage writes OUT/STAGE.json (commands, seconds, exit codes, numbers) and logs beside it. Started again, it runs what
# is missing, and continues unfinished trainings. --list prints the commands. --minutes (default 25) ends it in time.
# PYTHON: the interpreter (default: .venv's, else python).
# shellcheck disable=SC2154,SC1091
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
. "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
