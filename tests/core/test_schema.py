"""superd.core.schema: files in, specs and problems out. The machine is a fake, so nothing here depends on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loading import FakeMachine, load_all, only_problem, sources

from superd.core.keys import BY_TABLE
from superd.core.problems import format_problems
from superd.core.schema import SourceFile, conf_dirs, load
from superd.core.spec import (
    Address,
    Cgroup,
    Context,
    CpuTime,
    KeepAlive,
    Limits,
    Output,
    RateSpec,
    Ready,
    ServiceSpec,
    Snapshot,
)
from superd.core.values import expand_runtime


def service(text: str, *, is_root: bool = True, environ: Mapping[str, str] | None = None) -> ServiceSpec:
    snapshot, problems = load_all({"git.toml": text}, is_root=is_root, environ=environ)
    assert not problems, format_problems(problems)
    return snapshot.services["git"]


def complaints(text: str | bytes, *, is_root: bool = True) -> list[str]:
    """Short form, without the file's name; the service must be broken."""
    snapshot, problems = load_all({"git.toml": text}, is_root=is_root)
    assert snapshot.services == {} and set(snapshot.broken) == {"git"}, problems
    return [line.removeprefix("conf.d/git.toml:") for line in format_problems(problems, "short").splitlines()]


TCP = 'listen = "tcp:7"\n'
CAT = 'command = "/bin/cat"\n'
BOTH = TCP + CAT


# -- what a file means


def test_two_lines_are_a_service() -> None:
    assert service('listen = "tcp:7007"\ncommand = "/bin/cat"\n') == ServiceSpec(
        name="git",
        source="conf.d/git.toml",
        command=("/bin/cat",),
        run="per-connection",
        pass_="stdio",
        sockets=service('listen = "tcp:7007"\ncommand = "/bin/cat"\n').sockets,
        context=Context(user="nobody"),
        user_assumed=True,
    )
    (socket,) = service(BOTH).sockets
    assert (socket.address, socket.name, socket.backlog) == (Address("tcp", None, 7), "git", 4096)


@pytest.mark.parametrize(
    ("listen", "run", "passed", "restart"),
    [
        ('listen = "tcp:7"', "per-connection", "stdio", "no"),
        ('listen = ["tcp:7", "unix-seqpacket:/s"]', "per-connection", "stdio", "no"),
        ('listen = "udp:7"', "on-demand", "listen-fds", "no"),
        ('listen = "fifo:/f"', "on-demand", "listen-fds", "no"),
        ("", "always-on", "listen-fds", "on-failure"),
        ('run = "once"', "once", "listen-fds", "no"),
        ('run = "on-demand"\nlisten = ["tcp:7", "udp:7"]', "on-demand", "listen-fds", "no"),
    ],
)
def test_run_pass_and_restart_follow_the_sockets(listen: str, run: str, passed: str, restart: str) -> None:
    spec = service(f"{CAT}{listen}\n")
    assert (spec.run, spec.pass_, spec.restart.policy) == (run, passed, restart)


def test_everything_at_once() -> None:
    spec = service(
        """
        description = "Git"
        enabled = false
        command = ["env", "-p", "${port:a}", "$${x}", "${A:-b}"]
        run = "on-demand"
        pass = "listen-fds"
        fd_protocols = ["systemd", "einhorn"]
        stderr = "null"
        stdout = "file:/var/log/git.log"
        user = 33
        group = "www"
        groups = ["www", 0]
        cwd = "/srv"
        umask = "0077"
        environment_file = "git.env"
        pass_environment = ["*"]
        ready = "notify"
        ready_timeout = "off"
        notify_access = "all"
        restart = "always"
        restart_delay = "1s"
        restart_delay_max = "1m"
        restart_limit = "5/10s"
        success_status = [0, 3, "SIGUSR1"]
        stop_signal = "SIGINT"
        stop_timeout = "off"
        kill_mode = "group"
        [environment]
        A = "1"
        B = "${fd:b}"
        [limits]
        rate = "50/1s"
        [rlimit]
        nofile = [1024, "off"]
        core = 0
        as = "1G"
        [scheduling]
        nice = -5
        ioprio = "best-effort:3"
        oom_score_adjust = -100
        cpu_affinity = [1, 0]
        [sandbox]
        no_new_privileges = false
        [[socket]]
        listen = "tcp:7"
        name = "a"
        backlog = 16
        keep_alive = { idle = "60s", count = 3 }
        no_delay = true
        defer_accept = "5s"
        receive_buffer = "64K"
        [[socket]]
        listen = "unix:git.sock"
        name = "b"
        mode = "0660"
        user = "www"
        symlinks = ["/run/git"]
        """
    )
    assert spec.command == ("/usr/bin/env", "-p", "${port:a}", "$${x}", "b") and spec.argv0 == "env"
    assert [expand_runtime(word, {"a": 7}, {}) for word in spec.command[2:]] == ["7", "${x}", "b"]
    assert spec.environment == (("A", "1"), ("B", "${fd:b}"))
    assert spec.environment_file == "/work/conf.d/git.env"
    assert spec.stdout == Output("file", "/var/log/git.log") and spec.stderr == Output("null")
    assert spec.ready == Ready("notify") and spec.ready_timeout_s is None and spec.stop_timeout_s is None
    assert spec.restart.limit == RateSpec(5, 10.0) and spec.restart.success_status == (0, 3, "USR1")
    assert spec.stop_signal == 2 and spec.kill_mode == "group" and not spec.enabled
    assert spec.limits == Limits(rate=RateSpec(50, 1.0))
    assert spec.context == Context(
        user=33, group="www", groups=("www", 0), umask=0o077, cwd="/srv",
        rlimits=(("nofile", 1024, -1), ("core", 0, 0), ("as", 1 << 30, 1 << 30)), nice=-5, ioprio="best-effort:3",
        oom_score_adjust=-100, cpu_affinity=(0, 1), no_new_privileges=False,
    )  # fmt: skip
    first, second = spec.sockets
    assert first.keep_alive == KeepAlive(60.0, None, 3)
    assert first.defer_accept_s == 5.0 and first.receive_buffer == 65536
    assert second.address.path == "/work/conf.d/git.sock" and second.mode == 0o660 and second.symlinks == ("/run/git",)


