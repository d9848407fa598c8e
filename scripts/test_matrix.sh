#!/usr/bin/env bash
# The suite (test.sh) on the oldest and the newest supported versions of all packages, with Python 3.11 to 3.14 where they
# are installed, one case after the other; then a table. Exit code 1 if anything fails. Arguments go to pytest:
#   bash scripts/test_matrix.sh
#   bash scripts/test_matrix.sh tests/models/test_fixtures.py tests/util/checkpoint/test_frozen.py
#   CASES   cases to run (default: oldest-3.11 oldest-3.12 newest-3.11 newest-3.12 newest-3.13 newest-3.14)
#   VENVS   folder of their environments, which are made if needed (default: .venv-matrix in the repository; about 7 GB
#           each)
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venvs=${VENVS:-$root/.venv-matrix}
mkdir -p "$venvs"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

versions() { # PYTHON: print the versions of its packages
    "$1" -c '
import platform, timm, torch, torchvision
print(platform.python_version(), *(each.__version__.split("+")[0] for each in (torch, torchvision, timm)))' 2> /dev/null
}

count() { # WORD: print the number before it in pytest's last line
    tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '^[0-9]+' || echo 0
}

row() { printf '%-12s %-8s %-8s %-12s %-8s %7s %7s %8s %8s\n' "$@"; }

table=$(row case python torch torchvision timm passed failed skipped minutes)
status=0 ran=''
for name in ${CASES:-oldest-3.11 oldest-3.12 newest-3.11 newest-3.12 newest-3.13 newest-3.14}; do
    python="python${name#*-}" venv="$venvs/$name"
    case $name in
        oldest-3.1[12]) requirements="requirements-oldest.txt" ;;
        newest-3.1[1-4]) requirements="requirements.txt" ;;
        *) echo "error: CASES has $name; use oldest-3.11, oldest-3.12, or newest-3.11 to newest-3.14" >&2; exit 2 ;;
    esac
    if [ ! -x "$venv/bin/python" ] && ! "$python" -c 'import venv' 2> /dev/null; then
        table+=$'\n'"$name: $python is not installed"
        continue
    fi
    echo "== $name"
    ran=1
    began=$SECONDS
    VENV=$venv REQUIREMENTS="$root/$requirements" PYTHON=$python bash "$root/scripts/test.sh" "$@" 2>&1 | tee "$log"
    failed=$((PIPESTATUS[0] != 0))
    status=$((status | failed))
    read -ra set_of <<< "$(versions "$venv/bin/python" || echo - - - -)"
    bad=$(($(count failed) + $(count 'errors?')))
    [ "$failed" = 0 ] || [ "$bad" -gt 0 ] || bad=all  # pytest was not reached, or crashed
    minutes=$(awk -v s=$((SECONDS - began)) 'BEGIN { printf "%.1f", s / 60 }')
    table+=$'\n'$(row "$name" "${set_of[@]}" "$(count passed)" "$bad" "$(count skipped)" "$minutes")
done
printf '\n%s\n' "$table"
[ -n "$ran" ] || { echo "error: no case could run: install Python 3.11 to 3.14" >&2; exit 2; }
exit "$status"
