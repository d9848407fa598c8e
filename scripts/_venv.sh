# shellcheck shell=bash disable=SC2034
# Sourced by the other scripts: makes the virtual environment if it does not exist, and installs a requirements
# file, once for each content of the file; later installations keep those versions. Sets `python`.
#   VENV          its folder (default: .venv in the repository)
#   PYTHON        the interpreter to make it with (default: Python 3.12, 3.11, 3.13 or 3.14, whichever is found first)
#   REQUIREMENTS  the requirements file (default: requirements.txt)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
requirements=${REQUIREMENTS:-$root/requirements.txt}
dev="$root/requirements-dev.txt"  # further packages for the tests
[ "$(basename "$requirements")" != requirements-oldest.txt ] || dev="$root/requirements-dev-oldest.txt"

version_of() { # PYTHON: print its version (3.12), nothing if it cannot be run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3.13 python3.14 python3 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 to 3.14 with its venv module is required; set PYTHON to its path" >&2
    exit 2
}

check_python() { # the interpreter that PYTHON names: use it or refuse it, never another one
    local version
    version=$(version_of "$PYTHON")
    if [ -z "$version" ]; then
        echo "error: PYTHON=$PYTHON cannot be run: give the name or path of Python 3.11 to 3.14" >&2
        exit 2
    fi
    case $version in
        3.1[1-4]) ;;
        [0-2].* | 3.[0-9] | 3.10)
            echo "error: PYTHON=$PYTHON is Python $version, but 3.11 to 3.14 is required" >&2
            exit 2 ;;
        *) echo "note: PYTHON=$PYTHON is Python $version; the project is meant for 3.11 to 3.14" >&2 ;;
    esac
    if ! "$PYTHON" -c 'import venv' 2>/dev/null; then
        echo "error: PYTHON=$PYTHON has no venv module: install it (python$version-venv), or give another Python" >&2
        exit 2
    fi
    echo "$PYTHON"
}

check_environment() { # refuse an environment of another version than that of PYTHON
    local wanted have
    wanted=$(version_of "$PYTHON") have=$(version_of "$venv/bin/python")
    if [ -z "$wanted" ]; then
        echo "error: PYTHON=$PYTHON cannot be run: give the name or path of Python 3.11 to 3.14" >&2
        exit 2
    fi
    case $wanted/$have in
        [0-9]*.[0-9]*/[0-9]*.[0-9]*) ;;
        *) return 0 ;;
    esac
    if [ "$wanted" != "$have" ]; then
        echo "error: $venv has Python $have, but PYTHON=$PYTHON is Python $wanted: delete this folder, or set VENV to" \
            "another one" >&2
        exit 2
    fi
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
    if [ -n "${PYTHON:-}" ]; then interpreter=$(check_python); else interpreter=$(find_python); fi
    echo "making $venv with $("$interpreter" --version)"
    "$interpreter" -m venv "$venv"
elif [ -n "${PYTHON:-}" ]; then
    check_environment
fi
install_requirements "$requirements"
# On a CPU with other work (data workers, a second run), threads that spin while they wait cost several times what they
# save.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
python="$venv/bin/python"