def test_cgroup() -> None:
    """What all processes have together; its spawners are in the group, and so nobody else's."""
    text = 'command = "/bin/cat"\n[cgroup]\nmemory_max = "64M"\npids_max = 9\ncpu_max = "50%"\n'
    spec = service(text)
    assert spec.cgroup == Cgroup(64 << 20, 9, CpuTime(50_000, 100_000)) and not spec.context.grouped
    assert spec.cgroup.controllers() == ("memory", "pids", "cpu")
    spec = service(f'listen = "tcp:7"\n{text}')
    assert (spec.context.grouped, spec.context.owner) == (True, "git")
    for off in ('"off"', "false", '"max"', '"infinity"'):
        spec = service(f'listen = "tcp:7"\ncommand = "/bin/cat"\n[cgroup]\nmemory_max = {off}\npids_max = {off}')
        assert spec.cgroup == Cgroup() and (spec.context.grouped, spec.context.owner) == (False, None)


def test_a_controller_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:  # H12
    monkeypatch.setattr(FakeMachine, "lacks_controller", lambda self, name: "why" if name == "pids" else None)
    text = 'command = "/bin/cat"\n[cgroup]\nmemory_max = "64M"\npids_max = 9'
    assert complaints(text) == ["4:1: error: cannot limit pids here: why"]
    assert not service(f"enabled = false\n{text}").enabled  # it is none of this machine's yet


def test_defaults_of_the_table_are_those_of_the_specs() -> None:
    # One table: what keys.py documents is what a file without the key gives.
    for table, names in {
        "service": "umask ready_timeout restart_delay restart_delay_max stop_signal stop_timeout cwd stderr stdout "
        "ready notify_access kill_mode success_status description enabled pass_environment",
        "limits": "max_connections on_full max_per_source rate rate_per_source refuse_message",
        "socket": "backlog reuse_port nonblocking no_delay",
    }.items():
        plain = service(f'{CAT}listen = "tcp:7"\nrun = "always-on"' if table == "service" else BOTH)
        for name in names.split():
            default = BY_TABLE[table][name].default
            if default is None:
                continue
            value = f'"{default}"' if isinstance(default, str) else str(default).lower()
            if table == "service":
                written = service(f'{CAT}listen = "tcp:7"\nrun = "always-on"\n{name} = {value}\n')
            elif table == "limits":
                written = service(f"{BOTH}[limits]\n{name} = {value}\n")
            else:
                written = service(f'{CAT}[[socket]]\nlisten = "tcp:7"\n{name} = {value}\n')
            assert replace(written, notify_asked=False) == plain, name


def test_who_it_runs_as() -> None:
    # E10: never root by default; names and numbers are different types
    assert service(BOTH).context == Context(user="nobody", no_new_privileges=True)
    assert service(BOTH + 'user = "root"').context == Context(user="root", no_new_privileges=False)
    assert service(BOTH + 'user = "0day"').context.user == "0day"
    assert service(BOTH, is_root=False).context == Context(user=None, no_new_privileges=True)
    assert service(BOTH + 'user = "www"\ngroup = 33', is_root=False).context == Context(user=None)
    assert service(BOTH + 'user = "${WHO:-www}"').context.user == "www"
    assert service(BOTH + 'user = "${WHO}"', environ={"WHO": "33"}).context.user == 33


@pytest.mark.parametrize(
    "user", ['"1000"', '""', '"nobody\\n"', "-1", "4294967295", "true", '"daemno"', "1.0", "1234", '"${NONE}"', '"a:b"']
)
@pytest.mark.parametrize("key", ["user", "group"])
def test_a_user_that_is_none_is_an_error(key: str, user: str) -> None:
    # E10
    assert any(":3:" in line or line.startswith("3:") for line in complaints(f"{BOTH}{key} = {user}\n"))


def test_only_root_becomes_somebody_else() -> None:
    for text in ('user = "root"', 'group = "root"', 'groups = ["www"]'):
        assert "superd is not root" in complaints(BOTH + text, is_root=False)[0]


