#!/usr/bin/env bash
# Makes a Hugging Face folder of a checkpoint:   ./merge.sh outputs/tapo-vanilla/checkpoints/global_step_100 merged
set -euo pipefail

checkpoint="${1:-}" target="${2:-}"
if [ -z "$target" ]; then
  sed -n '2s/^# //p' "$0" >&2
  exit 2
fi
if [ ! -d "$checkpoint/actor" ]; then
  echo "merge.sh: $checkpoint has no folder 'actor': name a folder global_step_N" >&2
  exit 2
fi
python3 -m verl.model_merger merge --backend fsdp --local_dir "$checkpoint/actor" --target_dir "$target"
# What the merger cannot load it leaves out and says nothing: the processor of images, where torchvision is missing.
for file in "$checkpoint"/actor/huggingface/*; do
  case "$file" in
    *.index.json) ;;
    *.json | *.jinja) [ -e "$target/${file##*/}" ] || cp "$file" "$target" ;;
  esac
done
if grep -q '"vision_config"' "$target/config.json" && [ ! -e "$target/preprocessor_config.json" ] &&
  ! grep -qs '"image_processor"' "$target/processor_config.json"; then
  echo "merge.sh: $target has no processor of images, and neither has the checkpoint: copy preprocessor_config.json or" \
    "processor_config.json from the folder that the training began with" >&2
  exit 1
fi
