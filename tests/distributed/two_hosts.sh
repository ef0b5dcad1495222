#!/usr/bin/env bash
# Two hosts: network namespaces joined by a pair of virtual adapters, and torchrun across them with a rendezvous on the first.
#
#   tests/distributed/two_hosts.sh FOLDER PROGRAM [ARGUMENTS]
#
# Both run PROGRAM once. When there is a file FOLDER/cut, the second host is taken off the network. PYTHON is the
# interpreter (default: python), LIMIT the seconds after which everything is killed (default: 90). Needs iproute2 and
# util-linux, and leave to make user namespaces; ends with 77 where they may not be made.
#
# Namespaces, adapters and processes belong to this script, and are gone when it ends, however it ends: the first process
# in a namespace of processes takes all others with it.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
  private=(unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc)
  command -v ip >/dev/null || { echo "there is no command ip (iproute2)"; exit 77; }
  may=$("${private[@]}" ip link add probe0 type veth peer name probe1 2>&1) || {
    echo "namespaces with adapters may not be made here: ${may%%$'\n'*}"
    exit 77
  }
  exec timeout --signal KILL "${LIMIT:-90}" "${private[@]}" bash "$0" --inside "$@"
fi
shift

folder=$1
first=198.51.100.1 second=198.51.100.2 # of a block that is for documentation
mount -t tmpfs none /run
on_second=(nsenter --net=/run/second)
touch /run/second
unshare --net=/run/second true
ip link add host0 type veth peer name host1
ip link set host1 netns /run/second
ip address add $first/24 dev host0
"${on_second[@]}" ip address add $second/24 dev host1
for device in lo host0; do ip link set $device up; done
for device in lo host1; do "${on_second[@]}" ip link set $device up; done

# torchrun ADDRESS ADAPTER IS_FIRST ENTER… -- ARGUMENTS…: on one of them, which the words of ENTER lead into
torchrun() {
  local address=$1 adapter=$2 is_first=$3 enter=()
  shift 3
  while [ "$1" != -- ]; do enter+=("$1") && shift; done
  env GLOO_SOCKET_IFNAME="$adapter" OMP_NUM_THREADS=1 "${enter[@]}" "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes 2 --nproc-per-node 1 --rdzv-id hosts --rdzv-backend c10d --rdzv-endpoint $first:29400 \
    --rdzv-conf is_host="$is_first" --local-addr "$address" "${@:2}"
}
torchrun $first host0 1 -- "${@:2}" &
one=$!
torchrun $second host1 0 "${on_second[@]}" -- "${@:2}" &
other=$!

while [ ! -e "$folder/cut" ]; do
  kill -0 $one 2>/dev/null && kill -0 $other 2>/dev/null || break
  sleep 0.05
done
if [ -e "$folder/cut" ]; then
  "${on_second[@]}" ip link set host1 down
  # Neither agent of torchrun can end in good order any more: what counts is what the programs leave behind.
  while [ ! -e "$folder/rank-0" ] || [ ! -e "$folder/rank-1" ]; do sleep 0.05; done
  exit 0
fi
wait $one
wait $other