def test_program() -> None:
    # E26: the absolute path is known when the file is read
    assert service(TCP + 'command = "cat"').command == ("/bin/cat",)
    assert service(TCP + 'command = "cat"').argv0 == "cat"
    assert service(TCP + 'command = "cat -u"\nargv0 = "meow"').argv0 == "meow"
    assert service(BOTH).argv0 is None
    for program in ("good-script", "unreadable", "foreign"):
        assert service(f'{TCP}command = "/bin/{program}"').command == (f"/bin/{program}",)
    assert service(TCP + 'command = "/home/www/app"\nuser = "www"').context.user == "www"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("[]", "the command is empty"),
        ('""', "the command is empty"),
        ('[""]', "the command is empty"),
        ('["cat", 5]', 'write "5" in quotes'),
        ('"./cat"', "write '/work/conf.d/cat'"),
        ('"bin/cat"', "is a relative path"),
        ('"/bin"', "is a directory"),
        ('"/bin/fifo"', "is no regular file"),
        ('"/bin/plain"', "chmod +x /bin/plain"),
        ('"/bin/none"', "there is no program '/bin/none'"),
        ('"dog"', "there is no program 'dog' in PATH (/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:"),
        ('"/bin/script"', "ENOEXEC"),
        ('"/bin/empty"', "ENOEXEC"),
        ('"/bin/bad-script"', "wants the interpreter '/usr/bin/pyhton', which does not exist"),
        ('"/tmp/evil"', "superd is root and does not start /tmp/evil: /tmp/evil is writable by everybody"),  # E26
        ('"/home/www/app"', "belongs to user www"),  # E26: nobody would run www's program
        ('["/bin/cat", "a\\u0000"]', "NUL"),  # E15
        (f'["/bin/cat", "{"a" * 200_000}"]', "200000 bytes, and execve(2) takes 131071"),  # E16
        ("[" + '"a",' * 10_000 + "]", "10000 arguments, and 4096 are allowed"),
        ('"/bin/cat | /bin/cat"', '["/bin/sh", "-c", "/bin/cat | /bin/cat"]'),
        ('["/bin/cat", "${NONE}"]', "${NONE} is not set"),
        ('["/bin/${port}"]', "must be known when the file is read"),
        ('["/bin/cat", "${port:x}"]', "no socket has the name 'x' (there are: 'git')"),
        ('["/bin/cat", "${fd:git}"]', 'goes with pass = "listen-fds"'),
    ],
)
def test_a_command_that_cannot_be_started(command: str, said: str) -> None:
    (line,) = complaints(f"{TCP}command = {command}\n")
    assert line.startswith("2:") and said in line


def test_environment() -> None:
    refused = {
        '"A=B" = "x"': "cannot name a variable",  # E15
        '"" = "x"': "cannot name a variable",
        'B = "x\\u0000"': "NUL",
        "C = 5": 'write "5" in quotes',
        'LISTEN_FDS = "1"': "set by superd itself",
        'NOTIFY_SOCKET = "x"': "set by superd itself",
        'WATCHDOG_USEC = "1"': "set by superd itself",
        'LD_PRELOAD = "/tmp/x.so"': "/tmp/x.so is writable by everybody",
        'LD_LIBRARY_PATH = "lib"': "is not an absolute path",
        'PYTHONPATH = "/lib:/tmp"': "/tmp is writable by everybody",
        f'D = "{"x" * 200_000}"': "execve(2) takes 131071",  # E16
        'E = "${NONE}"': "is not set",
    }
    found = complaints(f"{BOTH}[environment]\n" + "\n".join(refused))
    assert [int(line.partition(":")[0]) for line in found] == list(range(4, 4 + len(refused)))
    for line, said in zip(found, refused.values(), strict=True):
        assert said in line
    fine = service(BOTH + '[environment]\nPYTHONUNBUFFERED = "1"\nLD_PRELOAD = "libnss_wrapper.so"')
    assert fine.environment == (("PYTHONUNBUFFERED", "1"), ("LD_PRELOAD", "libnss_wrapper.so"))
    assert service(BOTH + '[environment]\nLD_PRELOAD = "/tmp/x.so"', is_root=False).environment


def test_drop_ins_replace_values_and_merge_tables() -> None:
    files = {
        "git.toml": f'{BOTH}[environment]\nA = "1"\nB = "2"\n[limits]\nrate = "1/1s"\n',
        "git.toml.d/a.toml": 'listen = "tcp:8"\n[environment]\nB = "3"\n',
        "git.toml.d/b.toml": '[environment]\nC = "4"\n[limits]\nmax_connections = 5\n',
    }
    snapshot, problems = load_all(files)
    spec = snapshot.services["git"]
    assert not problems
    assert spec.environment == (("A", "1"), ("B", "3"), ("C", "4"))
    assert spec.limits == Limits(max_connections=5, rate=RateSpec(1, 1.0))
    assert [str(socket.address) for socket in spec.sockets] == ["tcp:8"]


def test_problems_of_drop_ins_and_defaults_stand_where_they_are_written() -> None:
    files = {
        "superd.toml": '[defaults]\numask = "999"\n[defaults.limits]\nrate = "5"\n',
        "git.toml": f"{BOTH}[limits]\nmax_connections = 5\n",
        "git.toml.d/a.toml": "\n[limits]\nmax_connections = 0\n",
        "web.toml": 'listen = "tcp:8"\ncommand = "/bin/cat"\n',
    }
    snapshot, problems = load_all(files)
    assert [(p.path, p.line, p.column, p.source_line) for p in problems] == [
        ("superd.toml", 2, 9, 'umask = "999"'),
        ("superd.toml", 4, 8, 'rate = "5"'),
        ("conf.d/git.toml.d/a.toml", 3, 19, "max_connections = 0"),
    ]
    assert set(snapshot.broken) == {"git", "web"} and "superd.toml:2:9" in snapshot.broken["web"]


def test_defaults_hold_where_they_mean_something() -> None:
    files = {
        "superd.toml": '[defaults]\nuser = "www"\nrestart = "always"\nstdout = "null"\n'
        '[defaults.limits]\nmax_connections = 5\n[defaults.environment]\nA = "1"\n',
        "a.toml": BOTH,
        "b.toml": 'listen = "udp:7"\ncommand = "/bin/cat"\nuser = "nobody"\n',
    }
    snapshot, problems = load_all(files)
    assert not problems, format_problems(problems)
    a, b = snapshot.services.values()
    assert (a.context.user, a.limits.max_connections, a.restart.policy, a.stdout.kind) == ("www", 5, "no", "log")
    assert (b.context.user, b.limits.max_connections) == ("nobody", 64)
    assert (b.restart.policy, b.stdout.kind) == ("always", "null")
    assert a.environment == b.environment == (("A", "1"),)


