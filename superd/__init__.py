"""superd, the superserver: on traffic it starts services, supervises them and reaps them.

The map. Imports point down only (tests/test_layering.py holds that):

    cli/        command lines: superd.py, run.py; superctl.py, which imports no trio, with client.py and output.py, and
                what only some of its commands need: check, explain, show, new, enable, schema, importing, top,
                metrics.py (one HTTP exchange), page.py (its status page), completion; manual.py makes the key sections
                of superd.toml(5)
    manager/    role three, trio: the only code that awaits and the only code that logs
        main.py         takes what an earlier manager left, or reads the configuration, and runs
        supervisor.py   all services, signals, shutdown, the error boundary
        configuration.py  what is in force, and what is on disk; reload.py: carries out the difference
        service.py      one service at run time: what all run modes share
        activation.py   per-connection services: from a readable listener to a running process
        process.py      services that are one process; commands.py: what runs before and after it; traffic.py: what they
                        left unread
        readiness.py    when such a process is ready; health.py: whether it still is well; checks.py: one look at that
        notification.py what they say to their notify sockets; watchdog.py: how often they must; fdstore.py: the fds
                        that they store; mainprocess.py: one that they have named as their main process
        builtins.py     per-connection services that superd is itself; gate.py: clients that must wait for admission
        proxy.py        programs that listen by themselves: accepts for them, and carries the bytes
        tls.py          TLS in front of the services that want it; loaded with the first of them
        tcpmux.py       the builtin that hands its connections on to other services
        trial.py        what `superd run` adds: addresses on stdout, the bytes of connections in the log
        access.py       who may connect
        listeners.py    the sockets of a service; environment.py: its uid and environment file
        spawners.py     the spawners, as the manager sees them; keeperlink.py: the keeper
        dependencies.py who waits for whom, at a start and at a stop; idle.py: who is used by nobody
        overlap.py      another process beside the one that serves, to take over from it; upgrade.py: another superd
        stopping.py     which processes a service has, and how they are ended
        control.py      serves the control socket; queries.py: methods that look, views.py: what they show; orders.py:
                        methods that change something
        metrics.py      numbers for Prometheus and the status page; syslog.py: what services send to syslog(3)
        logs.py         lines and events -> records; watch.py: fds and timers -> callbacks
    importers/  files of inetd, xinetd, systemd, upstart, supervisord -> service files, and a service -> systemd units
    init.py     the main command, and superd as a plain init without services
    testing.py  a superd of one's own, for tests; pytest_plugin.py makes a fixture of it
    keeper.py   role one: the process that is started; standard library only
    spawner.py  role two: starts children in one execution context; standard library only
    handler.py  a Python handler inside a spawner: imported once, forked for each connection
    system/     system calls, sync, one concern per file, siblings do not import each other: sockets, peers (who
                has connected), queues (who waits in theirs), usage (whether anybody uses them), holders (who has a
                port), fdpass, notify, syslog, children, context, process, resources, terminal, tree (what is below a
                process), cgroup, configdir, inotify, newfile, succession (what a process leaves to itself across
                execve)
    core/       values and rules: no I/O, no clock
        keys.py         the table of all keys; document.py, kinds.py, reader.py, schema.py: files -> specs and problems,
                        by it; collision.py: sockets that exclude each other
        diff.py         what becomes of each service when one Snapshot follows another
        key_texts.py    what people read about keys; explanations.py: about states and errors; jsonschema.py: editors
        effective.py    specs and where each value was written -> TOML
        spec.py         what a service is; address.py, values.py, machine.py, problems.py: what that is made of
        admission.py    places, connections per source, rates -> Verdict
        proxyheader.py  bytes -> who the client of a proxy is
        lifecycle.py    states, events, effects; what an exit means
        dependencies.py which service needs which: order, and what is wrong with it
        plan.py         spec -> argv, environment, fd numbers
        messages.py     between the roles; varlink.py: control socket, interface.py: its methods; http.py: as a client;
                        records.py: log; toml.py: values -> TOML; syslog.py: RFC 3164; metrics.py: what is counted, and
                        its text

    cli -> manager -> system -> core        keeper, init, spawner -> system -> core        cli -> importers -> core
"""

__version__ = "0.1.0"
