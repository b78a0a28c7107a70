#!/usr/bin/env bash
set -euo pipefail

# Suited to a few minutes on 2 CPU cores; options on the command line come after these and win.
BUDGET=(--epochs 12)

usage() {
  cat << 'EOF'
Usage: ./quickstart.sh [--dataset_dir FOLDER] [--output_dir FOLDER] [--KEY VALUE ...]

Pretrains a small SSPFormer on MRI scans, within minutes on a CPU.

  --dataset_dir FOLDER  your scans (NIfTI or DICOM, in any arrangement); without it, demonstration data are made
  --output_dir FOLDER   where the results go (default: output/pretrain in this repository)
  --KEY VALUE           any other entry of bundle/configs/pretrain.json, such as --epochs 100
  -h, --help            show this

The first run installs everything into .venv. PYTHON chooses the interpreter to make it with; SSPFORMER_PYTHON names an
interpreter that has everything installed already, which is then used as it is.
EOF
}
fail() { echo "quickstart.sh: error: $* (./quickstart.sh --help shows the usage)" >&2; exit 2; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config="$root/bundle/configs/pretrain.json"
output_dir="$root/output/pretrain"
options=()
while (($#)); do
  case "$1" in -h | --help) usage; exit ;; esac
  [[ "$1" == --?* ]] || fail "'$1' is not an option: options are given as --KEY VALUE."
  key="${1#--}"
  if [[ "$key" == *=* ]]; then  # --KEY=VALUE
    value="${key#*=}"
    key="${key%%=*}"
    shift
  else
    [[ $# -ge 2 && "$2" != --* ]] || fail "--$key needs a value."
    value="$2"
    shift 2
  fi
  [[ -n "$value" ]] || fail "--$key needs a value."
  case "$key" in
    dataset_dir)
      [[ -d "$value" ]] || fail "--dataset_dir '$value' is not a folder."
      options+=(--dataset_dir "$(cd "$value" && pwd)")
      ;;
    output_dir)
      [[ ! -e "$value" || -d "$value" ]] || fail "--output_dir '$value' is a file, not a folder."
      [[ "$value" == /* ]] || value="$PWD/$value"
      output_dir="${value%/}"
      ;;
    *)
      entry="${key%%::*}"  # of a nested entry, network::depth, the outermost name
      entry="${entry%%#*}"
      grep -qF "\"$entry\":" "$config" || fail "--$key: bundle/configs/pretrain.json has no entry '$entry'."
      options+=("--$key" "$value")
      ;;
  esac
done

python="$("$root/scripts/ensure_venv.sh")"
cd "$root"
export PYTHONPATH="$root/custom${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m monai.bundle run training \
  --config_file bundle/configs/pretrain.json \
  --bundle_root bundle \
  --meta_file bundle/configs/metadata.json \
  --logging_file bundle/configs/logging.conf \
  --output_dir "$output_dir" \
  "${BUDGET[@]}" ${options[@]+"${options[@]}"}

cat << EOF

Done. The results are in $output_dir:
  pictures         $output_dir/pictures/
  curves           $python -m tensorboard.main --logdir "$output_dir/tensorboard"
  encoder weights  $output_dir/models/pretrained/encoder.pt
EOF
