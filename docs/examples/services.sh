#!/bin/sh
# Builds the disk that has the service of an example, for the VM, and the tools that look at them, for its forks:
# sh services.sh OUT.img [OPTIONS of 'civic store build'], as root.
set -eu
here=$(dirname "$0")
out=$1
shift
exec ${CIVIC:-civic} store build "$out" "$@" --package python3 --package procps --package strace --package gdb \
    --file "$here/troubleshooting/find-leak:/usr/local/bin/find-leak" \
    --file "$here/autotuning/apply:/usr/local/bin/apply" --file "$here/autotuning/tune:/usr/local/bin/tune" \
    --file "$here/clients.pl:/usr/local/bin/clients.pl"
