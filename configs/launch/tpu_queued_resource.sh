#!/bin/bash
# Cloud TPU queued resources: slices of TPU VMs asked for, made ready, trained on and given back.
#
#     export PROJECT=... ZONE=... QUEUED=night CONFIG=configs/pod_sleep_codes.py
#     configs/launch/tpu_queued_resource.sh create     asks for the slices and waits until they are there
#     configs/launch/tpu_queued_resource.sh install    the zoo, on every host
#     configs/launch/tpu_queued_resource.sh train      starts the run on every host; again: goes on where it was
#     configs/launch/tpu_queued_resource.sh log        what process 0 says
#     configs/launch/tpu_queued_resource.sh stop       has every process save its last step and end
#     configs/launch/tpu_queued_resource.sh delete     gives the slices back
#
# After a preemption: delete, create, install, train. On a host, a run that lost a process (exit code 4) or hung (5)
# begins again from its newest checkpoint by itself.
set -euo pipefail

PROJECT=${PROJECT:?}
ZONE=${ZONE:?}
QUEUED=${QUEUED:-zoo}                    # what the queued resource is called; its slices are QUEUED-0, QUEUED-1, …
ACCELERATOR=${ACCELERATOR:-v5p-512}      # of one slice
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}       # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e
SLICES=${SLICES:-1}
SPOT=${SPOT:-}                           # anything: capacity that may be taken away
PACKAGE=${PACKAGE:-brain-zoo[aot]}       # what pip installs; [aot] brings libtpu
CONFIG=${CONFIG:-configs/quickstart.py}  # on the hosts, as every path below
NAME=${NAME:-$QUEUED}                    # of the run
RUNS=${RUNS:-/mnt/shared/runs}           # a folder that all hosts share: Filestore, or a bucket by gcsfuse
OPTIONS=${OPTIONS:-}                     # more options of `zoo train`, with spaces between
RESTARTS=${RESTARTS:-50}
POLL=${POLL:-60}                         # seconds

WHERE=(--project "$PROJECT" --zone "$ZONE")

on_hosts() {
  gcloud compute tpus queued-resources ssh "$QUEUED" "${WHERE[@]}" --node=all --worker=all --command="$1"
}

create() {
  local slices=(--node-count "$SLICES" --node-prefix "$QUEUED")
  ((SLICES == 1)) && slices=(--node-id "$QUEUED-0")
  gcloud compute tpus queued-resources create "$QUEUED" "${WHERE[@]}" "${slices[@]}" \
    --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" ${SPOT:+--spot}
  local state=
  while [[ $state != ACTIVE ]]; do
    sleep "$POLL"
    state=$(gcloud compute tpus queued-resources describe "$QUEUED" "${WHERE[@]}" --format='value(state.state)')
    echo "$QUEUED: $state"
    if [[ $state == FAILED || $state == SUSPENDED ]]; then
      exit 1
    fi
  done
}

# The loop on every host: all processes of a run end with one exit code, so all begin again, and wait for one another.
training() {
  cat <<EOF
n=0
while true; do
  zoo train $CONFIG --runs $RUNS --name $NAME --mesh.slice $SLICES --devices.platform tpu \
    --devices.coordinator auto --devices.start-seconds 900 --stopped-code 75 $OPTIONS
  code=\$?
  echo "exit code \$code"
  n=\$((n + 1))
  if [ \$n -gt $RESTARTS ] || { [ \$code -ne 4 ] && [ \$code -ne 5 ]; }; then
    exit \$code
  fi
done
EOF
}

case ${1:-} in
  create) create ;;
  install) on_hosts "pip install --upgrade '$PACKAGE'" ;;
  train) on_hosts "nohup bash -c $(printf '%q' "$(training)") >>zoo.log 2>&1 </dev/null &" ;;
  log)
    gcloud compute tpus tpu-vm ssh "$QUEUED-0" "${WHERE[@]}" --worker=0 --command="tail -n 100 -F zoo.log"
    ;;
  stop) on_hosts "pkill -TERM -x zoo" ;;
  delete) gcloud compute tpus queued-resources delete "$QUEUED" "${WHERE[@]}" --force --quiet ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