@pytest.mark.parametrize("text", ["[defaults", "defaults = 5", "\ufeff"])
def test_no_service_runs_without_its_defaults(text: str) -> None:
    # A10: they may have said who it runs as
    snapshot, problems = load_all({"superd.toml": text, "git.toml": BOTH})
    assert snapshot.services == {} and "[defaults] cannot be read" in snapshot.broken["git"]
    assert problems[0].path == "superd.toml"


def test_superd_toml() -> None:
    text = 'control = "unix:/run/c.sock"\ncontrol_mode = "0660"\nlog = "json"\n'
    text += 'log_level = "debug"\nstop_timeout = "5s"\nwatch = false\n'
    snapshot, problems = load_all({"superd.toml": text + 'conf_dirs = ["more", "/abs"]\n'})
    daemon = snapshot.daemon
    assert not problems
    assert (daemon.control, daemon.control_mode, daemon.log) == ("unix:/run/c.sock", 0o660, "json")
    assert (daemon.log_level, daemon.stop_timeout_s, daemon.watch) == ("debug", 5.0, False)
    source = SourceFile("/etc/superd/superd.toml", b'conf_dirs = ["more", "/abs"]', "daemon", "superd")
    assert conf_dirs(source) == ("/etc/superd/more", "/abs")
    wrong = 'log = "xml"\ncontrol = "tcp:5"\nuser = "root"\nwatch = 0\nlog_levle = "info"\nstop_timeout = 5\n'
    snapshot, problems = load_all({"superd.toml": wrong, "git.toml": BOTH})
    assert [p.line for p in problems] == [1, 2, 3, 4, 5, 6]
    assert set(snapshot.services) == {"git"}


def test_templates() -> None:
    text = f'instances = ["a", "b"]\n{CAT}listen = "unix:/run/${{name}}"\nenvironment = {{ I = "${{instance}}" }}\n'
    snapshot, problems = load_all({"worker@.toml": text})
    assert not problems
    assert list(snapshot.services) == ["worker@a", "worker@b"]
    b = snapshot.services["worker@b"]
    assert b.sockets[0].address.path == "/run/worker@b" and b.environment == (("I", "b"),)
    assert load_all({"worker@.toml": CAT}) == (Snapshot(), [])  # they come with `superctl start`
    for wrong in ("comand = 1", 'instances = ["a", "a"]', 'instances = ["A"]', 'instances = "a"', "instances = [1]"):
        snapshot, problems = load_all({"worker@.toml": f"{wrong}\n{CAT}"})
        assert snapshot.services == {} and set(snapshot.broken) == {"worker@"} and len(problems) == 1
    assert "only a template" in complaints(BOTH + 'instances = ["a"]')[0]
    assert "only a template" in complaints(TCP + 'command = ["/bin/cat", "${instance}"]')[0]


# -- what is wrong together


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('"tcp:7"', '"tcp:7"'),
        ('"tcp:0.0.0.0:80"', '"tcp:127.0.0.1:http"'),
        ('"tcp:80"', '"tcp6:80"'),
        ('"tcp:localhost:80"', '"tcp:[::1]:80"'),
        ('"unix:/run/x"', '"unix-dgram:/run/x"'),
        ('"unix:@x"', '"unix:@x"'),
    ],
)
def test_one_address_in_two_services(one: str, other: str) -> None:
    # A12
    text = f'{CAT}run = "on-demand"\nlisten = '
    snapshot, problems = load_all({"a.toml": text + one, "b.toml": text + other})
    assert list(snapshot.services) == ["a"] and list(snapshot.broken) == ["b"]
    said = format_problems(problems, "short")
    assert "conf.d/b.toml:3:10: " in said and "conf.d/a.toml" in said and "service 'a'" in said


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('"tcp:7"', '"udp:7"'),
        ('"tcp:0"', '"tcp:0"'),
        ('"tcp4:80"', '"tcp6:80"'),
        ('"tcp:127.0.0.1:80"', '"tcp:127.0.0.2:80"'),
        ('"tcp:0.0.0.0:80"', '"tcp:[::]:80"'),
        ('"vsock:1:5"', '"vsock:2:5"'),
    ],
)
def test_addresses_that_do_not_collide(one: str, other: str) -> None:
    text = f'{CAT}run = "on-demand"\nlisten = '
    snapshot, problems = load_all({"a.toml": text + one, "b.toml": text + other})
    assert not problems and list(snapshot.services) == ["a", "b"]


def test_disabled_and_shared_sockets_do_not_collide() -> None:
    off = f"{BOTH}enabled = false\n"
    assert list(load_all({"a.toml": off, "b.toml": BOTH})[0].services) == ["a", "b"]
    shared = f'{CAT}[[socket]]\nlisten = "tcp:7"\nreuse_port = true\n'
    assert list(load_all({"a.toml": shared, "b.toml": shared})[0].services) == ["a", "b"]


def test_the_first_of_two_names_counts() -> None:
    # K15
    files = [SourceFile(f"{where}/git.toml", BOTH.encode(), "service", "git") for where in "ab"]
    snapshot, problems = load(files, machine=FakeMachine(), environ={}, is_root=True)
    assert snapshot.services["git"].source == "a/git.toml" and snapshot.broken == {}
    assert "a/git.toml" in str(problems[0]) and "b/git.toml" in str(problems[0])


