#!/usr/bin/env bash
set -euo pipefail

# Suited to some ten minutes on 2 CPU cores, from a dozen scans or a hundred; options on the command line win.
PRETRAIN=(
  --epochs 24 --val_interval 4 --learning_rate 0.001 --image_size "[64,64,64]"
  --crops_per_scan "\$max(1, round(96 / len(@datalist['training'])))"
)
SEGMENT=(
  --epochs 20 --val_interval 10 --max_val_scans 2
  --crops_per_scan "\$max(1, round(48 / len(@datalist['training'])))"
)
DENOISE=(
  --epochs 6 --val_interval 3 --max_val_scans 2
  --crops_per_scan "\$max(1, round(240 / len(@datalist['training'])))"
)

usage() {
  cat << 'USAGE'
Usage: ./quickstart.sh [--dataset_dir FOLDER] [--labels "NAME,NAME,..."] [--output_dir FOLDER] [--KEY VALUE ...]

Pretrains a small SSPFormer on MRI scans, fine-tunes it for segmentation and denoising, scores both on held-out scans,
runs them on one scan, and draws a panel of it all; within ten minutes on a CPU.

  --dataset_dir FOLDER  your scans (NIfTI or DICOM, in any arrangement), one file, or a datalist JSON;
                        without it, demonstration data are made
  --labels NAMES        your scans are in images/ and have label maps in labels/: the names of the values 1, 2, ...;
                        without it, segmentation is left out for your scans
  --output_dir FOLDER   where the results go (default: output/quickstart_NAME in this repository, after the data)
  --KEY VALUE           any other entry of bundle/configs/pretrain.json, such as --epochs 100; for the pretraining
  -h, --help            show this

The first run installs everything into .venv. PYTHON chooses the interpreter to make it with; SSPFORMER_PYTHON names an
interpreter that has everything installed already, which is then used as it is.
USAGE
}
fail() { echo "quickstart.sh: error: $* (./quickstart.sh --help shows the usage)" >&2; exit 2; }

absolute() { local path="${1%/}"; [[ "$path" == /* ]] && echo "$path" || echo "$PWD/$path"; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config="$root/bundle/configs/pretrain.json"
output_dir=""
data_name="demo"
dataset_dir=""
labels="grey matter,white matter,cerebrospinal fluid"
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
      dataset_dir="$value"
      ;;
    labels) own_labels="$value" ;;
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
[[ -n "$dataset_dir" ]] && labels="${own_labels:-}" || labels="${own_labels:-$labels}"

output_dir="${output_dir:-$root/output/quickstart_$data_name}"
encoder_path="${encoder_path:-$output_dir/pretrain/models/pretrained/encoder.pt}"
python="$("$root/scripts/ensure_venv.sh")"
cd "$root"
export PYTHONPATH="$root/custom${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # threads that wait actively starve beside another process
dataset_dir="${dataset_dir:-$("$python" -c "import sspformer; print(sspformer.demo.make_demo_dataset('$root/bundle/demo_data'))")}"

bundle() {  # run id, config files, more options
  local id="$1" configs="$2"
  shift 2
  "$python" -m monai.bundle run "$id" --config_file "$configs" --bundle_root bundle \
    --meta_file bundle/configs/metadata.json --logging_file bundle/configs/logging.conf "$@"
}
say() { printf '\n\n=== %s\n\n' "$*"; }

say "Pretraining on $dataset_dir"
bundle training bundle/configs/pretrain.json --dataset_dir "$dataset_dir" --output_dir "$output_dir/pretrain" \
  "${PRETRAIN[@]}" ${options[@]+"${options[@]}"}

tasks=(denoising)
[[ -z "$labels" ]] || tasks=(segmentation denoising)
# shellcheck disable=SC2016
held_out='import json, sys
from sspformer.data import find_inputs
datalist, one = sys.argv[1:]
lists = json.load(open(datalist))
for item in lists["validation"] + lists["training"]:
    with open(one, "w") as file:
        json.dump({"test": [item]}, file)
    if "image" in find_inputs(one)[0]:  # it has a reason instead if it is 4D
        print(one)
        break'
for task in "${tasks[@]}"; do
  of_task=()
  configs() { echo "['bundle/configs/$1.json','bundle/configs/$task.json']"; }
  if [[ "$task" == segmentation ]]; then
    configs() { echo "['bundle/configs/$1.json']"; }
    IFS=, read -ra structures <<< "$labels"
    of_task=(
      --class_names "$("$python" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "${structures[@]}")"
      --network_def#out_channels "$((${#structures[@]} + 1))"
    )
    budget=("${SEGMENT[@]}")
  else
    budget=("${DENOISE[@]}")
  fi
  where="$output_dir/$task"
  say "Fine-tuning for $task"
  bundle training "$(configs train)" --dataset_dir "$dataset_dir" --output_dir "$where" \
    --pretrained "$encoder_path" "${budget[@]}" ${of_task[@]+"${of_task[@]}"}
  say "Scoring $task on the scans that were held out"
  bundle evaluating "$(configs evaluate)" --dataset_dir "$where/datalist.json" --output_dir "$where/evaluation" \
    --weights "$where/models/model.pt" --max_pictures 2 ${of_task[@]+"${of_task[@]}"}
  one_scan="$("$python" -c "$held_out" "$where/datalist.json" "$where/one_scan.json")"
  if [[ -z "$one_scan" ]]; then
    say "No scan is 3D: $task is not run on a new one, split 4D files into volumes for that"
    continue
  fi
  say "Running $task on one scan, as you would on a new one"
  bundle inference "$(configs inference)" --dataset_dir "$one_scan" \
    --output_dir "$where/inference" --weights "$where/models/model.pt" --pictures true \
    --overwrite true ${of_task[@]+"${of_task[@]}"}
done

panel="$("$python" scripts/quickstart_panel.py "$output_dir" "${tasks[@]}")"
cat << DONE

Done. The results are in $output_dir:
  look at this     $panel
  tasks            ${tasks[*]}: pictures/, evaluation/summary.csv, inference/ and models/model.pt of each
  encoder weights  $encoder_path
  curves           $python -m tensorboard.main --logdir "$output_dir"
DONE
