"""datagram_log.py FD COUNT: reads COUNT datagrams with recvfrom, logs each with a syslog level prefix, exits.

The text before the first blank is the level; the sender, when it has a name, gets the length as an answer.
"""

import socket
import sys

sock = socket.socket(fileno=int(sys.argv[1]))
assert sock.family == socket.AF_UNIX and sock.type == socket.SOCK_DGRAM, sock
for _ in range(int(sys.argv[2])):
    data, sender = sock.recvfrom(65536)
    level, _, text = data.decode().partition(" ")
    print(f"<{level}>{text}", file=sys.stderr, flush=True)
    if sender:
        sock.sendto(str(len(data)).encode(), sender)