PROXIED = '[[socket]]\nlisten = "tcp:7"\nproxy_protocol = true\n'
WRONG = [
    # C2
    ('listen = "udp:7"\nrun = "per-connection"', '1:10: error: a datagram socket has no connections, so udp:7 cannot'),
    ('listen = "fifo:/f"\nrun = "per-connection"', "1:10: error: a FIFO has no connections"),
    ('listen = ["tcp:7", "udp:7"]', "stream and datagram together: `run` must say"),
    ('listen = ["fd:x", "udp:7"]', "`run` must say"),
    ('run = "on-demand"', "1:7: error: run = \"on-demand\" needs a socket"),
    ('listen = ["tcp:7", "tcp:8"]\nrun = "on-demand"\npass = "stdio"', "3:8: error: pass = \"stdio\" with run = "),
    ('listen = "tcp:localhost:7"\nrun = "on-demand"\npass = "stdio"', "localhost is two"),
    ('pass = "stdio"', "needs a socket, and there is none"),
    ('listen = ["tcp:7", "tcp:127.0.0.1:7"]', "collide"),
    ('listen = "tcp:7"\n[[socket]]\nlisten = "tcp:8"', "1:1: error: `listen` and [[socket]] are both there"),
    ('listen = "tcp:7"\nstdout = "null"', '2:1: error: `stdout` is the socket with pass = "stdio"'),
    ('listen = "udp:7"\nstderr = "socket"', '2:1: error: stderr = "socket" needs pass = "stdio"'),
    ('listen = "tcp:7"\nfd_protocols = ["einhorn"]', '2:1: error: `fd_protocols` goes with pass = "listen-fds"'),
    ('listen = "tcp:7"\nrestart = "always"', "2:1: error: `restart` is a key of run = "),
    ('listen = "udp:7"\n[limits]\nmax_connections = 5', "3:1: error: `max_connections` is a key of run"),
    ('listen = "tcp:7"\n[limits]\nmax_connections = 0', "3:19: error: 0 is not a limit: max_connections is 1"),  # B5
    ('listen = "tcp:7"\n[access]\nallow = []', "3:9: error: `allow` is empty, and does not say"),  # A10
    ('listen = "tcp:7"\n[limits]\nmax_per_source = 0', '3:18: error: 0 is not a limit: max_per_source is 1 to '),
    ('listen = "tcp:7"\n[limits]\nrate = "0/1s"', '"off" for no limit'),
    ('listen = "tcp:7"\n[limits]\nuser = "www"', "3:1: error: `user` stands below a table header"),
    ('listen = "tcp:7"\nmax_connections = 5', "2:1: error: `max_connections` is a key of [limits]: write it below"),
    ('listen = "tcp:7"\nmode = "0600"', "2:1: error: `mode` is a key of [[socket]]"),
    ('[[socket]]\nlisten = "tcp:7"\nmode = "0600"', "3:1: error: `mode` means nothing for tcp:7"),
    ('[[socket]]\nname = "x"', "1:3: error: this [[socket]] has no `listen`"),
    ('[[socket]]\nlisten = "tcp:7"\nname = "a:b"', "3:8: error: 'a:b' cannot be a name in LISTEN_FDNAMES"),  # O3
    ('[[socket]]\nlisten = "tcp:7"\nprotocol = "udplite"', '"udplite" goes with udp:'),
    ('[[socket]]\nlisten = "tcp:7"\nproxy_protocol = 1', "3:18: error: 1 is not a value of `proxy_protocol`"),
    ('[[socket]]\nlisten = "tcp:7"\nproxy_protocol = true', "3:1: error: `proxy_protocol` needs `proxy_trusted`"),
    ('[[socket]]\nlisten = "tcp:7"\nproxy_protocol = true\nproxy_trusted = []', "3:1: error: `proxy_protocol` needs"),
    ('[[socket]]\nlisten = "unix:/x"\nproxy_protocol = true\nproxy_trusted = []', "3:1: error: `proxy_protocol` needs"),
    ('[[socket]]\nlisten = "fd:x"\nproxy_protocol = "optional"', "3:1: error: `proxy_protocol` needs `proxy_trusted`"),
    ('[[socket]]\nlisten = "tcp:7"\nproxy_trusted = ["::1"]', "3:1: error: `proxy_trusted` goes with `proxy_protocol`"),
    (PROXIED + 'proxy_trusted = ["::1", "user:root"]', "4:25: error: 'user:root' tells nobody apart"),
    (PROXIED + 'proxy_trusted = [".example.org"]', "4:18: error: '.example.org' tells nobody apart"),
    (PROXIED.replace("tcp:7", "unix:/x") + 'proxy_trusted = ["::1"]', "tells nobody apart who connects to unix:/x"),
    (PROXIED + 'proxy_trusted = ["::1"]\nprotocol = "sctp"', "3:1: error: `proxy_protocol` means nothing for SCTP"),
    (PROXIED.replace("tcp:7", "udp:7"), "3:1: error: `proxy_protocol` means nothing for udp:7"),
    (PROXIED.replace("tcp:7", "vsock:7"), "3:1: error: `proxy_protocol` means nothing for vsock:"),
    ('run = "on-demand"\n' + PROXIED + 'proxy_trusted = ["::1"]', "4:1: error: `proxy_protocol` means nothing"),
    ('run = "always-on"\n' + PROXIED + 'proxy_trusted = ["::1"]', 'means nothing with run = "always-on"'),
    ('socket = 5', "1:10: error: `socket` is not a list of tables: write [[socket]]"),
    ('limits = 5', "1:10: error: 5 is not a table: write [limits]"),
    ('listen = 7007', '1:10: error: 7007 is not an address: write "tcp:7007"'),
    ('listen = ["tcp:7", "tcp:79x"]', "1:20: error: cannot parse address 'tcp:79x'"),
    ('listen = "unix:/${port}"', "known only at run time"),
    ('cwd = "srv"', "1:7: error: 'srv' is not an absolute path"),
    ('umask = 22', '1:9: error: 22 is not a mode: write the string "0022"'),
    ('enabled = "yes"', "1:11: error: 'yes' is not a bool: write true"),
    ('stop_timeout = -1', "1:16: error: -1 is not a duration"),
    ('stop_timeout = nan', "nan is not a duration"),
    ('stop_timeout = "0s"', "is too small: stop_timeout is at least 1ms"),
    ('stop_timeout = 10', '10 has no unit: write "10s"'),
    ('stderr = "/var/log/x"', 'write "file:/var/log/x"'),
    ('ready = "fd:2"', "not a file descriptor for readiness: write \"fd:3\" or higher"),
    ('run = "always-on"\nlisten = ["tcp:7", "tcp:9"]\nready = "fd:4"', "they stand at 3 to 4: write \"fd:5\""),
    ('run = "always-on"\nfdstore = 2\nready = "fd:4"', "fd 4 is a socket's or a stored one's: they stand at 3 to 4"),
    ('[health]\ncheck = "http://127.0.0.1"\nevery = "0s"', "is too small: every is at least 1ms"),
    ('ready = "redy"', 'it is "start", "notify", "fd:N", "log:REGEX"'),
    ('ready = "log:("', "not a regular expression"),
    ('ready = "connect:udp:53"', "nobody can connect to udp:53"),
    ('ready = "http://"', "is not a URL"),
    ('requires = ["a b"]', "is not a name of a service"),
    ('start_pre = ["/bin/cat", "-x"]', "`start_pre` is a list of commands, and this is none"),
    ('stop_post = "/nowhere/program"', "there is no program '/nowhere/program'"),
    ('fdstore = -1', "fdstore is 0 to 4096"),
    ('[health]\nevery = "1s"', "[health] has no `check`"),
    ('[health]\ncheck = "notify"', "is not a value of `check`"),
    ('listen = "tcp:7"\n[access]\nallow = ["10.0.0.0/33"]', "3:10: error: '10.0.0.0/33' is not a network"),  # A10
    ('listen = "tcp:7"\n[access]\nallow = ["10.0.0.1/8"]', 'bits set below its mask: write "10.0.0.0/8"'),
    ('listen = "tcp:7"\n[access]\nallow = ["localhost"]', "'localhost' is not a network"),  # A9
    ('listen = "tcp:7"\n[access]\ndeny = ["user:nosuch"]', "there is no user 'nosuch' on this machine"),
    ('listen = "tcp:7"\n[access]\nhours = ["Mon-Fry 08:00-18:00"]', "'Mon-Fry' is not a day"),
    ('listen = "tcp:7"\n[access]\nhours = ["08:00-25:00"]', "a day goes from 00:00 to 24:00"),
    ('listen = "tcp:7"\nrun = "on-demand"\n[access]\nallow = ["10.0.0.1"]', "[access] cannot be kept"),
    ('listen = "udp:7"\n[access]\nallow = [".example.org"]', "names of hosts come too late for datagrams"),
    ('listen = "unix-dgram:/run/x"\n[access]\nallow = ["user:www"]', "[access] cannot be kept"),
    ('listen = "tcp:7"\n[limits]\nmax_load = "high"', "'high' is not a number: write 4.0"),
    ('[cgroup]\nmemory_max = 64', "2:14: error: 64 is too small: memory_max is at least 65536 (\"off\" for no limit)"),
    ('[cgroup]\nmemory_max = "64MB"', 'write "64M"'),
    ('[cgroup]\npids_max = 0', 'pids_max is 1 to 4194304, or "off"'),
    ('[cgroup]\ncpu_max = 50', 'write "50%" of one CPU'),
    ('[sandbox]\nchroot = "/srv"', "there is no program '/bin/cat' below /srv"),
    ('[sandbox]\ncapabilities = ["NET_BIND"]', "there is no capability 'NET_BIND'"),
    ('[sandbox]\ncapabilities = []\nambient_capabilities = ["CAP_CHOWN"]', "'CHOWN' is not among `capabilities`"),
    ('[scheduling]\nnice = 20', "2:8: error: 20 is too large: nice is -20 to 19"),
    ('[scheduling]\nnice = true', "true is not an integer: nice is an integer of -20 to 19"),  # K13
    ('[rlimit]\nnofile = -1', "-1 is not a limit"),
    ('[rlimit]\nnofile = [5, 1]', "the soft limit 5 is above the hard limit 1"),
    ('[rlimit]\nnofiles = 5', "2:1: error: unknown key `nofiles` in [rlimit]: did you mean `nofile`?"),
    ("proxy_protocl = true", "1:1: error: unknown key `proxy_protocl`: did you mean `proxy_protocol` of [[socket]]?"),
    ("memry_max = 1", "1:1: error: unknown key `memry_max`: did you mean `memory_max` of [cgroup]?"),
    ('success_status = [256]', "1:19: error: 256 is not an exit status"),
    ('stop_signal = 15', 'write the name of the signal, "TERM"'),
    ('restart = "alway"', 'did you mean "always"?'),
    ('pass_environment = ["LISTEN_FDS"]', "1:21: error: LISTEN_FDS is set by superd itself"),
    ('pass_environment = "HOME"', 'write ["HOME"]'),
    ('description = "a\\nb"', "contains a control character or a line end"),
    ('environment.PORT = 5', "1:20: error: 5 is not a string"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_wrong(text: str, said: str) -> None:
    assert said in only_problem(text)


def test_no_proxy_in_front_of_tcpmux() -> None:
    """The services behind it would take the proxy for their client."""
    text = 'builtin = "{}"\n' + PROXIED + 'proxy_trusted = ["::1"]'
    _, problems = load_all({"mux.toml": text.format("tcpmux")})
    assert [(p.code, p.line) for p in problems] == [("other-mode", 4)]
    snapshot, problems = load_all({"echo.toml": text.format("echo")})
    (socket,) = snapshot.services["echo"].sockets
    assert not problems and socket.proxy_protocol is True and [rule.text for rule in socket.proxy_trusted] == ["::1"]


# K12: what people write. The right key is named, or the key is refused.
TYPOS = {
    "usr": "user", "User": "user", "uid": "user", "grp": "group", "comand": "command", "cmd": "command",
    "exec": "command", "server": "command", "lisen": "listen", "port": "listen", "bind": "listen", "env": "environment",
    "enviroment": "environment", "descripton": "description", "enable": "enabled", "disable": "enabled", "wait": "run",
    "mode_": None, "working-directory": "cwd", "chdir": "cwd", "umaks": "umask", "restart-delay": "restart_delay",
    "stopsignal": "stop_signal", "stop-timeout": "stop_timeout", "autorestart": "restart", "limit": "limits",
    "sockets": "socket", "passenv": "pass_environment", "kill-mode": "kill_mode", "zzz": None,
}  # fmt: skip


@pytest.mark.parametrize(("typo", "key"), TYPOS.items())
def test_unknown_keys_are_errors_with_a_suggestion(typo: str, key: str | None) -> None:
    (line,) = complaints(f'{BOTH}{typo} = "www"\n')
    assert line.startswith(f"3:1: error: unknown key `{typo}`")
    assert line.endswith(f"did you mean `{key}`?") == (key is not None)


def test_all_problems_of_all_files_at_once() -> None:
    # K10: and the good ones run
    good = {f"s{n}.toml": f'{CAT}listen = "tcp:{n}"' for n in range(1, 50)}
    bad = 'listen = "tcp:79x"\ncommand = 5\nusr = "x"\n[limits]\nrate = 5\n'
    snapshot, problems = load_all({**good, "bad.toml": bad, "worse.toml": "a = "})
    assert len(snapshot.services) == 49 and set(snapshot.broken) == {"bad", "worse"}
    assert [(p.path[7:], p.line, p.column) for p in problems] == [
        ("bad.toml", 1, 10), ("bad.toml", 2, 11), ("bad.toml", 3, 1), ("bad.toml", 5, 8), ("worse.toml", 1, 4),
    ]  # fmt: skip


# -- texts that are no TOML, or too much of it


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "file is empty"),
        (b"# nothing\n", "file is empty"),
        (b'command = ["/bin/ca', "1:20: error: cannot parse: unterminated string"),
        (b'a = 1\ncommand = "/bin/ca\n', "2:19: error: cannot parse: unterminated string"),
        (b"\xef\xbb\xbf" + BOTH.encode(), "byte order mark at byte 0"),  # K14
        (BOTH.encode("utf-16"), "UTF-16"),  # K14
        (b'command = "caf\xe9"', "not UTF-8 at byte 14 (0xe9)"),  # K14
        (b'command = "a\0"', "NUL at byte 12"),
        (b'command = "a"\rlisten = "tcp:7"\n', "carriage return at byte 13"),
        (b"a = " + b"[" * 500, "more than 16 levels of nesting"),  # F14 H9
        (b"a = " + b"[" * 100_000, "more than 16 levels of nesting"),  # F14
        (b"a = " + b"{a=" * 5000, "more than 16 levels of nesting"),
        (b".".join([b"a"] * 5000) + b" = 1", "more than 16 levels of nesting"),
        (b"[" + b".".join([b"a"] * 5000) + b"]", "more than 16 levels of nesting"),
        (b"a = " + b"1" * 5000, "cannot parse"),  # F14
        (b"\n".join(b"k%d=1" % n for n in range(100_000)), "more than 1000 keys"),
        (b"#" * (1 << 20) + b"#", "1048577 bytes, and 1048576 are allowed"),
        (b'listen = "tcp:7"\nlisten = "tcp:8"', "2:1: error: `listen` is there twice"),
        (b"[limits]\nrate = 1\n[limits]\n", "3:2: error: `limits` is there twice"),
        (b"\xff\xfea", "UTF-16"),
        (b"a = 1979-99-99", "cannot parse"),
        (b"= 1", "1:1: error: cannot parse"),
        (b'a = "' + b'\\"' * 500_000, "unterminated string"),  # in linear time
    ],
)
def test_no_toml(data: bytes, said: str) -> None:
    found = complaints(data)
    assert len(found) == 1 and said in found[0]


