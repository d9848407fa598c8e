#!/usr/bin/env bash
# A masked autoencoder in minutes on a laptop: installs, pretrains a small one, draws its reconstructions, and compares it
# with an untrained one where labels are few.
#
#   bash scripts/quickstart.sh                     handwritten digits, which come with scikit-learn
#   bash scripts/quickstart.sh --data_path DIR     your images: any folder, or DIR/train/<class>/ and DIR/val/<class>/
#   bash scripts/quickstart.sh --help              the other flags
#   PYTHON=python3.12 bash scripts/quickstart.sh   with this interpreter
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[ -x "${VENV:-$here/../.venv}/bin/python" ] || . "$here/_help.sh"  # nothing is installed for --help
. "$here/_venv.sh"
exec "$python" "$root/tools/quickstart.py" "$@"
