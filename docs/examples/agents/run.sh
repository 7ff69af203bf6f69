#!/bin/sh
# Has stock agents look into frozen forks of a VM every few seconds, and compares what they saw with what was true in the VM.
# All that is written goes into the current folder.
set -eu
: "${CIVIC:=civic}"                       # the command, with --run-dir if the VM is in another
: "${VM:=web}"                            # the VM
: "${STORE:=agents.img}"                  # what store.sh has built
: "${TRUTH:=http://10.0.0.2/truth}"       # where the VM serves what load.pl has recorded
: "${AGENTS:=collectd snmpd}"            # who looks
: "${EVERY:=10s}" "${ROUNDS:=16}"         # when
: "${OVER:=4}"                            # over how many rounds the use of the processor is taken
here=$(dirname "$0")

$CIVIC inspect "$VM" --store "$STORE" --freeze --every "$EVERY" --rounds "$ROUNDS" -- collect $AGENTS > seen
curl -fsS "$TRUTH" -o truth
awk -v over="$OVER" -f "$here/compare.awk" truth seen > curve
cat curve
