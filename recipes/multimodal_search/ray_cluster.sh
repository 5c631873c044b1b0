#!/usr/bin/env bash
# Starts Ray for a run on several nodes: on the first `./ray_cluster.sh head`, on the others `./ray_cluster.sh join IP`.
# The recipe's folder must have the same path on all of them. `ray stop` ends it. Further options are for `ray start`.
set -euo pipefail

RECIPE="$(dirname "$(realpath "$0")")"
PORT="${RAY_PORT:-6379}"
export PYTHONPATH="$RECIPE${PYTHONPATH:+:$PYTHONPATH}"
case "${1:-}" in
  head)
    ray start --head --port "$PORT" --disable-usage-stats "${@:2}"
    address="$(hostname -I | awk '{print $1}')"
    echo "On every other node:   $0 join $address"
    echo "Then here:             RAY_ADDRESS=$address:$PORT ./train.sh --nodes N ..."
    ;;
  join)
    [ -n "${2:-}" ] || { echo "ray_cluster.sh: join needs the first node's address" >&2 && exit 2; }
    ray start --address "$2:$PORT" --disable-usage-stats "${@:3}"
    ;;
  *)
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
    ;;
esac
