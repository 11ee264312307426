"""What words in superd's output mean: states, codes of problems, exit statuses. For `superctl explain` alone."""

from __future__ import annotations

STATES: dict[str, str] = {
    "disabled":
        "The file says `enabled = false`: it was read and checked, and it is not run. `superctl start NAME` runs it "
        "nevertheless, `superctl enable NAME` for good.",
    "stopped": "Somebody stopped it. Its sockets stay open, so clients wait. `superctl start NAME` goes on.",
    "listening": "It waits for traffic; superd listens for it, and no process of it runs, or one for each connection.",
    "idle": "No process of it runs at the moment; `superctl wait --for idle NAME` waits for that.",
    "starting":
        "Its process runs and has not said that it is ready, in the way that `ready` names. After `ready_timeout` it "
        "is stopped, as a failure. `superctl logs NAME` shows what it writes.",
    "ready": "It runs, and is ready as its key `ready` has it.",
    "stopping": "It was told to stop. After `stop_timeout` it is killed.",
    "backoff":
        "It ended or could not be started, or an address is taken. It is tried again after a delay that grows from "
        "`restart_delay` to `restart_delay_max`. The note in `superctl list` and `superctl status NAME` say why.",
    "done": "It ended by itself, and that was all that it had to do.",
    "failed":
        "It is not tried again: `restart` does not ask for it, or `restart_limit` was reached. Its sockets stay open. "
        "`superctl status NAME` shows how it ended; `superctl start NAME` tries again.",
    "bad config": "Its file has errors, so it does not run; the other services do. `superctl check` shows them all.",
    "paused":
        "Marks a listener that superd does not accept from for now; clients wait in the kernel's queue. `superctl "
        "resume NAME` goes on.",
}  # fmt: skip

PROBLEMS: dict[str, str] = {
    "address-taken":
        "Two sockets want the same address, of one service or of two. An address without a host is every address, so "
        "tcp:80 and tcp:127.0.0.1:80 exclude each other. The file that comes first by name keeps it. `superctl explain "
        "PORT` says who has a port.",
    "bad-name":
        "The name of the file is no name of a service: NAME.toml, NAME of a-z 0-9 _ . -, beginning with a letter or "
        "digit, at most 63 characters; NAME@.toml is a template.",
    "bad-type": "The value is of another type than the key takes, a number instead of a string for example.",
    "bad-value": "The value is of the right type, and none that the key takes. `superctl explain KEY` says which.",
    "both-enabled":
        "Two enabled services conflict, and never run together. At start-up the first in the order of files runs; "
        "starting the other stops it.",
    "dependency-cycle":
        "`requires` and `after` lead from a service back to itself, so none of them could come first. The message "
        "names the whole circle; one of its links has to go.",
    "duplicate-key": "TOML allows a key once in a table, and a [table] once in a file.",
    "duplicate-name": "Two files have the same name of a service, or names that differ in case only. The first counts.",
    "empty": "A file without a key is no service: it was created and not filled, or cut off.",
    "encoding": "TOML is UTF-8 without a byte order mark, with line ends of LF or CRLF and without NUL.",
    "limit": "Files of more than 1 MiB, 16 levels of nesting or 1000 keys are refused before they are parsed.",
    "listen-and-socket": "`listen` is short for [[socket]] tables with nothing but an address. One or the other.",
    "misplaced-key":
        "The key exists, and belongs to another table. In TOML what follows a [table] belongs to it, so keys of the "
        "service stand above the first one.",
    "missing-key":
        "A key that must be there is not: `command`, the `listen` of a [[socket]], the `instances` of a template.",
    "missing-program":
        "The program, or the interpreter in its first line, is not there. Without a slash it is looked for in the PATH "
        "that services get, then in superd's own. With `enabled = false` it need not exist.",
    "missing-run":
        "Stream and datagram sockets, or a FIFO, together: what `run` should be cannot be told from them.",
    "no-connections":
        "A datagram socket or FIFO has no connections that could get a process each. What the process has not read yet "
        'would start one after the other. `run = "on-demand"` starts one for all of them.',
    "no-defaults":
        "superd.toml, or its [defaults], cannot be read. They may have said who services run as, so none is started "
        "without them.",
    "no-such-service":
        "`requires`, `after`, `part_of` or the like names a service that no file describes. An instance of a template "
        "is named NAME@INSTANCE. With `requires` and `part_of` that is an error; `wants`, `after` and `conflicts` "
        "matter as soon as there is such a service.",
    "not-available":
        "This machine cannot do what the key asks for, such as a limit of a control group without its controller. The "
        "service does not start without it.",
    "not-executable":
        "The program is a directory, has no execute permission, or begins in a way that the kernel cannot start.",
    "not-permitted": "Only root can become another user, or give a socket to one, and this superd is not root.",
    "not-trusted":
        "superd is root, and somebody else could change the file, the program, or a directory above it: it belongs to "
        "another user, or is writable by its group or by all.",
    "one-socket": '`pass = "stdio"` has room for one socket, on fd 0 and 1. "localhost" is two.',
    "other-mode":
        "The key exists, and means nothing for this service: for its `run`, its `pass`, or this kind of socket.",
    "relative-program": "A relative path of a program would depend on the working directory. Write the whole path.",
    "requires-broken": "A service that this one requires has errors, so it does not run, and this one waits for it.",
    "requires-disabled":
        "A service that this one requires says `enabled = false`: this one could never start. Enable it, or "
        "disable this one too.",
    "requires-rival": "A service cannot require another one and conflict with it.",
    "reserved-variable": "superd sets these variables itself where they apply, and services believe them.",
    "syntax": "The file is no TOML from this place on.",
    "unknown-group": "There is no such group on this machine. Nothing falls back to another one.",
    "unknown-key":
        "There is no such key. It is an error, because a limit or user that is misspelt and passed over would be "
        "worse. `superctl explain --list` shows all keys.",
    "unknown-user": "There is no such user on this machine. Nothing falls back to another one.",
    "unreadable": "The file or directory cannot be read, or is no regular file.",
}  # fmt: skip

EXIT_STATUSES: dict[int, str] = {
    0: "Done, or yes.",
    1: "It did not work, or there are differences.",
    2: "Wrong usage: an option or argument that does not exist, or is missing.",
    3: "Not running, or no.",
    4: "There is no such service.",
    69: "superd cannot be reached: it does not run, or its control socket is another one (-s, SUPERD_SOCKET).",
    71: "superd --strict: an address cannot be bound.",
    75: "The time limit of --timeout has passed.",
    77: "Not permitted.",
    78: "The configuration has errors.",
}  # fmt: skip