def test_lists_of_floats_are_not_nested() -> None:
    numbers = ", ".join(["1.5"] * 2000)
    assert "is not an integer" not in complaints(f"{BOTH}success_status = [{numbers}]\n")[0]
    assert "1.5 is not an exit status" in complaints(f"{BOTH}success_status = [{numbers}]\n")[0]


def test_crlf_is_accepted_and_positions_are_right() -> None:
    assert service(BOTH.replace("\n", "\r\n")) == service(BOTH)
    assert complaints(f"{BOTH}usr = 1\n".replace("\n", "\r\n"))[0].startswith("3:1: ")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("x.y = 5\n", (1, 1, 3)),
        ('a = """\n[limits]\nrate = 5\n"""\n', (1, 1, 1)),
        ("environment = { A = \"a\", 'b c' = 5 }", (1, 34, 1)),
        ('environment = { A = "a", "b\\tc" = "5" }', (1, 35, 3)),
        ('groups = [ # x\n  "www", [1],\n]', (2, 10, 3)),
        ('[[socket]]\nlisten = "tcp:1"\n[[socket]]\nlisten = "tcp:x" # [', (4, 10, 7)),
        ('[[socket]]\nlisten="tcp:1"\n[socket.keep_alive]\ncount = 0', (4, 9, 1)),
        ('\t cwd\t=\t"x"', (1, 9, 3)),
        ("\"cwd\" = 'x'", (1, 9, 3)),
        ("ready_timeout = 1979-05-27T07:32:00.5Z", (1, 17, 22)),
        ("limits.rate = 1.5", (1, 15, 3)),
        ('umask = "ää"; cwd', (1, 13, 1)),
    ],
)
def test_positions(text: str, place: tuple[int, int, int]) -> None:
    _, problems = load_all({"git.toml": text, "git.toml.d/x.toml": CAT})
    assert place in [(p.line, p.column, p.width) for p in problems], problems


