#!/usr/bin/env bash
# Starts Ray for a run on several nodes: on the first `./ray_cluster.sh head`, on the others `./ray_cluster.sh join IP`.
# The recipe's folder must have the same path on all of them. `ray stop` ends it. Further options are for `ray start`.
# `./ray_cluster.sh wait N [SECONDS]`, with RAY_ADDRESS, ends once N nodes are there, or fails after 300 s.
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
  wait)
    [ -n "${2:-}" ] || { echo "ray_cluster.sh: wait needs the number of nodes" >&2 && exit 2; }
    : "${RAY_ADDRESS:?is where the first node listens, ADDRESS:PORT}"
    python3 - "$2" "${3:-300}" <<'END'
import os, socket, sys, time

wanted, limit = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
alive = []
while len(alive) < wanted and time.monotonic() < limit:
    try:
        # Ray itself would wait for a minute where nobody listens.
        socket.create_connection((host, int(port)), 1).close()
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        alive = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    except OSError:
        pass
    time.sleep(1)
if len(alive) < wanted:
    sys.exit(f"ray_cluster.sh: {len(alive)} of {wanted} nodes are there: {', '.join(alive) or 'none'}")
END
    ;;
  *)
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
    ;;
esac
