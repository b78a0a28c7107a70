#!/usr/bin/env bash
# scripts/monailabel/setup.sh VENV: make an environment with MONAI Label and what the bundle needs (3.9 GB; 3 to 15
# minutes, by network and disk). Each step says so when it begins, and pip what it fetches.
# PYTHON chooses the interpreter; MONAI Label 0.8.5 runs on Python 3.11 at the newest.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:?usage: setup.sh VENV}"
[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install)
step() { echo "setup.sh: $1 of 3, $2 ($(date +%H:%M:%S))"; }
step 1 "PyTorch"
"${pip[@]}" torch==2.13.0 # first: what is installed later must not choose another one
step 2 "MONAI Label and about 150 packages that it needs"
"${pip[@]}" -r "$here/requirements.txt"
step 3 "trying the imports"
site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp "$here/cpu_torchvision_fix.py" "$site/"
echo "import cpu_torchvision_fix" > "$site/cpu_torchvision_fix.pth"
"$venv/bin/python" -c 'import torchvision.utils, monailabel.app, monailabel.transform.post; print("MONAI Label is ready")'
