"""superd, the superserver: on traffic it starts services, supervises them and reaps them.

The map. Imports point down only (tests/test_layering.py holds that):

    cli/        command lines: superd.py; superctl.py and check.py, which import no trio
    manager/    role three, trio: the only code that awaits and the only code that logs
        main.py         takes what an earlier manager left, or reads the configuration, and runs
        supervisor.py   all services, signals, shutdown, the error boundary
        service.py      one service at run time; services that are started once
        activation.py   per-connection services: from a readable listener to a running process
        listeners.py    the sockets of a service; environment.py: its uid and environment file
        spawners.py     the spawners, as the manager sees them; keeperlink.py: the keeper
        stopping.py     which processes a service has, and how they are ended
        control.py      serves the control socket
        logs.py         lines and events -> records; watch.py: fds and timers -> callbacks
    keeper.py   role one: the process that is started; standard library only
    spawner.py  role two: starts children in one execution context; standard library only
    system/     system calls, sync, one concern per file, siblings do not import each other: sockets, queues (who
                waits in theirs), holders (who has a port), fdpass, notify, children, context, process, tree (what is
                below a process), configdir
    core/       values and rules: no I/O, no clock
        keys.py         the table of all keys; document.py, kinds.py, schema.py: files -> specs and problems, by it
        spec.py         what a service is; address.py, values.py, machine.py, problems.py: what that is made of
        admission.py    places, connections per source, rates -> Verdict
        lifecycle.py    states, events, effects; what an exit means
        plan.py         spec -> argv, environment, fd numbers
        messages.py     between the roles; varlink.py: control socket; records.py: log

    cli -> manager -> system -> core        keeper, spawner -> system -> core
"""

__version__ = "0.1.0"
