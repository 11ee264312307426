"""What the manual says about each key, and what the values of each kind look like, for people.

superd.toml(5) and `superctl explain` are made from this; no role of the daemon imports it. Markup: `literals` in
backquotes, "values" in double quotes, pages(5) as they are; everything else is plain text. A line end ends a paragraph,
and `* "value": text` in a line of its own is an item of a list.
"""

from __future__ import annotations

from superd.core.keys import Key

# Table -> heading in superd.toml(5), and what stands below it before the keys.
HEADINGS: dict[str, tuple[str, str]] = {
    "service": ("Service keys", ""),
    "socket": (
        "The [[socket]] tables",
        "One table for each socket, for what `listen` alone cannot say. A key that means nothing to a kind of socket "
        "is an error there.",
    ),
    "tls": (
        "The [socket.tls] table",
        "superd's manager does the handshake, starts the process when it is done, and carries the bytes between both. "
        "The process's connection is one end of a pair of UNIX sockets: getpeername(2) tells nothing, and SO_PEERCRED "
        "superd itself. Its variables tell the client as ever, and besides `SSL_PROTOCOL` (TLSv1.3), `SSL_CIPHER`, "
        "and where there is one `SSL_TLS_SNI_SERVERNAME`, `SSL_ALPN_PROTOCOL`, and of a client's certificate "
        "`SSL_PEER_CERT_HASH` (SHA256: and 64 hexadecimal digits) and `SSL_PEER_CERT_SUBJECT` (/C=DE/CN=alice; a byte "
        "that is not printable, a / and a backslash in a value are written as \\xNN, and of more than 1500 "
        "bytes there is none).\n"
        "PROXY headers come first, in clear; then `[access]` and the limits per source, then the handshake. Until it "
        "is done a client counts for its source alone, and 1024 clients of a service are held at once. "
        "`first_byte_timeout` is that of the handshake's first byte. Whoever is refused is closed without a word, so "
        "`refuse_message` is an error.\n"
        "An end that the client announces (close_notify) is the end of what the process reads, and it can go on "
        "writing. When the process ends what it writes, the client is told so, in the same way. A connection that the "
        "client ends without that, or that breaks, is closed as a whole: what came before it may have been cut, by "
        "anybody on the way, so a process that must know waits for its protocol's own end. The log has it at level "
        "debug. What a process leaves when it has ended reaches the client, unless that takes nothing for a minute.\n"
        "The files are read by superd, not by the service: a key that only root can read is one that the service "
        "cannot. As root, superd uses only files that nobody but root can change, and no key that everybody can read. "
        "At most once a second, when a client comes, it looks whether they are others than before, and the next "
        "clients get the new ones. If those cannot be used, the log says why, once, and the old ones go on; if there "
        "are none, clients are refused, and `superctl status` tells why.\n"
        "Handshakes are calculated by one process for all services, the manager. Connections with TLS end when it is "
        "killed or superd is upgraded, as with `[proxy]`; their processes see the end.",
    ),
    "limits": (
        "The [limits] table",
        "A limit slows or refuses, and heals by itself. None closes a listener or needs anybody. They are for "
        "per-connection services and those with [proxy]; `rate`, `max_load` and `min_memory` are for on-demand ones "
        "too, `max_runtime` is for all.",
    ),
    "access": (
        "The [access] table",
        "Who may connect to a per-connection service or one with [proxy], and whose datagrams may start an on-demand "
        "one. Who may not is accepted and closed, or read and dropped, and costs no process. A program that gets the "
        "sockets themselves lets in whom it likes, so `access` is an error there.",
    ),
    "rlimit": (
        "The [rlimit] table",
        'setrlimit(2): a value, which is the soft and the hard limit, or a list of both. A value is a number, a size '
        'where the limit is one, or "off".',
    ),
    "scheduling": ("The [scheduling] table", ""),
    "cgroup": (
        "The [cgroup] table",
        "What all processes of a service may have together, descendants and daemons among them: limits of a control "
        "group, cgroups(7) version 2. For a per-connection service the connections share them, with the processes of "
        "superd's own that start the connections: one to four for a service. What a limit needs and does not find, a "
        "controller or a file that can be written, keeps the service from starting, and is named; superd(8) tells how "
        "superd comes by both. A reload writes changed limits to the groups of running services; processes that come "
        "into a group only then keep what memory they have out of it.",
    ),
    "sandbox": (
        "The [sandbox] table",
        "What the service cannot do. All of this is entered once by the process that starts the service's processes, "
        "and costs nothing for a connection. It needs root; what cannot be had keeps the service from starting.",
    ),
    "health": (
        "The [health] table",
        "Checks of a service that is started once, while it is ready.",
    ),
    "proxy": (
        "The [proxy] table",
        "For a program that can only listen by itself. superd accepts, starts it at the first connection, holds the "
        'client until it is ready, then carries the bytes. `run` is "on-demand", or "always-on" if that is written; '
        "the process gets no sockets. Limits and access rules are those of per-connection services, and count clients. "
        "With `idle_timeout` the program is stopped when no client has been connected for so long.",
    ),
    "superd": ("Daemon keys", "These stand in `superd.toml`."),
}  # fmt: skip

