#!/usr/bin/env bash
# What a lent GPU is to do, in one command that stops in time and goes on where an earlier piece stopped.
#
#   bash benchmarks/gpu/run.sh OUT MINUTES [WHAT...]
#
# WHAT, in this order (default: check speed study):
#   check    the tests that need a GPU; one epoch of each workflow through monai.bundle run
#   speed    the tables of a step, the loader and inference (benchmarks/gpu/speed.py)
#   study    the runs of the study in the order of their worth (benchmarks/gpu/study.py)
#   weights  the encoder and the models that ship, with ten times the steps (benchmarks/train_models.py)
#
# OUT gets at most eight files: results.jsonl, speed.jsonl, check.txt and encoders in half precision. Finished runs are
# never repeated: give the OUT of the last piece again. Run it in the folder into which the packs of
# benchmarks/gpu/pack.py were unpacked, on a machine with PyTorch and a CUDA device; nothing is downloaded.
# SMOKE=1 runs all of it with toy sizes on the CPU.
#
# In pieces of ten minutes: first check.tar and "run.sh OUT 9 check speed"; then study.tar and "run.sh OUT 9 study",
# again and again, until it says that no run is left. pack.py says how both packs are made.
set -euo pipefail
out="${1:?usage: run.sh OUT MINUTES [check|speed|study|weights ...]}"
minutes="${2:?usage: run.sh OUT MINUTES [check|speed|study|weights ...]}"
shift 2
(($#)) || set -- check speed study
start=$SECONDS
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$root"
if compgen -G "wheels/*.whl" > /dev/null && [[ ! -d site ]]; then
  python3 -m pip install -q --no-index --no-deps --target site wheels/*.whl
fi
export PYTHONPATH="$root/custom:$root${PYTHONPATH:+:$PYTHONPATH}:$root/site"
if [[ -d packed && ! -d data ]]; then
  python3 -m benchmarks.gpu.pack --unpack . --out data
fi
export TORCHINDUCTOR_CACHE_DIR="$root/compiled"  # a network is compiled once for all runs
left() { echo $(((minutes * 60 - (SECONDS - start)) / 60)); }
smoke=()
[[ -z "${SMOKE:-}" ]] || smoke=(--smoke)

for what in "$@"; do
  (($(left) > 0)) || break
  echo "== $what, $(left) of $minutes minutes left"
  case "$what" in
    check) python3 -m benchmarks.gpu.check --out "$out" --minutes "$(left)" "${smoke[@]}" || true ;;
    speed) python3 -m benchmarks.gpu.speed --out "$out" --minutes "$(left)" "${smoke[@]}" || true ;;
    study) python3 -m benchmarks.gpu.study --out "$out" --data "${SSPFORMER_DATA:-data}" --minutes "$(left)" "${smoke[@]}" || true ;;
    weights) python3 -m benchmarks.train_models --data "${SSPFORMER_DATA:-data}" --work_dir "$out/weights" ;;
    *) echo "run.sh: '$what' is none of check, speed, study, weights" >&2; exit 2 ;;
  esac
done
echo "== finished after $((SECONDS - start)) s"
[[ ! -f "$out/results.jsonl" ]] || tail -n 12 "$out/results.jsonl"
