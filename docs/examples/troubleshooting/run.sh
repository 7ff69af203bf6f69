#!/bin/sh
# Finds a leak of a web application with strace and gdb, in a fork that gets copies of its requests; then measures what the same would have cost in the VM
# itself, which must have been started with --allow-programs for that. All that is written goes into the current folder.
set -eu
: "${CIVIC:=civic}"                       # the command, with --run-dir if the VM is in another
: "${VM:=web}"                            # the VM
: "${STORE:=services.img,overlay}"        # what services.sh has built
: "${SERVER:=10.0.0.2:80}"                # where the VM serves
: "${CLIENTS:=120}" "${RATE:=6}" "${SECONDS_EACH:=25}"    # connections, requests a second, and for how long
: "${WORKER:=shop.py}"                    # what the worker's command line has in it
: "${TRACED:=8}"                          # how many requests are traced
: "${THERE:=find-leak}"                   # find-leak in the VM itself; may be several words
here=$(dirname "$0")

# Starts clients; what they have seen will be the last line of clients-$1. A fork hears only what comes on connections that there are.
load() {
    perl "$here/clients.pl" "$SERVER" "/?visitor=$1-{n}" "$CLIENTS" "$RATE" "$SECONDS_EACH" > "clients-$1" &
    clients=$!
    until grep -q connected "clients-$1"; do
        kill -0 $clients || exit 1
        sleep 0.1
    done
}

worker=$($CIVIC inspect "$VM" --store "$STORE" -- pgrep -f "$WORKER")
echo "the worker is process $worker"

load nobody
wait $clients

load fork
$CIVIC inspect "$VM" --store "$STORE" --source-net mirror --timeout 100 -- find-leak "$worker" "$TRACED" > found
wait $clients
cat found

load source
# shellcheck disable=SC2086  # they are words
$CIVIC exec "$VM" -- $THERE "$worker" "$TRACED" > found-in-source
wait $clients

for looked in nobody fork source; do
    printf '%-18s %s\n' "looked in: $looked" "$(tail -n 1 clients-$looked)"
done | tee rates
