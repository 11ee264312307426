"""What can be asked over the control socket, in varlink's words. manager/control.py answers."""

from __future__ import annotations

from superd.core import varlink

INTERFACE = varlink.Interface("""\
# A superd: its services, and what an operator may ask of them.
interface io.superd.Control

# since: RFC 3339; for: seconds in this state; now: live processes; total: starts; listen: canonical addresses
type Service (
  name: string, state: string, since: string, for: float, pid: ?int, now: int, total: int, restarts: int,
  listen: []string, note: string
)

# queue and room: connections that wait to be accepted, and how many may; only TCP can tell. why: not bound, because
# paused: superd takes nothing from it
type Socket (
  service: string, name: string, address: string, kind: string, queue: ?int, room: ?int, why: ?string, paused: bool
)

# connection and peer: of a per-connection service. for: age in seconds
type Process (service: string, pid: int, connection: ?string, peer: ?string, since: string, for: float)

# time: seconds since the epoch; the rest as in the log, superd(8)
type Record (
  number: int, time: float, level: string, service: ?string, event: string, connection: ?string, pid: ?int,
  peer: ?string, message: string, fields: object
)

# ready: what tells that it is; took: seconds from its start until it was; health: what is checked, "" for nothing
# said: STATUS= of the service itself, and errors as in sd_notify(3); stored: fds; ignored: messages that did not count;
# endings: how the last processes ended; limits: of its control group, and what it has of them
type Details (
  service: Service, description: string, file: string, run: string, pass: string, command: []string, ready: string,
  took: ?float, health: string, restart: string, requires: []string, wants: []string, required_by: []string,
  said: string, errors: []string, stored: int, ignored: int, refused: int, limits: []string, sockets: []Socket,
  processes: []Process, endings: []string, records: []Record
)

# took: seconds; records: what the service wrote meanwhile, if it did not work
type Result (
  name: string, ok: bool, changed: bool, state: string, pid: ?int, note: string, took: float, records: []Record
)

# All of them, or those that are named.
method List(names: ?[]string) -> (services: []Service)
method Sockets(names: ?[]string) -> (sockets: []Socket)
method Status(names: ?[]string) -> (services: []Details)
method Connections(names: ?[]string) -> (connections: []Process)

# The configuration in force. toml: a whole file; with origin: the place of each value after it. Values of variables
# are hidden from those who may only look. problems: why it is not in force
method Show(name: string, origin: ?bool) -> (
  toml: string, config: object, origins: object, file: string, problems: string
)

# The last `count` lines of services and superd's words about them; with `more` several replies, and with `follow`
# no end. lost: records that were dropped because they were not read fast enough.
method Logs(names: ?[]string, count: ?int, follow: ?bool) -> (records: []Record, lost: int)
method Events(names: ?[]string, count: ?int, follow: ?bool) -> (records: []Record, lost: int)

# The reply comes when it is so or has failed; with wait: false at once.
method Start(names: []string, wait: ?bool) -> (results: []Result)
method Stop(names: []string, wait: ?bool) -> (results: []Result)

# overlap: the new process is ready before the one before it is told to stop; if it never is, that one goes on.
method Restart(names: []string, wait: ?bool, overlap: ?bool) -> (results: []Result)

# Take no clients, who wait in the kernel's queue meanwhile; what runs goes on. It stays so until Resume.
method Pause(names: []string) -> (results: []Result)
method Resume(names: []string) -> (results: []Result)

# As Stop, but nothing is killed: connections, and processes that were told to stop, have all the time that they need.
method Drain(names: []string, wait: ?bool) -> (results: []Result)

# Send each service's reload_signal; the reply tells whether its processes lived through it, and comes, where one says
# RELOADING=1, after its READY=1.
method ReloadService(names: []string, wait: ?bool) -> (results: []Result)

# signal: a name without SIG; default TERM
method Kill(names: []string, signal: ?string) -> (results: []Result)

# Replies when all are so, or when one of them cannot become so by itself.
method Wait(names: []string, for: (ready, active, stopped, idle)) -> (results: []Result)

# Whether it is so now. active: it serves or runs; a per-connection service is ready when it listens.
method Is(names: []string, what: (active, failed, ready)) -> (yes: []string, no: []string)

# live: it answers. ready: every enabled service can serve; problems says which cannot.
method Health() -> (live: bool, ready: bool, problems: []string)

# Read the files and carry out what has changed. action: add, remove, in place, rebind or restart; why: not carried out,
# because; daemon: changed keys of superd.toml; problems: all that is wrong in the files; strict: all or nothing
type Change (name: string, action: string, keys: []string, why: ?string)
method Reload(dry_run: ?bool, strict: ?bool) -> (
  entries: []Change, daemon: []string, problems: []string, applied: bool
)

# What Reload would do.
method Diff() -> (entries: []Change, daemon: []string, problems: []string, applied: bool)

# Stop everything in order and exit. The connection ends when that is done; pid: of the process that then exits.
method Shutdown() -> (services: int, pid: int)

# Let the code that is installed now take over; everything else goes on. ok: it does come up, and the connection ends as
# soon as this manager has; version: of that code; was: of this one; why: it does not come up
method Upgrade() -> (ok: bool, version: string, was: string, why: string)

# Whether a client would be let in now, and the rule that says so. address: of an IP client, or user:NAME.
method Access(name: string, address: string) -> (allowed: bool, reason: string)

# For Prometheus, in its text format.
method Metrics() -> (text: string)

# New connections in slots of so many seconds, the oldest first, the last one not over yet; of services that had some.
method History() -> (slot: float, span: float, services: [](name: string, connections: []int))

# Every process below superd by service; service null: superd's own.
method Processes(names: ?[]string) -> (processes: [](service: ?string, pid: int))

error NoSuchService (name: string, similar: []string)
error BadCall (reason: string)
error TooManyClients (limit: int)
""")

_SERVICE_INTERFACE = varlink.Interface("""\
# The Varlink Service Interface is provided by every varlink service. It
# describes the service and the interfaces it implements.
interface org.varlink.service

# Get a list of all the interfaces a service provides and information
# about the implementation.
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)

# Get the description of an interface that is implemented by this service.
method GetInterfaceDescription(interface: string) -> (description: string)

# The requested interface was not found.
error InterfaceNotFound (interface: string)

# The requested method was not found
error MethodNotFound (method: string)

# The interface defines the requested method, but the service does not
# implement it.
error MethodNotImplemented (method: string)

# One of the passed parameters is invalid.
error InvalidParameter (parameter: string)

# Client is denied access
error PermissionDenied ()

# Method is expected to be called with 'more' set to true, but wasn't
error ExpectedMore ()
""")

PREFIX = f"{INTERFACE.name}."  # of its methods and errors
INTERFACES = {interface.name: interface for interface in (INTERFACE, _SERVICE_INTERFACE)}
