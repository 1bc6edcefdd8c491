#!/bin/bash
# MPI (Open MPI 4 or 5): one process a host, with all of the host's devices.
#
#     HOSTS=hosts.txt CONFIG=configs/pod_masked_codes.py configs/launch/mpirun.sh
#
# HOSTS names one host a line; that of the first line leads. SIGTERM to this script has every process save its last step
# and end. A run that lost a process (exit code 4), hung (5) or was killed by a signal (above 128) begins again from its
# newest checkpoint with the hosts that the file names by then.

CONFIG=${CONFIG:-configs/quickstart.py}
NAME=${NAME:-zoo}                # of the run
RUNS=${RUNS:-runs}               # a folder that all hosts share
OPTIONS=${OPTIONS:-}             # more options of `zoo train`, with spaces between
HOSTS=${HOSTS:-hosts.txt}
PORT=${PORT:-8476}               # free on the first host
PLATFORM=${PLATFORM:-gpu}        # cpu, gpu or tpu
RESTARTS=${RESTARTS:-50}
PAUSE=${PAUSE:-30}               # seconds before it begins again
ZOO=${ZOO:-zoo}                  # the command, at the same path on every host
STOPPED=75

# mpirun leaves processes no time between SIGTERM and SIGKILL, but hands SIGUSR2 on, to all processes that it started: here
# that is made of the one, and on each host the one of it again.
# shellcheck disable=SC2016
ON_HOST='trap "kill -TERM \$run" USR2
(trap "" USR2; exec "$@") & run=$!
while wait $run; code=$?; kill -0 $run 2>/dev/null; do :; done
exit $code'

if [[ ! -s $HOSTS ]]; then
  echo "$HOSTS: no such file of hosts" >&2
  exit 2
fi
read -ra options <<<"$OPTIONS"
stopped=
trap 'stopped=1; kill -USR2 "$run" 2>/dev/null' TERM INT

for ((restart = 0; ; restart++)); do
  mapfile -t hosts < <(sed 's/#.*//' "$HOSTS" | awk 'NF {print $1}')
  mpirun --hostfile "$HOSTS" --map-by ppr:1:node --bind-to none -np "${#hosts[@]}" -x PATH \
    bash -c "$ON_HOST" host "$ZOO" train "$CONFIG" --runs "$RUNS" --name "$NAME" --stopped-code "$STOPPED" \
    --devices.platform "$PLATFORM" --devices.coordinator "${hosts[0]}:$PORT" "${options[@]}" &
  run=$!
  wait "$run"
  code=$?
  while kill -0 "$run" 2>/dev/null; do  # a signal has ended the wait, not the run
    wait "$run"
    code=$?
  done
  if [[ $stopped ]] || ! ((code == 4 || code == 5 || code > 128)) || ((restart == RESTARTS)); then
    exit "$code"
  fi
  echo "exit code $code: begins again in $PAUSE s"
  sleep "$PAUSE"
done
