#!/usr/bin/perl
# Clients of a web server, each with a connection that it keeps: perl clients.pl ADDRESS:PORT PATH CLIENTS RATE SECONDS
#
# Together they ask for PATH so many times a second, by a schedule, whatever becomes of what was asked before: a client whose answer is late asks
# next as soon as it has it, and its time counts from when it should have asked. '{n}' in PATH is the request's number; of @FILE each line is asked
# for in turn. When all are connected, and at the end, a line says
#
#     CLIENTS clients are connected
#     ASKED requests: IN TIME of them answered in SECONDS s, all in ALL s (RATE/s); half within MEDIAN ms, 95 % within MOST ms
#
# What is not answered 60 s after the end, or by anything but 200, is an error.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;

@ARGV == 5 or die "usage: perl clients.pl ADDRESS:PORT PATH CLIENTS RATE SECONDS\n";
my ($server, $path, $clients, $rate, $seconds) = @ARGV;
my @paths = ($path);
if ($path =~ /^@(.*)/) {
    open my $file, '<', $1 or die "$1: $!\n";
    chomp(@paths = <$file>);
    @paths or die "$1 is empty\n";
}
my $PATIENCE = 60;
my $MONOTONIC = 1;

# perl-base has no Time::HiRes: clock_gettime(2) of x86-64.
sub now {
    my $time = pack 'q2', 0, 0;
    syscall(228, $MONOTONIC, $time) == 0 or die "clock_gettime: $!\n";
    my ($whole, $nanoseconds) = unpack 'q2', $time;
    return $whole + $nanoseconds / 1e9;
}

my (%client, @times);
my $select = IO::Select->new;
for (1 .. $clients) {
    my $socket = IO::Socket::INET->new(PeerAddr => $server, Timeout => $PATIENCE) or die "$server: $@\n";
    $socket->autoflush;
    # What is due and not asked yet; when what is asked was due; what has come of the answer.
    $client{$socket} = { socket => $socket, waiting => [], due => undef, got => '' };
    $select->add($socket);
}
my @all = values %client;
my $sent = 0;

sub ask {
    my ($client) = @_;
    return if defined $client->{due} or !@{ $client->{waiting} };
    $client->{due} = shift @{ $client->{waiting} };
    (my $wanted = $paths[$sent % @paths]) =~ s/\{n\}/$sent/g;
    $sent++;
    my $request = "GET $wanted HTTP/1.1\r\nHost: $server\r\nAccept-Encoding: gzip\r\nConnection: keep-alive\r\n\r\n";
    syswrite($client->{socket}, $request) == length $request or die "cannot send: $!\n";
}

sub heard {
    my ($client) = @_;
    my $count = sysread $client->{socket}, $client->{got}, 65536, length $client->{got};
    die "the connection ended\n" unless $count;
    my ($head) = $client->{got} =~ /\A(.*?\r\n\r\n)/s or return;
    $head =~ m{\AHTTP/1\.1 200 } or die "the answer is $head\n";
    if (my ($length) = $head =~ /^Content-Length: (\d+)/mi) {
        return if length $client->{got} < length($head) + $length;
    } elsif ($head =~ /^Transfer-Encoding: chunked/mi) {
        return if $client->{got} !~ /\r\n0\r\n\r\n\z/;
    } else {
        die "how long is the answer: $head\n";
    }
    push @times, [$client->{due}, now];
    @$client{qw(due got)} = (undef, '');
    ask($client);
}

$| = 1;
print "$clients clients are connected\n";
my $begun = now;
my ($due, $end) = (0, int $rate * $seconds);
while (@times < $end) {
    my $time = now;
    while ($due < $end and $begun + $due / $rate <= $time) {
        my $client = $all[$due % @all];
        push @{ $client->{waiting} }, $begun + $due++ / $rate;
        ask($client);
    }
    die "no answer for $PATIENCE s: " . ($end - @times) . " requests are lost\n" if $time > $begun + $seconds + $PATIENCE;
    my $wait = $due < $end ? $begun + $due / $rate - $time : 1;
    heard($client{$_}) for $select->can_read($wait > 0 ? $wait : 0);
}
my $in_time = grep { $_->[1] <= $begun + $seconds } @times;
my @took = sort { $a <=> $b } map { 1000 * ($_->[1] - $_->[0]) } @times;
my $all = $times[-1][1] - $begun;
printf "%d requests: %d of them answered in %g s, all in %.1f s (%.1f/s); half within %.0f ms, 95 %% within %.0f ms\n",
    $end, $in_time, $seconds, $all, $end / $all, $took[@took / 2], $took[0.95 * @took];
