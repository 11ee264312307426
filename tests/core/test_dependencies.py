"""core/dependencies.py: what is wrong between services, at which place, and the order that is left."""

from __future__ import annotations

import random
import time

from superd.core.dependencies import Graph, check
from superd.core.machine import FileFacts
from superd.core.problems import Problem, format_problems
from superd.core.schema import SourceFile, load
from superd.core.spec import ServiceSpec, Snapshot


class Machine:
    """Everybody is there, and every program."""

    uid = gid = 0

    def port_of(self, name: str, protocol: str) -> int | None:
        return None

    def user(self, user: str | int) -> tuple[int, int] | None:
        return 0, 0

    def group(self, group: str | int) -> int | None:
        return 0

    def absolute(self, path: str) -> str:
        return f"/work/{path}"

    def file(self, path: str) -> FileFacts | None:
        return FileFacts("file", True, b"\x7fELF\0")

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        return None


def sources(files: dict[str, str]) -> list[SourceFile]:
    return [SourceFile(f"conf.d/{name}", text.encode(), "service", name[:-5]) for name, text in files.items()]


def spec(name: str, **fields: object) -> ServiceSpec:
    lists = {key: tuple(str(value).split()) for key, value in fields.items() if key != "enabled"}
    enabled = bool(fields.get("enabled", True))
    return ServiceSpec(name, f"{name}.toml", ("/bin/cat",), "always-on", "stdio", enabled=enabled, **lists)  # type: ignore[arg-type]


def services(*specs: ServiceSpec) -> dict[str, ServiceSpec]:
    return {one.name: one for one in specs}


def read(**files: str) -> tuple[Snapshot, list[Problem]]:
    texts = {f"{name.replace('_at', '@')}.toml": f'command = "/bin/cat"\n{text}\n' for name, text in files.items()}
    return load(sources(texts), machine=Machine(), environ={}, is_root=True)


def short(problems: list[Problem]) -> list[str]:
    return format_problems(problems, "short").splitlines()


def test_missing_names_stand_where_they_are_written() -> None:
    snapshot, problems = read(
        redis="", web='description = "x"\nrequires = ["redis", "rediz"]', other='after = ["redis"]', w='wants = ["nix"]'
    )
    assert short(problems) == [
        "conf.d/web.toml:3:22: error: there is no service 'rediz': did you mean 'redis'?",
        "conf.d/w.toml:2:10: warning: there is no service 'nix'",
    ]
    assert list(snapshot.services) == ["redis", "other", "w"] and list(snapshot.broken) == ["web"]
    assert "rediz" in snapshot.broken["web"]


def test_instances_and_expansion() -> None:
    snapshot, problems = read(
        worker_at='instances = ["a", "b"]\nrequires = ["db-${instance}"]',
        **{"db-a": "", "db-b": ""}, web='requires = ["worker@a", "worker@a"]', bad='requires = ["worker@c"]',
    )  # fmt: skip
    assert list(snapshot.broken) == ["bad"], short(problems)
    assert snapshot.services["worker@b"].requires == ("db-b",)
    assert short(problems) == ["conf.d/bad.toml:2:13: error: there is no service 'worker@c': did you mean 'worker@b'?"]


def test_cycle_is_printed_in_full_at_each_of_its_services() -> None:
    snapshot, problems = read(
        a='requires = ["b"]', b='after = ["x", "c"]', c='requires = ["a"]', x="", d='requires = ["a"]\nwants = ["c"]'
    )
    text = "dependency cycle: a requires b, b is after c, c requires a"
    assert short(problems) == [
        f"conf.d/a.toml:2:13: error: {text}",
        f"conf.d/b.toml:2:15: error: {text}",
        f"conf.d/c.toml:2:13: error: {text}",
        "conf.d/d.toml:2:13: warning: requires 'a', which has bad config: it waits until that is repaired",
    ]
    assert list(snapshot.services) == ["x", "d"]


def test_no_cycle() -> None:
    """What is pulled in may come afterwards, and two may want each other."""
    assert not check(services(spec("a", wants="b"), spec("b", wants="a", after="a")), ())
    assert not check(services(spec("a", part_of="b"), spec("b", wants="a")), ())


def test_two_cycles_that_meet() -> None:
    found = check(services(spec("a", requires="b c"), spec("b", after="a"), spec("c", after="a")), ())
    assert [(fault.service, fault.name) for fault in found] == [("a", "b"), ("b", "a"), ("c", "a"), ("a", "c")]


