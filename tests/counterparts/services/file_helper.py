"""One JSON request on standard input, one JSON answer: the privileged helper behind a group-only UNIX socket."""

import json
import os
import sys

request = json.loads(sys.stdin.readline())
answer = {
    "sum": sum(request["numbers"]),
    "uid": os.geteuid(),
    "client": [os.environ.get("IPCREMOTEEUID"), os.environ.get("IPCREMOTEEGID")],
}
print(json.dumps(answer), flush=True)