# -- everything else


def test_the_form_of_problems() -> None:
    _, problems = load_all({"git.toml": 'command = "/bin/cat"\ndescripton = "Git"\n'})
    assert format_problems(problems) == (
        "error[unknown-key]: unknown key `descripton`\n"
        " --> conf.d/git.toml:2:1\n"
        "  |\n"
        '2 | descripton = "Git"\n'
        "  | ^^^^^^^^^^ did you mean `description`?\n\n"
    )
    assert format_problems(problems, "github") == (
        "::error file=conf.d/git.toml,line=2,col=1,endColumn=11,title=unknown-key::"
        "unknown key `descripton`: did you mean `description`?\n"
    )


def test_shown_lines_are_safe_and_short() -> None:
    _, problems = load_all({"git.toml": f'{CAT}\t"日本\\u001b" = "{"x" * 500}" # \u202e\n'})
    full = format_problems(problems)
    assert max(map(len, full.splitlines())) < 200 and "\u202e" not in full and "\x1b" not in full
    shown, carets = full.splitlines()[3:5]
    assert carets.index("^") == shown.index('"') and carets.count("^") == len('"日本\\u001b"') + 2  # two are wide


def test_nothing_is_changed_by_loading() -> None:
    files = sources({"superd.toml": '[defaults.environment]\nA = "1"\n', "a.toml": BOTH, "b.toml": CAT})
    first = load(files, machine=FakeMachine(), environ={}, is_root=True)
    assert load(files, machine=FakeMachine(), environ={}, is_root=True) == first


