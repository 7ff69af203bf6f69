#!/usr/bin/perl
# The service that is watched: its use of the processor and of memory follows a sine, a quarter of a period apart, and it keeps a record of what
# the truth is. It runs as the service 'load' of systemd.
#
#     perl load.pl PERIOD RECORD     for ever; PERIOD in seconds, RECORD is a file, a line for each quarter of a second
#
# A line: seconds by the clock of the kernel's scheduler; processor seconds that this program has used; bytes that it holds on purpose; KiB that its control group has, and
# that it has in memory, by its kernel.
#
# Start it with MALLOC_MMAP_THRESHOLD_=131072 in its environment: what it frees then goes back to the kernel at once.
use strict;
use IO::Handle;
use warnings;

my ($period, $record) = @ARGV;
my $TICK = 0.25;
my $CHUNK = 512 << 10;
my ($MONOTONIC, $OWN_TIME) = (1, 2);    # clockid_t, linux/time.h
my $TWO_PI = 8 * atan2 1, 1;

# perl-base has no Time::HiRes: clock_gettime(2) of x86-64.
sub clock {
    my $time = pack 'q2', 0, 0;
    syscall(228, $_[0], $time) == 0 or die "clock_gettime: $!";
    my ($seconds, $nanoseconds) = unpack 'q2', $time;
    return $seconds + $nanoseconds / 1e9;
}

sub first_line {
    open my $file, '<', $_[0] or die "$_[0]: $!";
    return scalar <$file>;
}

# The scheduler's clock is what the kernel says of a process that stands still; it is not quite the one that programs can ask for.
sub scheduled {
    open my $file, '<', '/proc/self/sched' or die "/proc/self/sched: $!";
    my ($at) = join('', <$file>) =~ /^se\.exec_start\s*:\s*([\d.]+)/m or die "/proc/self/sched has no se.exec_start";
    return $at / 1000;
}

# No huge pages: the kernel would keep a whole one while a part of it is held. prctl(PR_SET_THP_DISABLE) of x86-64.
syscall(157, 41, 1, 0, 0, 0) == 0 or die "prctl: $!";
open my $zero, '<', '/dev/zero' or die "/dev/zero: $!";
open my $log, '>', $record or die "$record: $!";
$log->autoflush;
my @held;
my $begun = clock $MONOTONIC;
# The difference is largest where the process ran on for the shortest time after its kernel had looked at the clock.
my $ahead = -1e9;
for (1 .. 20) {
    my $difference = scheduled() - clock $MONOTONIC;
    $ahead = $difference if $difference > $ahead;
}
for (my $due = 0;; $due += $TICK) {
    my $time = clock($MONOTONIC) - $begun;
    my $angle = $TWO_PI * $time / $period;

    my $wanted = int 24 + 14 * cos $angle;
    pop @held while @held > $wanted;
    while (@held < $wanted) {
        # The kernel writes to each page of it.
        push @held, '';
        sysread($zero, $held[-1], $CHUNK) == $CHUNK or die "/dev/zero: $!";
    }

    # What has to be used by now: the integral of 0.25 + 0.15 sin. Who was held up catches up.
    my $enough = 0.25 * $time + 0.15 * $period / $TWO_PI * (1 - cos $angle);
    1 while clock($OWN_TIME) < $enough and clock($MONOTONIC) - $begun < $due + $TICK;
    my $group = first_line('/sys/fs/cgroup/system.slice/load.service/memory.current') / 1024;
    my $resident = 4 * (split ' ', first_line('/proc/self/statm'))[1];
    printf $log "%.3f %.4f %d %d %d\n", clock($MONOTONIC) + $ahead, clock($OWN_TIME), @held * $CHUNK, $group, $resident;
    my $rest = $begun + $due + $TICK - clock $MONOTONIC;
    select undef, undef, undef, $rest if $rest > 0;
}
