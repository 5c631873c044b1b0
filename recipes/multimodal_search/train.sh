#!/usr/bin/env bash
# Trains the search agent. Everything after the options goes to veRL as it is.
#
#   ./train.sh --data data/train.parquet --val data/fvqa_test.parquet
#   ./train.sh --policy qwen3_vl_8b --loss gspo --advantage grpo --data ... --val ... trainer.save_freq=50
#   ./train.sh --nodes 4 ...          on the first of four nodes, once ./ray_cluster.sh has started Ray on all of them
#   ./train.sh --dry-run ...          checks configuration, data, tools and back ends, and ends
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  echo "--policy: $(list policy)   --loss: $(list loss)   --advantage: tapo, or any of veRL's (default: tapo)"
  exit 0
}

list() {
  basename -s .yaml -a "$RECIPE/config/$1"/*.yaml | paste -sd ' '
}

fail() {
  echo "train.sh: $1" >&2
  exit "${2:-2}"
}

# A value as Hydra's grammar takes it, whatever characters it holds: backslashes count only before a quote.
quoted() {
  printf "'%s'" "$(printf %s "$1" | sed "s/\(\\\\*\)'/\1\1\\\\'/g; s/\\\\*\$/&&/")"
}

RECIPE="$(dirname "$(realpath "$0")")"
policy=qwen3_vl_4b loss=grpo advantage=tapo nodes=1 data="" val="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    --policy | --loss | --advantage | --nodes | --data | --val)
      [ $# -ge 2 ] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage ;;
    --*) fail "unknown option $1; --help shows them" ;;
    *) break ;;
  esac
done
for argument in "$@"; do
  case "$argument" in --*) fail "$argument must stand before veRL's settings" ;; esac
done
for group in policy loss; do
  [ -f "$RECIPE/config/$group/${!group}.yaml" ] || fail "--$group ${!group} is none of: $(list "$group")"
done
for file in data val; do
  [ -n "${!file}" ] || fail "--$file is missing: a parquet file of search_agent.data.prepare"
  [ -f "${!file}" ] || fail "--$file: there is no file ${!file}"
done
case "$nodes" in '' | *[!0-9]* | 0) fail "--nodes must be a number, got '$nodes'" ;; esac
if [ "$nodes" -gt 1 ] && [ -z "${RAY_ADDRESS:-}" ]; then
  fail "--nodes $nodes needs RAY_ADDRESS: start Ray on every node with ray_cluster.sh, which prints it"
fi

data="$(realpath "$data")" val="$(realpath "$val")" OUT="$(realpath -m "${OUT:-outputs}")"
export RECIPE OUT PYTHONPATH="$RECIPE${PYTHONPATH:+:$PYTHONPATH}"
# VeRL prints its configuration, and Hydra keeps it. A cache's address with a password must not get there.
cache=SEARCH_CACHE
case "${SEARCH_CACHE:-}" in redis*@* | redis*password=*)
  cache=""
  [ "$nodes" = 1 ] || echo "train.sh: SEARCH_CACHE holds a password, so the nodes are not told: set it wherever Ray is started" >&2
  ;;
esac
# Wherever the configuration is read, OmegaConf would resolve it; quoted once, it would be resolved the second time.
for variable in RECIPE OUT PYTHONPATH SEARCH_URL $cache data val; do
  case "${!variable:-}" in *"\${"*) fail "$variable is ${!variable}: a path with \${ in it cannot be used; rename it" ;; esac
done
arguments=(
  --config-dir "$RECIPE/config" --config-name "${CONFIG:-multimodal_search}"
  "policy=$policy" "loss=$loss" "algorithm.adv_estimator=$advantage"
  "data.train_files=$(quoted "$data")" "data.val_files=$(quoted "$val")"
  "trainer.nnodes=$nodes"
)
# To the workers of a cluster that was started without them.
for variable in RECIPE OUT PYTHONPATH SEARCH_URL $cache VERL_FILE_LOGGER_PATH; do
  [ -z "${!variable:-}" ] ||
    arguments+=("++ray_kwargs.ray_init.runtime_env.env_vars.$variable=$(quoted "${!variable}")")
done
if [ "$nodes" -gt 1 ]; then
  # As ray_cluster.sh starts them. Clusters that others start may have none.
  if [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || [ -s ~/.ray/auth_token ]; then
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
  fi
  python3 -m search_backends.nodes check "$nodes" "$RECIPE" "$data" "$val" || fail "the nodes are not ready, see above"
  arguments+=("++ray_kwargs.ray_init.address=$(quoted "$RAY_ADDRESS")")
  # The cluster has these already; Ray refuses them.
  for setting in num_cpus num_gpus object_store_memory include_dashboard; do
    arguments+=("++ray_kwargs.ray_init.$setting=null")
  done
fi
python3 -m search_agent.check "${arguments[@]}" "$@"
[ -z "$dry_run" ] || exit 0
[ "$nodes" -gt 1 ] || exec python3 -m verl.trainer.main_ppo "${arguments[@]}" "$@"
python3 -m verl.trainer.main_ppo "${arguments[@]}" "$@" &
run=$!
# VeRL waits for rollouts of a lost node for ever.
python3 -m search_backends.nodes watch "$nodes" &
watch=$!
trap 'kill $run 2>/dev/null' INT TERM
code=0
wait -n $run $watch || code=$?
if ! kill -0 $watch 2>/dev/null; then
  lost=1
  kill $run 2>/dev/null || true
  end=$((SECONDS + 60))
  while kill -0 $run 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 1; done
  kill -9 $run 2>/dev/null || true
fi
wait $run || code=$?
kill -9 $watch 2>/dev/null || true # a mere signal makes Ray print where it was
# Of a node that has just gone Ray learns after a while: each is given something to do.
[ "$code" = 0 ] || [ -n "${lost:-}" ] || python3 -m search_backends.nodes check "$nodes" || lost=1
[ -z "${lost:-}" ] ||
  fail "a node was lost. Once ray_cluster.sh has joined it again, the same command goes on from the last checkpoint" "$code"
exit "$code"
