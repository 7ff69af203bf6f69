# What agents saw in forks beside what was true in their source at the same moments: awk -v over=LOOKS -f compare.awk truth seen
#
# 'truth' is of load.pl, 'seen' of collect. For each look but an agent's first LOOKS a line is printed:
#
#     AGENT SECONDS CPU-SEEN CPU-TRUE MEMORY-SEEN MEMORY-TRUE
#
# percent of a processor over as many looks, and MiB, of the service. collectd is asked for the memory of the control group, snmpd for
# what is resident of the process.
FILENAME == ARGV[1] {
    at[++lines] = $1; used[lines] = $2; memory["collectd", lines] = $4 / 1024; memory["snmpd", lines] = $5 / 1024
    next
}

# Of what was recorded, the value at this moment.
function true_at(moment,    low, high, middle) {
    if (moment < at[1] || moment > at[lines]) {
        printf "nothing was recorded at %s s\n", moment > "/dev/stderr"
        failed = 1
        exit 1
    }
    low = 1; high = lines
    while (high - low > 1) {
        middle = int((low + high) / 2)
        if (at[middle] <= moment) low = middle; else high = middle
    }
    share = (moment - at[low]) / (at[high] - at[low])
    cpu = used[low] + (used[high] - used[low]) * share
    kept = memory[agent, low] + (memory[agent, high] - memory[agent, low]) * share
}

{
    agent = $1
    true_at($2)
    now = ++looks[agent]
    then = now - over
    if (then > 0) {
        passed = $2 - moment[agent, then]
        printf "%-8s %8.2f %7.2f %7.2f %8.2f %8.2f\n", agent, $2, 100 * ($3 - seen[agent, then]) / passed,
            100 * (cpu - truth[agent, then]) / passed, $4 / 1024, kept
    }
    moment[agent, now] = $2; seen[agent, now] = $3; truth[agent, now] = cpu
}

END { if (failed) exit 1 }
