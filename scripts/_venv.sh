# shellcheck shell=bash disable=SC2034
# Sourced by the other scripts: makes the virtual environment if it does not exist, and installs a requirements
# file, once for each content of the file; later installations keep those versions. Sets `python`.
#   VENV          its folder (default: .venv in the repository)
#   REQUIREMENTS  the requirements file (default: requirements.txt)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
requirements=${REQUIREMENTS:-$root/requirements.txt}
dev="$root/requirements-dev.txt"  # further packages for the tests
[ "$(basename "$requirements")" != requirements-oldest.txt ] || dev="$root/requirements-dev-oldest.txt"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or 3.12 with its venv module is required; set PYTHON to its path" >&2
    exit 2
}

install_requirements() { # requirements files
    local file stamp
    for file in "$@"; do
        stamp="$venv/.installed-$(basename "$file")"
        if ! cmp -s "$file" "$stamp"; then
            echo "installing $(basename "$file") into $venv"
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file" -c "$requirements"
            cp "$file" "$stamp"
        fi
    done
}

if [ ! -x "$venv/bin/python" ]; then
    interpreter=$(find_python)
    echo "making $venv with $("$interpreter" --version)"
    "$interpreter" -m venv "$venv"
fi
install_requirements "$requirements"
# On a CPU with other work (data workers, a second run), threads that spin while they wait cost several times what they
# save.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
python="$venv/bin/python"