# Table -> rows in the order of the manual: keys that share a text, and the text.
TEXTS: dict[str, tuple[tuple[str, str], ...]] = {
    "service": (
        ("description", "One line for people."),
        ("enabled",
         "false: read and checked, not run, except by `superctl start`. Its program need not exist. `superctl "
         "enable` and `superctl disable` change it by a drop-in."),
        ("instances", "Only in a template: its instances."),
        ("listen", "An address, or a list of addresses. Not together with `[[socket]]`."),
        ("command",
         "The program and its arguments. A program without a slash is looked for when the file is read, in the "
         "`PATH` that services get, then in superd's own; a relative path is refused."),
        ("argv0", "The name that the program is given as argv[0]. The default is the program as written."),
        ("handler",
         'Instead of `command` a Python function or class, "package.module:function", for per-connection services. '
         "The module is imported once, as the service's user, in its context and with its environment, with `cwd` "
         "first on `sys.path`; "
         "each connection is served by a forked child, which costs less than executing anything. The function gets "
         "one argument with `socket`, `input` and `output`, which are binary files, `remote_addr`, `remote_port`, "
         "`local_addr`, `local_port`, `id` and `service`. What it prints goes to the client, what it writes to "
         "`sys.stderr` to the log, an exception too, and then the exit status is 1. A class that derives from "
         "`socketserver.BaseRequestHandler`, as those of `http.server` do, is called as its own server would. "
         "Changed code is imported at `superctl restart`, or at the next connection after a file of it has "
         "changed, and the same code again when its environment has; connections that are there go on with the old, "
         "and all do if the new cannot be imported."),
        ("workers",
         "How many processes hold the module ready. More are made when they are busy, up to one for each "
         "processor."),
        ("builtin",
         'Instead of `command` a service inside superd, for stream and UDP sockets: "echo", "discard", "daytime", '
         '"time" or, for streams alone, "chargen". It is no process: it has listeners, limits and access like any '
         "service, and its connections end when the manager is killed. A datagram is not answered if it comes from "
         "a port below 1024 or the service's own or was sent to many, nor with more bytes than it has.\n"
         'With "tcpmux" (RFC 1078) a client sends the name of a service and a line end, within ten seconds and 256 '
         "bytes, and then has the connection of a service that listens on `tcpmux:NAME`, with that one's limits and "
         "access. `help` lists the names. A name that is not there, or is not running, is answered with a line that "
         "begins with `-`."),
        ("run",
         'When processes are started. "per-connection": superd accepts, and each connection gets a process of its '
         'own. "on-demand": the first traffic starts one process, which gets the sockets themselves; superd '
         'listens again when it has ended. "always-on": one process from the start, kept running; it gets the '
         'sockets, if there are any. "once": one process, to its end. The default is per-connection if all sockets '
         "are stream sockets, on-demand if all are datagram sockets, always-on if there are none. Where they are "
         "mixed the file must say."),
        ("pass",
         '"stdio": the connection, or the one socket, on fd 0 and 1; a FIFO on fd 0 alone. "listen-fds": fd 3 and up, '
         "with `LISTEN_FDS`. The default is stdio for per-connection, otherwise listen-fds."),
        ("fd_protocols",
         'With listen-fds, whose variables are set: "systemd", "upstart", "einhorn", "server-starter", "catflap".'),
        ("stdout stderr",
         'Where output goes that is not the connection: "log"; "socket", to the client, as inetd does; "null"; '
         "\"inherit\", where superd's own goes; \"file:/path\", appended."),
        ("user group groups",
         "Who runs it. The default is superd's own user, and nobody when superd is root: root must be asked for. "
         "`group` is the user's own unless it is given, `groups` are all of the user's."),
        ("cwd", "Its working directory."),
        ("umask", "Its umask."),
        ("environment",
         "A table of variables. Those that superd sets itself, such as `LISTEN_FDS`, are refused. When superd is "
         "root, paths in `LD_*` and `PYTHON*`, from which code is loaded, must be such that only root can change "
         "what is there."),
        ("environment_file", "A file of NAME=value lines, as for systemd; the table wins. It is read at each start."),
        ("pass_environment",
         "Names of variables of superd's own environment to pass on. `[\"*\"]` passes all but `LISTEN_*`, "
         "`NOTIFY_*`, `WATCHDOG_*`, `LD_*` and `PYTHON*`."),
        ("ready",
         "When a service that is started once counts as ready. Until then it is starting, and `superctl start` "
         "waits.\n"
         '* "start": As soon as its program is executed.\n'
         '* "notify": When it sends `READY=1`, see sd_notify(3).\n'
         '* "fd:N": When it writes a line end to its file descriptor N, a pipe, as s6 has it. N is 3 or more, and '
         "above those of its sockets.\n"
         '* "connect:ADDRESS": When a connection to a stream socket is accepted; a port alone is that of the '
         "loopback addresses.\n"
         '* "http://HOST:PORT/PATH": When a GET is answered with a status of 200 to 399.\n'
         '* "log:REGEX": When a line that goes to the log, of its stdout or stderr, matches anywhere in its first '
         "2048 characters; the syntax is that of Python's re module.\n"
         '* "exec:COMMAND": When a command, run as the service is but without its sockets, ends with status 0.\n'
         "The last ones are tried again after 100 ms, then after twice as long, up to a second. A connection or "
         "answer is waited for ten seconds; never two commands run at once."),
        ("ready_timeout",
         'How long that may take, with `start_pre` and `start_post`, or "off"; then it is stopped, as a failure. '
         "What superd ends because it takes too long counts as a timeout."),
        ("notify_access",
         'Whose messages to `NOTIFY_SOCKET` count: "none", "main", the main process, or "all", any process of the '
         'service. A shell script that calls systemd-notify(1) needs "all" unless it runs as root. There is a '
         'socket when this is written, or `ready` is "notify", or with `watchdog` or `fdstore`; see superd(8).'),
        ("watchdog",
         "Once it is ready the service sends `WATCHDOG=1` at least this often; it is told by `WATCHDOG_USEC`. "
         "Otherwise its main process gets `SIGABRT`, what is left after `stop_timeout` `SIGKILL`, and that is a "
         'failure of the kind "on-watchdog" for `restart`.'),
        ("fdstore",
         "How many file descriptors the service may store with `FDSTORE=1`, at most 4096. They are passed to its "
         'next process behind its sockets: `LISTEN_FDS` counts them, also with `pass = "stdio"`, where they begin '
         "at 3. A restart keeps them, whoever asks for it, and so does the death of any part of superd but its "
         "keeper; they are closed when the service has been stopped, is done, has failed or listens again."),
        ("restart",
         'When it is started again after it has ended: "no", "on-success", "on-failure", "on-abnormal", '
         '"on-abort", "on-watchdog", "always", as in systemd.service(5). The default is on-failure for always-on, '
         "otherwise no. An on-demand service that is not started again goes back to listening. Not for "
         "per-connection services."),
        ("restart_delay restart_delay_max",
         "The delay before that, and before an on-demand service that left its traffic where it was listens again. "
         "It doubles from the one to the other, and is forgotten after as long without an exit, or when traffic "
         "was taken."),
        ("restart_limit",
         "A rate of restarts; beyond it the service has failed, until `superctl start` or a change of its file. "
         "Its sockets stay open. What an operator asks for does not count."),
        ("success_status",
         "Exit statuses and names of signals that count as success. HUP, INT, TERM and PIPE do in any case."),
        ("essential",
         "When it has ended for good, with nothing left to try, superd stops everything and exits with its status: "
         "128 + N for signal N, 1 if it could not be started, and never 0 for a failure. `superctl stop` of it is "
         "an operator's wish and ends nothing else."),
        ("requires",
         "Names of services, instances of templates too, that are started first and waited for until they can be "
         'used: ready, or, if traffic starts them, listening, or, with `run = "once"` and no other `ready`, done. '
         "They are stopped after this one, and an order to stop or restart one of them is one for this service "
         "too, before it. While one of them cannot be used, nothing is started here and clients wait; a process "
         "that runs already goes on. That a required service is not there, or is disabled although this one is "
         "not, is an error."),
        ("wants",
         "Services that `superctl start` starts along with this one, unless they are disabled. It says nothing "
         "about order, and what becomes of them does not matter."),
        ("after",
         "Order alone: where both are being started, this one waits until the other is ready or has failed, and "
         "where both are being stopped, it goes first."),
        ("part_of", "Services whose stop and restart, by superctl(1), are this one's too."),
        ("conflicts",
         "Services that never run beside this one, whichever of the two says so. Starting one stops the other "
         "first. At start-up the first in the order of files runs.\n"
         "A name that is no service's is an error in `requires` and `part_of`. In the others it is a warning, and "
         "matters as soon as there is such a service. A cycle of `requires` and `after` is an error of all that are "
         "in it."),
        ("stop_signal stop_timeout",
         'How it is told to stop, and after how long KILL follows; "off": not before superd itself ends.'),
        ("kill_mode",
         'Who is told: "tree", every process of the service, daemons too, see superd(8); "group", its process '
         'group; "process", the process alone. The end of superd takes along what that leaves.'),
        ("reload_signal",
         "What `superctl reload-service` sends to the main process, or to the process of each connection."),
        ("idle_timeout",
         "Of an on-demand service: after so long, or half as long again, without an open connection or anything "
         "new on its sockets, it is stopped, and superd(8) listens in its place. However it ends then, that is no "
         "failure. A connection that came and went counts, a datagram and a write to a FIFO too, and each call of "
         "connect(2) or sendto(2) for the path of a UNIX socket; of abstract ones, and of those on a file system "
         "that is mounted noatime, only what is open or waits at the moment when superd(8) looks, which is twice "
         "in that time. Not for vsock and SCTP. With [proxy], superd(8) itself knows who is connected."),
        ("start_pre start_post stop_post",
         "Commands around the main one, each as `command` is written: before it is started, once it is ready, and "
         "after it has ended. They run one after the other, as the service's user and with its environment; see "
         "superd(8)."),
    ),
    "socket": (
        ("listen", "One address."),
        ("name", "Its name in `LISTEN_FDNAMES`. The default is the service's name."),
        ("backlog", "How many connections may wait, listen(2); the kernel has a limit of its own."),
        ("mode user group", "Of the file of a UNIX socket or FIFO."),
        ("directory_mode", "Of directories above it that do not exist; they are made."),
        ("remove_on_stop", "Whether the file goes when superd stops or the service is removed."),
        ("symlinks", "Further paths that point to it."),
        ("nonblocking", "Whether the service finds its sockets in non-blocking mode."),
        ("reuse_port", "Others may bind the same port; `SO_REUSEPORT`."),
        ("free_bind", "The address need not exist; `IP_FREEBIND`."),
        ("transparent", "`IP_TRANSPARENT`."),
        ("broadcast", "`SO_BROADCAST`."),
        ("device", "One network interface; `SO_BINDTODEVICE`."),
        ("multicast", 'Groups to join, as "GROUP" or "GROUP%INTERFACE".'),
        ("no_delay", "`TCP_NODELAY`."),
        ("keep_alive", "true, or a table with `idle`, `interval`, which are durations, and `count`; tcp(7)."),
        ("defer_accept", "A duration: connections appear when they bring data; `TCP_DEFER_ACCEPT`."),
        ("congestion", "The algorithm; `TCP_CONGESTION`."),
        ("protocol", '"mptcp", "sctp" or "udplite" instead of plain TCP or UDP.'),
        ("receive_buffer send_buffer", "Sizes; `SO_RCVBUF`, `SO_SNDBUF`. Of a FIFO, the pipe's."),
        ("mark priority", "`SO_MARK`, `SO_PRIORITY`."),
        ("tos ttl", "`IP_TOS`, `IP_TTL` and their IPv6 forms."),
        ("pass_credentials", "`SO_PASSCRED`."),
        ("pass_packet_info", "`IP_PKTINFO`, `IPV6_RECVPKTINFO`."),
        ("timestamping", "`SO_TIMESTAMPNS`."),
        ("proxy_protocol",
         "Whether a client begins with a PROXY header, of version 1 or 2, as HAProxy and other proxies send it: false, "
         'true, or "optional". superd reads the header and nothing behind it. Whom it names is the client for '
         "everything: `[access]`, limits per source, the log, and the variables of the service, `TCPLOCALIP` and "
         "`TCPLOCALPORT` too, which are those of TCP also where the proxy comes over a UNIX socket; getpeername(2) "
         "still tells the proxy. A header that names no IP client (LOCAL, UNKNOWN, UNIX sockets) changes nothing.\n"
         "Only a client in `proxy_trusted` may send one. With true everybody else is refused, and so is who sends "
         "something else, a header that is wrong or longer than 4096 bytes, or none within five seconds, or within "
         '`first_byte_timeout` if that is shorter. With "optional" everybody else is served as the client that it '
         "is, and nothing that it sends is taken for a header; so is a trusted client that sends something else, or, "
         "in that time, nothing. A wrong header is refused all the same.\n"
         "A client whose header is awaited counts for no source, not even the proxy. Then `[access]` is asked, then "
         "the limits per source, and then `first_byte_timeout` begins. As many as 1024 clients of a service can wait "
         "for all that, the next ones in the kernel's queue. For per-connection services, but not `builtin` tcpmux, "
         "and for `[proxy]`."),
        ("proxy_trusted",
         "Who may send a PROXY header: networks; of a UNIX socket `user:NAME` and `group:NAME`, or, if this is not "
         "written, whoever can connect."),
        ("tls",
         "TLS in front of the service: a table, also written as [socket.tls] below its [[socket]]. superd speaks it "
         "with the client, and the service, which knows nothing of it, has the plain bytes. For per-connection "
         "services, but not `builtin` tcpmux, and for `[proxy]`."),
    ),
    "tls": (
        ("certificate",
         "PEM: the certificate, and behind it, in order, those that lead to its root. A relative path counts from the "
         "directory of the service's file."),
        ("key",
         "PEM: its private key, without a passphrase. The default is the file of the certificate."),
        ("sni",
         "Other certificates: a table for each name that a client may ask for, with `certificate` and `key`. "
         '"*.example.org" is for all names with one label more, if there is none for the name itself. Who asks for no '
         "name, or for another one, gets the `certificate` of the socket."),
        ("client_ca",
         "PEM: clients are asked for a certificate, and it must lead to one of these."),
        ("client_certificate",
         'With `client_ca`: "required", who has none is refused; "optional", who has none is served, and who has a '
         "wrong one is refused."),
        ("min_version", 'The oldest version: "1.2" or "1.3".'),
        ("alpn",
         "Names of application protocols, the preferred one first. The first that the client offers too is taken; "
         "with a client that offers none of them the connection goes on without."),
        ("handshake_timeout", "A duration: a client whose handshake takes longer is closed and starts no process."),
    ),
    "limits": (
        ("max_connections", "Processes of a per-connection service at once, or clients of one with [proxy]."),
        ("on_full",
         "What happens to more clients: \"wait\", in the kernel's queue; \"refuse\", they are accepted, sent "
         "`refuse_message`, and closed."),
        ("max_per_source",
         "Connections at once from one source: an IPv4 address, an IPv6 network of 64 bits, a UNIX user, a vsock "
         "CID. More are refused, a twentieth of a second later: one of them may just have ended."),
        ("rate", "A rate of starts; beyond it clients wait."),
        ("rate_per_source", "The same from one source; more are refused."),
        ("refuse_message",
         "What those who are refused are sent; the log has some of them, and `superctl status` their number."),
        ("max_runtime",
         "The longest life of one process. Then it gets the `stop_signal`, and KILL after `stop_timeout`. For a "
         "service that is one process that is a failure, a timeout."),
        ("first_byte_timeout",
         "A client that sends nothing for that long is closed and starts no process. Until it sends something, or "
         "closes its side, it has no place and counts for its source alone; 1024 of them are held at once. The "
         "kernel does not know that they wait, so they are lost if the manager is killed."),
        ("max_load",
         "No process is started while the load average of the last minute is above this number; clients wait."),
        ("min_memory", "Nor while less memory than this is available, MemAvailable of proc_meminfo(5)."),
    ),
    "access": (
        ("allow deny",
         'Networks such as "10.0.0.0/8" or "2001:db8::1"; "user:NAME" and "group:NAME" for clients of UNIX '
         'sockets, as they were when they connected; ".example.org" for hosts whose name ends so and leads back to '
         "their address. The longest match decides: an address in full or a user, then the longest name, then the "
         "longest network or a group. A tie is a deny. If nothing matches, the client is let in only if there is "
         "no `allow`. An IPv4 client of an IPv6 socket is an IPv4 client. Names are asked for after accepting, and "
         "only if no rule has the client's address in full; what cannot be found out lets nobody in. Answers are "
         "believed for a minute."),
        ("hours",
         'Spans of local time such as "Mon-Fri 08:00-18:00", "Sat,Sun 10:00-24:00" or, for every day, '
         '"22:00-06:00". Outside of them nobody may connect.'),
    ),
    "rlimit": (
        ("nofile nproc core cpu as data fsize stack memlock rss locks sigpending msgqueue nice rtprio rttime",
         "`RLIMIT_NOFILE` and so on."),
    ),
    "scheduling": (
        ("nice", "-20 to 19."),
        ("ioprio", '"idle", "best-effort:N" or "realtime:N", N from 0 to 7.'),
        ("oom_score_adjust", "-1000 to 1000. Otherwise 0, as far as superd may change its own."),
        ("cpu_affinity", "A list of numbers of processors."),
    ),
    "cgroup": (
        ("memory_max",
         "The most memory, page cache included; `memory.max` of the kernel. Beyond it the kernel kills one of the "
         "processes, usually the largest, and the log says so when the service's own process was among them."),
        ("pids_max",
         "The most processes and threads; `pids.max`. Beyond it none can be started: fork(2) fails with EAGAIN."),
        ("cpu_max",
         'The most CPU time: "50%" of one CPU, "200%" for two; or as `cpu.max` of the kernel has it, microseconds and '
         'in how many, "50000 100000". Whoever has used them up waits for the next period.'),
    ),
    "sandbox": (
        ("no_new_privileges", "Whether executing a set-uid program gives nothing. true unless the user is root."),
        ("chroot", "The root directory; the program, `cwd` and the files of `stderr` are inside."),
        ("capabilities",
         'The only capabilities that the service can ever have, such as `["CHOWN"]`, capabilities(7). Root has '
         "exactly these; anybody else has none at the start."),
        ("ambient_capabilities",
         'Capabilities that the service has although it is not root, such as `["NET_BIND_SERVICE"]`.'),
        ("private_tmp", "An empty `/tmp` and `/var/tmp` of its own, gone when the last of its processes is."),
        ("private_network",
         "A network of its own with nothing but a loopback interface. The sockets that it is given are of superd's "
         "network, and work."),
        ("private_pids",
         "Processes of its own, pid_namespaces(7): a service sees itself and its descendants in a `/proc` of their "
         "own, and can signal nobody else. Process 1 there is superd's, which reaps; the service is another one, so "
         "signals do to it what they do everywhere. The connections of a service see each other, as far as one process "
         "of superd's has started them; a handler's module can start no thread while it is imported. Commands and "
         "checks around a main process have a namespace each, and no `MAINPID`. superd, its log and superctl(1) have "
         "the pids that the machine has; pids that a service tells in its notifications are its own."),
        ("read_only read_write",
         "Paths below which it cannot, and can, write, whatever its user may; the longest decides."),
    ),
    "health": (
        ("check", "What is checked: a connection, an HTTP answer or a command, as for `ready`."),
        ("every", "The time between two checks, and before the first."),
        ("timeout", "How long one may take; a command is killed then, with its process group."),
        ("failures", "How many have to fail in a row. `superctl status` tells how many have."),
        ("then",
         'What follows: "restart", the service is stopped and started again at once, whatever `restart` says, as '
         'often as `restart_limit` allows; "shutdown", everything is stopped, and superd exits with status 1; '
         '"report", it is logged, as is that it is well again, and `superctl health` fails.'),
    ),
    "proxy": (
        ("to",
         "Where the program listens: TCP or a UNIX stream socket. `${port}` is a free port, another one for each "
         "start, which `${port}` in `command`, `environment` and the commands around it is too; with a fixed port it "
         "is that one. Any user of the machine can take a port that the program does not listen at, and connect to one "
         "at which it does; a UNIX socket in a directory of the program's own is safe from both."),
        ("ready",
         "What tells that it does, in any form that `ready` has for a service; `${port}` may stand in it. The default "
         "is that `to` can be connected to."),
        ("send_proxy_header",
         "The version of the PROXY header that goes first and tells the program who the client is; false for none. A "
         "client of a UNIX socket has no address: the header says UNKNOWN, or LOCAL in version 2."),
    ),
    "superd": (
        ("conf_dirs", "More directories of service files, read after `conf.d`."),
        ("watch", "Whether changes of the files are taken up by themselves."),
        ("control", 'The address of the control socket, or "off".'),
        ("control_mode",
         "Its mode. If it is not written, it is 0660 with `control_group`, and 0666 with `control_admins`; "
         "superd asks the kernel who has connected, whatever the mode lets through."),
        ("control_group", "A group whose members may look: every command of superctl(1) that changes nothing. The "
         "control socket belongs to it."),
        ("control_admins", "Who may do everything, besides root and the user that superd runs as: groups, `group:NAME` "
         "or `user:NAME`."),
        ("log", '"text", "logfmt" or "json".'),
        ("log_level", 'The least important level that is written: "debug", "info", "warning", "error".'),
        ("syslog",
         "Path of a socket, usually `/dev/log`, at which superd receives what programs send with syslog(3). It is "
         "logged as the output of the service that the sender belongs to, with the level that it was sent with. "
         "That is told by the process, and by its user where it has ended already and only one service runs as that "
         "user; what belongs to no service is logged as nobody's. "
         "A socket that another program listens at is not taken."),
        ("stop_timeout", "When superd stops: after how long everything that is left is killed."),
    ),
}  # fmt: skip

