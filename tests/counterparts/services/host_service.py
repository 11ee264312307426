"""A host service: JSON messages with fds over the SEQPACKET connection that --service-fd names.

    {"type": "method", "data": {"name": "count", "args": {...}, "fds": [0, 1]}}
 -> {"type": "reply", "data": {"reply": {...}, "fds": [0]}}

`count` reads each fd it is sent and answers with a memfd that holds the number of bytes of each; any other name is
answered with an exception. It ignores TERM and INT: it ends when the other side closes the connection.
"""

import argparse
import json
import os
import signal
import socket
import stat
import sys
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--service-id", required=True)
parser.add_argument("--service-fd", type=int, required=True)
arguments = parser.parse_args()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)


def reply(kind: str, data: dict[str, Any], fds: list[int]) -> None:
    message = json.dumps({"type": kind, "data": data}).encode()
    socket.send_fds(connection, [message], fds)


with socket.socket(fileno=arguments.service_fd) as connection:
    assert connection.type == socket.SOCK_SEQPACKET, connection
    assert stat.S_ISCHR(os.fstat(0).st_mode), "standard input is not /dev/null"
    print(f"host service {arguments.service_id} on fd {arguments.service_fd}", file=sys.stderr, flush=True)
    while True:
        packet, fds, _, _ = socket.recv_fds(connection, 65536, 16)
        if not packet:
            break
        call = json.loads(packet)["data"]
        if call["name"] != "count":
            reply("exception", {"name": "KeyError", "value": call["name"]}, [])
            continue
        sizes = []
        for fd in fds:
            with open(fd, "rb") as file:
                sizes.append(len(file.read()))
        answer = os.memfd_create("answer")
        os.write(answer, json.dumps(sizes).encode())
        os.lseek(answer, 0, os.SEEK_SET)
        reply("reply", {"reply": {"service": arguments.service_id, **call["args"]}, "fds": [0]}, [answer])
        os.close(answer)
print("host service ends", file=sys.stderr, flush=True)