SEEDS = [
    "", BOTH, "[[a]]\n[[a.b]]\nc=1\n[a.d]",
    '[[socket]]\nlisten = "tcp:1"\n', 'a = """x"""\n[b.c]\n"d e" = {f = [1, {}]}',
]  # fmt: skip
TOMLISH = st.lists(
    st.sampled_from(["[", "]", "{", "}", "=", ".", ",", '"', "'", '"""', "\n", "a", "listen", "limits", "5", " ", "#"])
).map("".join)


@settings(max_examples=300)
@given(st.sampled_from(SEEDS), TOMLISH | st.text(), st.binary(max_size=5))
@example("", "[[socket]]\n[socket.a]\n[[socket.a.b]]\n", b"")
def test_no_bytes_crash_the_loader(seed: str, text: str, noise: bytes) -> None:
    for data in (f"{seed}\n{text}".encode(errors="surrogatepass"), text.encode(errors="surrogatepass") + noise):
        snapshot, problems = load_all({"git.toml": data, "superd.toml": data})
        assert ("git" in snapshot.services) != ("git" in snapshot.broken)
        for style in ("full", "short", "json", "github"):
            format_problems(problems, style)


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(st.characters(codec="utf-8"), max_size=5)
    | st.sampled_from(["${", "${port}", "tcp:7", "unix:/x", "1s", "off", "root", "always-on", "stdio"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(sorted(BY_TABLE["socket"])), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ANY_KEY = st.sampled_from(sorted({name for table in BY_TABLE.values() for name in table}))


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(char):08x}" for char in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return str(value)


@settings(max_examples=400)
@given(st.dictionaries(ANY_KEY, VALUES, max_size=6), st.booleans())
def test_no_values_crash_the_loader(tree: dict[str, object], is_root: bool) -> None:
    text = "".join(f"{key} = {toml(value)}\n" for key, value in tree.items())
    snapshot, problems = load_all({"git.toml": text}, is_root=is_root)
    assert ("git" in snapshot.services) != ("git" in snapshot.broken)
    assert all(p.line for p in problems if p.code not in ("missing-key", "empty"))


def test_a_disabled_service_may_want_what_cannot_be_had_here() -> None:  # E9
    """It keeps what it asked for, so that starting it by hand fails instead of running it as somebody else."""
    disabled = service(BOTH + 'user = "root"\nenabled = false\n', is_root=False)
    assert disabled.context.user == "root"
    assert complaints(BOTH + 'user = "root"\n', is_root=False)
