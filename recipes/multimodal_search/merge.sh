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
exec python3 -m verl.model_merger merge --backend fsdp --local_dir "$checkpoint/actor" --target_dir "$target"