# Kind of keys.py -> (which values it takes, one of them in TOML).
KINDS: dict[str, tuple[str, str]] = {
    "line": ("a string of one line", '"One line"'),
    "string": ("a string", '"text"'),
    "bytes": ("a string", '"421 Try again later\\r\\n"'),
    "handler": ('"package.module:function"', '"shout:serve"'),
    "word": ("a word of at most 15 letters, digits, _ . -", '"bbr"'),
    "device": ("the name of a network interface", '"eth0"'),
    "bool": ("true or false", "true"),
    "proxy_protocol": ('false, true or "optional"', "true"),
    "int": ("an integer", "1"),
    "number": ("a number", "4.0"),
    "limit": ("a positive integer", "8"),
    "duration": ('a duration: a number and its unit, "500ms", "30s", "1h30m", "2d"', '"30s"'),
    "size": ('a size: bytes, or "64K", "64M", "2G", "1T" (powers of 1024)', '"64K"'),
    "memory": ('a size: bytes, or "64K", "64M", "2G", "1T" (powers of 1024)', '"64M"'),
    "pids": ("a positive integer", "100"),
    "cpu_time": ('a share of one CPU, "50%"; or microseconds in a period of microseconds, "50000 100000"', '"50%"'),
    "mode": ('octal digits in a string, "0660"', '"0660"'),
    "rate": ('a rate: a count and a window, "50/1s", "10/1m"', '"50/1s"'),
    "signal": ('the name of a signal, "TERM" or "SIGTERM"', '"INT"'),
    "statuses": ("a list of exit statuses (0 to 255) and names of signals", '[0, 3, "USR1"]'),
    "choice": ("one of", ""),
    "choices": ("a list of some of", ""),
    "builtin": ("one of", '"echo"'),
    "address": ('an address: "tcp:7007", "tcp:127.0.0.1:7007", "udp:53", "unix:/run/x.sock"', '"tcp:7007"'),
    "addresses": (
        'an address, or a list of them: "tcp:7007", "tcp:127.0.0.1:7007", "udp:53", "unix:/run/x.sock"', '"tcp:7007"',
    ),
    "target": ('an address: "tcp:127.0.0.1:${port}", "tcp:127.0.0.1:8080", "unix:/run/x.sock"',
               '"tcp:127.0.0.1:${port}"'),
    "header": ("false, 1 or 2", "2"),
    "control": ('"unix:/PATH", or "off"', '"unix:/run/superd/control.sock"'),
    "command": (
        "a list of strings, used as it is; or one string, split as a POSIX shell splits it", '["/bin/cat", "-u"]',
    ),
    "commands": ("a command, or a list of commands", '[["/bin/mkdir", "-p", "/run/x"]]'),
    "output": ('"log", "socket", "null", "inherit" or "file:/PATH"', '"null"'),
    "admins": ('a list of groups, "group:NAME" or "user:NAME"', '["wheel", "user:alice"]'),
    "ready": ("a condition", '"connect:tcp:127.0.0.1:8080"'),
    "user": ("a name in a string, or an id as an integer", '"root"'),
    "group": ("a name in a string, or an id as an integer", '"root"'),
    "groups": ("a list of names and ids", '["root", 0]'),
    "directory": ("an absolute path", '"/srv"'),
    "path": ("a path; a relative one counts from the file's directory", '"/etc/default/x"'),
    "paths": ("a list of paths; relative ones count from the file's directory", '["/run/x"]'),
    "strings": ("a list of strings", '["text"]'),
    "environment": ("a table of strings", '{ LANG = "C.UTF-8" }'),
    "variables": ("a list of names of variables", '["SSL_CERT_FILE"]'),
    "instances": ("a list of names", '["a", "b"]'),
    "services": ("a list of names of services", '["database"]'),
    "networks": ('a list of networks, "user:NAME", "group:NAME" and ".example.org"', '["10.0.0.0/8"]'),
    "capabilities": ("a list of capabilities, with or without CAP_", '["NET_BIND_SERVICE"]'),
    "hours": ('a list of times, "Mon-Fri 08:00-18:00"', '["Mon-Fri 08:00-18:00"]'),
    "fd_name": ("a name of 1 to 255 bytes without `:` or `}`", '"http"'),
    "multicast": ('a list of groups: "239.1.2.3", "ff02::1:3%eth0"', '["239.1.2.3"]'),
    "keep_alive": ("a bool, or a table of idle, interval and count", '{ idle = "60s", count = 3 }'),
    "tls": ("a table", '{ certificate = "/etc/ssl/chain.pem", key = "/etc/ssl/private/key.pem" }'),
    "names": ("a table: a name of a host, or one that begins with *., and its certificate and key",
              '{ "www.example.org" = { certificate = "/etc/ssl/www.pem", key = "/etc/ssl/private/www.pem" } }'),
    "protocols": ("a list of names of protocols", '["h2", "http/1.1"]'),
    "rlimit": ('a number, a size such as "64M", "off", or a list [soft, hard]', "[1024, 4096]"),
    "ioprio": ('"idle", "best-effort:0" to "best-effort:7", "realtime:0" to "realtime:7"', '"best-effort:6"'),
    "cpus": ("a list of numbers of CPUs", "[0]"),
    "table": ("a table", "{}"),
    "tables": ("tables", "[]"),
}  # fmt: skip

