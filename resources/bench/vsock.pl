# A guest's end of the vsock bench: takes connections on a port, one after the other. The first byte says what to do:
# 's' sends for ever, 'r' reads to the end; 'S' and 'R' do so for a program behind a pipe, as one has that is started from outside. Perl, since Debian has it always and it adds nothing to what is measured.
use strict;
use warnings;
use Socket;

my ($AF_VSOCK, $ANY) = (40, 0xffffffff);
my $port = shift;
$SIG{PIPE} = 'IGNORE';
# struct sockaddr_vm (linux/vm_sockets.h): family, reserved, port, cid, zeroes.
my $address = pack('S S L L x4', $AF_VSOCK, 0, $port, $ANY);
socket(my $listener, $AF_VSOCK, SOCK_STREAM, 0) or die "socket: $!";
bind($listener, $address) or die "bind: $!";
listen($listener, 1) or die "listen: $!";
# Whoever started us goes on when we listen.
exit 0 if fork;
my $block = 'x' x (256 << 10);
while (accept(my $stream, $listener)) {
    next unless sysread($stream, my $what, 1);
    if ($what eq 's') {
        while (syswrite($stream, $block)) { }
    } elsif ($what eq 'S') {
        open(my $program, '-|', 'exec dd if=/dev/zero bs=64k 2> /dev/null') or die "dd: $!";
        while (sysread($program, my $data, length $block)) { syswrite($stream, $data) or last; }
        # It ends when it writes what nobody reads.
        close $program;
    } elsif ($what eq 'R') {
        open(my $program, '|-', 'exec cat > /dev/null') or die "cat: $!";
        while (sysread($stream, my $data, length $block)) { syswrite($program, $data); }
        close $program;
    } else {
        while (sysread($stream, my $data, length $block)) { }
    }
    close $stream;
}
