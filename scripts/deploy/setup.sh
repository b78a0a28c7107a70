#!/usr/bin/env bash
# scripts/deploy/setup.sh VENV: make an environment with the MONAI Deploy App SDK and what the bundle needs (minutes).
# PYTHON chooses the interpreter; check.py was run with Python 3.11.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${1:?usage: setup.sh VENV}"
[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install torch==2.13.0 # first: the rest must not choose another
"$venv/bin/python" -m pip --disable-pip-version-check install -r "$root/examples/deploy/requirements.txt" nilearn==0.14.1
"$venv/bin/python" -c 'import monai.deploy.operators.monai_bundle_inference_operator; print("MONAI Deploy is ready")'
