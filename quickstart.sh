#!/usr/bin/env bash
set -euo pipefail

# Suited to a few minutes on 2 CPU cores: about 4000 crops, from a dozen scans or a hundred. Options on the command line win.
BUDGET=(
  --epochs 40 --val_interval 4 --learning_rate 0.001 --image_size "[64,64,64]"
  --crops_per_scan "\$max(1, round(96 / len(@datalist['training'])))"
)

usage() {
  cat << 'EOF'
Usage: ./quickstart.sh [--dataset_dir FOLDER] [--output_dir FOLDER] [--KEY VALUE ...]

Pretrains a small SSPFormer on MRI scans, within minutes on a CPU.

  --dataset_dir FOLDER  your scans (NIfTI or DICOM, in any arrangement), one file, or a datalist JSON;
                        without it, demonstration data are made
  --output_dir FOLDER   where the results go (default: output/pretrain_NAME in this repository, after the data)
  --KEY VALUE           any other entry of bundle/configs/pretrain.json, such as --epochs 100
  -h, --help            show this

The first run installs everything into .venv. PYTHON chooses the interpreter to make it with; SSPFORMER_PYTHON names an
interpreter that has everything installed already, which is then used as it is.
EOF
}
fail() { echo "quickstart.sh: error: $* (./quickstart.sh --help shows the usage)" >&2; exit 2; }

absolute() { local path="${1%/}"; [[ "$path" == /* ]] && echo "$path" || echo "$PWD/$path"; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config="$root/bundle/configs/pretrain.json"
output_dir=""
data_name="demo"
encoder_path=""
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
      [[ -e "$value" ]] || fail "--dataset_dir '$value' does not exist."
      [[ -d "$value" ]] && value="$(cd "$value" && pwd)" || value="$(absolute "$value")"
      data_name="$(basename "$value")"
      options+=(--dataset_dir "$value")
      ;;
    output_dir)
      [[ ! -e "$value" || -d "$value" ]] || fail "--output_dir '$value' is a file, not a folder."
      output_dir="$(absolute "$value")"
      ;;
    cache_dir) options+=(--cache_dir "$(absolute "$value")") ;;
    encoder_path)
      encoder_path="$(absolute "$value")"
      options+=(--encoder_path "$encoder_path")
      ;;
    *)
      entry="${key%%::*}"  # of a nested entry, network::depth, the outermost name
      entry="${entry%%#*}"
      grep -qF "\"$entry\":" "$config" || fail "--$key: bundle/configs/pretrain.json has no entry '$entry'."
      options+=("--$key" "$value")
      ;;
  esac
done

output_dir="${output_dir:-$root/output/pretrain_$data_name}"
encoder_path="${encoder_path:-$output_dir/models/pretrained/encoder.pt}"
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
  encoder weights  $encoder_path
EOF
