#!/usr/bin/env bash
# Starts Ray for a run on several nodes: on the first `./ray_cluster.sh head [ITS_ADDRESS]`, on the others
# `./ray_cluster.sh join FIRST_ADDRESS [ITS_ADDRESS]`. The recipe's folder must have the same path on all of them.
# `ray stop` ends it. Further options are for `ray start`.
# `./ray_cluster.sh wait N [SECONDS]`, with RAY_ADDRESS, ends once N nodes are there, or fails after 300 s.
set -euo pipefail

RECIPE="$(dirname "$(realpath "$0")")"
PORT="${RAY_PORT:-6379}"
# Seconds that a step may take.
LIMIT="${RAY_START_LIMIT:-120}"
export PYTHONPATH="$RECIPE${PYTHONPATH:+:$PYTHONPATH}"

fail() {
  echo "ray_cluster.sh: $1" >&2
  exit "${2:-1}"
}

# This node's address: the one given, or the one by which it reaches $1, or its first.
own_address() {
  python3 - "$1" <<'END'
import socket, subprocess, sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
        probe.connect((sys.argv[1], 9))  # sends nothing
        address = probe.getsockname()[0]
    except OSError:
        address = (subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split() or [""])[0]
print("" if address.startswith("127.") else address)
END
}

# Torch looks up the host's name to find its address, which on many a machine is 127.0.1.1. Workers inherit this.
name_interface() {
  local interface
  interface="$(python3 - "$1" <<'END'
import sys, psutil

print(*[name for name, found in psutil.net_if_addrs().items() if any(each.address == sys.argv[1] for each in found)])
END
  )" || fail "python3 with this package's requirements is not on the PATH"
  [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
}

has_token() {
  [ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || [ -s ~/.ray/auth_token ]
}

# Ray lets in who has the token. Without one, everybody who reaches its ports can run programs here.
with_token() {
  export RAY_AUTH_MODE=token
  has_token || "$@"
}

# $1: ADDRESS:PORT
listens() {
  timeout 5 bash -c "exec 3<>/dev/tcp/${1%:*}/${1##*:}" 2>/dev/null
}

# Waits until the first node answers, and takes our token.
reach() {
  until listens "$1:$PORT"; do
    [ "$SECONDS" -lt "$LIMIT" ] || fail "nothing listens at $1:$PORT: is Ray started there, and the port open?"
    sleep 1
  done
  local said
  said="$(timeout "$LIMIT" ray health-check --address "$1:$PORT" 2>&1)" || case "$said" in
    *Authentication*) fail "the token here is not the first node's: $bring" ;;
    *) fail "Ray does not answer at $1:$PORT: ${said##*$'\n'}" ;;
  esac
}

# Ray waits for a minute and more where it cannot go on; with --block it goes on until it is stopped, or until the first
# node has been away for a minute.
start() {
  local code=0 limit=(timeout "$LIMIT")
  case " $* " in *" --block "*) limit=() ;; esac
  "${limit[@]}" ray start "$@" --disable-usage-stats || code=$?
  [ "$code" = 0 ] || [ -z "$first" ] || listens "$first:$PORT" ||
    fail "the first node is gone: nothing listens at $first:$PORT, and Ray has ended here too. Once ray_cluster.sh head runs there again, the same command joins this node again"
  [ "$code" = 0 ] || fail "Ray did not start, or was ended (exit code $code), see above"
}

first=""
command="${1:-}"
[ $# -eq 0 ] || shift
case "$command" in
  head)
    address=""
    case "${1:-}" in '' | -*) ;; *) address="$1" && shift ;; esac
    address="${address:-$(own_address 192.0.2.1)}"
    [ -n "$address" ] || fail "this node has no address that others could reach: head ADDRESS"
    name_interface "$address"
    make_token() (umask 077 && ray get-auth-token --generate >/dev/null 2>&1)
    with_token make_token || fail "Ray made no token: it needs 2.52 or newer"
    echo "On every other node:   $0 join $address"
    echo "  without a shared home, before it:   scp -p $address:.ray/auth_token ~/.ray/"
    echo "Then here:             RAY_ADDRESS=$address:$PORT ./train.sh --nodes N ..."
    start --head --port "$PORT" --node-ip-address "$address" "$@"
    ;;
  join)
    first="${1:-}"
    case "$first" in '' | -*) fail "join needs the first node's address" 2 ;; esac
    shift
    address=""
    case "${1:-}" in '' | -*) ;; *) address="$1" && shift ;; esac
    address="${address:-$(own_address "$first")}"
    [ -n "$address" ] || fail "this node has no address that others could reach: join $first ADDRESS"
    bring="mkdir -p ~/.ray && scp -p $first:.ray/auth_token ~/.ray/"
    no_token() { fail "the first node's token is missing here: $bring"; }
    with_token no_token
    reach "$first"
    name_interface "$address"
    start --address "$first:$PORT" --node-ip-address "$address" "$@"
    ;;
  wait)
    case "${1:-}" in '' | *[!0-9]*) fail "wait needs the number of nodes" 2 ;; esac
    : "${RAY_ADDRESS:?is where the first node listens, ADDRESS:PORT}"
    within="${2:-300}"
    # By the time that Ray listens, `head` has made its token. Clusters that others start may have none.
    until listens "$RAY_ADDRESS" || [ "$SECONDS" -ge "$within" ]; do sleep 1; done
    ! has_token || export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
    python3 -m search_backends.nodes wait "$1" --limit $((within > SECONDS ? within - SECONDS : 0))
    ;;
  *)
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
    ;;
esac