def test_disabled_and_broken() -> None:
    snapshot, problems = read(
        off="enabled = false", web='requires = ["off"]', soft='wants = ["off"]\nafter = ["off"]',
        both_off='enabled = false\nrequires = ["off"]', wrong="nonsense = 1", needs='requires = ["wrong"]',
    )  # fmt: skip
    assert set(snapshot.broken) == {"web", "wrong"}
    said = [line for line in short(problems) if "nonsense" not in line]
    assert said == [
        "conf.d/web.toml:2:13: error: requires 'off', which is disabled in conf.d/off.toml: "
        "enable 'off', or disable this too",
        "conf.d/needs.toml:2:13: warning: requires 'wrong', which has bad config: it waits until that is repaired",
    ]


def test_conflicts() -> None:
    _, problems = read(a='conflicts = ["b"]', b='conflicts = ["a"]', c='conflicts = ["d"]', d="enabled = false")
    assert short(problems) == [
        "conf.d/a.toml:2:14: warning: conflicts with 'b', and both are enabled: at start-up only 'a' runs"
    ]
    (fault,) = check(services(spec("a", requires="b", conflicts="b"), spec("b", enabled=False)), ())[:1]
    assert fault.message.startswith("requires 'b', which is disabled")
    assert Graph(services(spec("a", conflicts="b"), spec("b"))).rivals == {"a": ["b"], "b": ["a"]}


def test_idle_timeout_where_nothing_tells_of_use() -> None:
    _, problems = read(v='run = "on-demand"\nlisten = "vsock:*:7"\nidle_timeout = "1m"')
    assert short(problems) == ["conf.d/v.toml:4:1: error: `idle_timeout`: nothing tells whether vsock sockets are used"]


def test_order() -> None:
    graph = Graph(services(spec("a", requires="c"), spec("b"), spec("c", after="d x"), spec("d"), spec("e", wants="a")))
    assert graph.in_order("abcde") == ["b", "d", "c", "a", "e"]
    assert graph.in_order("ac", reverse=True) == ["a", "c"]
    assert graph.pulled_in("e") == {"e", "a", "c"} and graph.torn_down("c") == {"c", "a"}
    assert "b" not in graph.linked() and {"c", "d"} <= graph.linked()
    circle = Graph(services(spec("a", requires="b"), spec("b", requires="a"), spec("c", requires="b")))
    assert sorted(circle.rank) == ["a", "b", "c"]


def test_any_order_puts_what_is_required_first() -> None:
    dice = random.Random(4)
    for _ in range(50):
        names = [f"s{number}" for number in range(30)]
        hidden = {name: number for number, name in enumerate(dice.sample(names, len(names)))}
        specs = {}
        for name in names:
            before = [other for other in names if hidden[other] < hidden[name] and dice.random() < 0.1]
            specs[name] = spec(name, requires=" ".join(before[::2]), after=" ".join(before[1::2]))
        rank = Graph(specs).rank
        assert not check(specs, ())
        assert sorted(rank.values()) == list(range(30))
        assert all(rank[other] < rank[name] for name, one in specs.items() for other in one.requires + one.after)


def test_ten_thousand_services() -> None:
    """A chain, a ring and a star, each read from files within 5 s; FAILURES, structural limits."""
    count = 10_000
    names = [f"s{number}" for number in range(count)]
    shapes = {
        "chain": lambda number: f"after = ['s{number + 1}']" if number + 1 < count else "",
        "ring": lambda number: f"requires = ['s{(number + 1) % count}']",
        "star": lambda number: "requires = ['s0']" if number else "after = ['s1']",
    }
    for shape, text in shapes.items():
        files = sources({f"{name}.toml": f'command = "/bin/cat"\n{text(at)}\n' for at, name in enumerate(names)})
        began = time.process_time()
        snapshot, problems = load(files, machine=Machine(), environ={}, is_root=True)
        graph = Graph(snapshot.services)
        took_s = time.process_time() - began
        assert took_s < 5, f"{shape}: {took_s:.1f} s"
        assert sum(len(problem.message) for problem in problems) < 3_000_000
        if shape == "chain":
            assert not problems and graph.rank["s0"] == count - 1
            assert len(graph.pulled_in("s0")) == 1 and len(graph.followers) == count - 1
        elif shape == "ring":
            assert len(problems) == count and problems[0].message.count("requires") == count
        else:
            assert {problem.path for problem in problems if problem.is_error} >= {"conf.d/s0.toml", "conf.d/s1.toml"}