# Where the example of the kind would not be one of the key.
_EXAMPLES = {
    ("service", "description"): '"git repositories, read-only"', ("service", "user"): '"nobody"',
    ("service", "argv0"): '"in.fingerd"',
    ("service", "ready"): '"notify"', ("service", "umask"): '"0077"', ("service", "fdstore"): "16",
    ("service", "environment_file"): '"/etc/default/git"', ("service", "watchdog"): '"30s"',
    ("service", "reload_signal"): '"HUP"', ("service", "restart_limit"): '"5/10s"', ("service", "cwd"): '"/srv/git"',
    ("socket", "backlog"): "128", ("socket", "mark"): "1", ("socket", "ttl"): "1", ("socket", "tos"): "16",
    ("socket", "defer_accept"): '"5s"', ("socket", "directory_mode"): '"0750"', ("limits", "max_runtime"): '"1h"',
    ("scheduling", "nice"): "10", ("scheduling", "oom_score_adjust"): "500", ("superd", "conf_dirs"): '["/srv/superd"]',
    ("socket", "protocol"): '"mptcp"', ("rlimit", "nice"): "20", ("rlimit", "core"): "0", ("health", "failures"): "3",
}  # fmt: skip


def text_of(key: Key) -> str:
    """The manual's text, or its one sentence if it stands under no key of a list."""
    for names, text in TEXTS.get(key.table, ()):
        if key.name in names.split():
            return text
    return key.sentence


def forms_of(key: Key) -> str:
    """Which values it takes, in words."""
    text = KINDS[key.kind][0]
    if key.choices:
        text += " " + ", ".join(f'"{word}"' for word in key.choices)
    return f'{text}; or "off"' if key.off else text


def example_of(key: Key) -> str:
    """One value, in TOML, that the loader takes."""
    if found := _EXAMPLES.get((key.table, key.name)):
        return found
    if key.choices:
        return (
            f'"{key.choices[-1 if key.kind == "choice" else 0]}"' if key.kind != "choices" else f'["{key.choices[0]}"]'
        )
    return KINDS[key.kind][1]
