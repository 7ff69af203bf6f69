#!/bin/sh
# Builds the store of agents: sh store.sh OUT.img [OPTIONS of 'civic store build'], as root.
set -eu
here=$(dirname "$0")
out=$1
shift
exec ${CIVIC:-civic} store build "$out" "$@" --package collectd-core --package snmpd --package snmp \
    --file "$here/collectd.conf:/etc/collectd/collectd.conf" --file "$here/snmpd.conf:/etc/snmp/look.conf" \
    --file "$here/collect:/usr/local/bin/collect"
