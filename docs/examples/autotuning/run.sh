#!/bin/sh
# Looks for settings of nginx and of the kernel under which a VM serves its pages with the least processor time: one parameter after the other, each
# value in a fork of its own, all at the same time. With PUSH=yes what was found best is then given to the VM itself, which must have been started
# with --allow-programs. All that is written goes into the current folder.
set -eu
: "${CIVIC:=civic}"                       # the command, with --run-dir if the VM is in another
: "${VM:=web}"                            # the VM
: "${STORE:=services.img,overlay}"        # what services.sh has built
: "${FOUND:=gzip=9 wmem=4608}"            # what the VM has now
: "${REQUESTS:=24}"                       # of the VM's log, how many are made again in each fork
: "${PUSH:=no}"
here=$(dirname "$0")

best=$FOUND
search() {
    echo "== $1: $(($# - 1)) forks with $2 to $(eval echo "\${$#}")"
    $CIVIC inspect "$VM" --store "$STORE" --count $(($# - 1)) -- tune '{n}' "$REQUESTS" "$best" "$@" > "forks-$1"
    sed 's/^[0-9]*: //' "forks-$1" | sort -n > "by-$1"
    awk '{ printf "%8.2f ms of processor time a request, %6.1f requests/s with %s %s\n", $1, $2, $3, $4 }' "by-$1"
    best=$(sed -n '1s/^[^ ]* [^ ]* //p' "by-$1")
}
search gzip 9 5 1
search wmem 4608 65536 4194304
echo "== best: $best"
echo "$best" > best

if [ "$PUSH" = yes ]; then
    # shellcheck disable=SC2086  # they are words
    $CIVIC exec "$VM" -- /bin/sh -s -- $best < "$here/apply"
    echo "== the VM has it now"
fi
