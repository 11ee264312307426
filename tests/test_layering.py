"""Imports point down only, and each layer uses only what it may: the `ast` of every file is walked.

cli -> manager -> system -> core        keeper, spawner -> system -> core
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a layer may import from superd, besides itself and the package's own docstring and version.
MAY_IMPORT = {
    "core": set(),
    "system": {"core"},
    "init": {"core", "system"},
    "keeper": {"core", "system", "init", "spawner"},
    "spawner": {"core", "system", "handler"},
    "handler": set(),
    "testing": {"core"},
    "pytest_plugin": {"testing"},
    "manager": {"core", "system"},
    "importers": {"core"},
    # The command line starts the manager only by way of the keeper, so it never imports it.
    "cli": {"core", "system", "keeper", "init", "importers"},
}

ROLES = {"keeper", "spawner", "manager"}

# The keeper forks the other roles without exec, so that they share its pages: it has to import their code. The
# manager's in the forked child only: at module level that would put trio into the process that must not fail.
LAZY = {("superd.keeper", name) for name in ("superd.manager", "superd.manager.main")}

THIRD_PARTY = {
    "core": {"tomli"},  # see test_tomli_is_for_the_loader
    "system": set(),
    "init": set(),
    "keeper": set(),
    "spawner": set(),
    "handler": set(),
    "testing": set(),
    "pytest_plugin": {"pytest"},
    "manager": {"trio", "outcome", "psutil"},
    "importers": set(),
    "cli": {"psutil"},
}

# Of the standard library: the manager alone logs, nobody uses a second event loop, core does no I/O and has no clock.
FORBIDDEN = {
    "core": {"asyncio", "logging", "select", "selectors", "subprocess", "syslog", "threading"},
    "manager": {"asyncio", "multiprocessing"},
}
# The rest of `time` makes text of times that somebody else has read.
CLOCKS = {name + unit for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime")
          for unit in ("", "_ns")} | {"sleep"}  # fmt: skip
NOT_ELSEWHERE = {"asyncio", "logging", "multiprocessing", "syslog"}

FIREWALL = "superd.manager.supervisor"  # the one place where any exception of one service is caught


@dataclass(frozen=True)
class Import:
    module: str  # absolute, the deepest module that is named
    line: int
    lazy: bool  # inside a function
    typing_only: bool  # below `if TYPE_CHECKING:`


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def layer(self) -> str:
        """ "core", "keeper", …; "" for the package itself."""
        return layer_of(self.name)

    def __str__(self) -> str:
        return str(self.path)


def layer_of(name: str) -> str:
    layer = [*name.split("."), ""][1]
    return "cli" if layer == "__main__" else layer


def load(package: Path) -> dict[str, Module]:
    """Every module below `package` by dotted name."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return modules


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """Each import of `module`; `from superd.core import spec` counts as superd.core.spec if that is a module."""

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in known else base, node.lineno, lazy, typing_only)
        else:
            lazy |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            orelse = set(map(id, node.orelse)) if isinstance(node, ast.If) else set()
            for child in ast.iter_child_nodes(node):
                yield from walk(child, lazy, typing_only or (guard and id(child) not in orelse))

    yield from walk(module.tree, False, False)


def absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".")
    if module.path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def complaints(package: Path) -> list[str]:
    """Everything that breaks a rule, as `FILE:LINE: what`."""
    known = load(package)
    found = []
    for module in known.values():
        for item in imports(module, known):
            if why := wrong_import(module, item):
                found.append(f"{module.path}:{item.line}: {why}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.AsyncFunctionDef) and module.layer != "manager":
                found.append(f"{module.path}:{node.lineno}: `async def {node.name}` outside manager/")
            if module.layer == "core" and isinstance(node, ast.expr | ast.stmt) and (clock := reads_clock(node)):
                found.append(f"{module.path}:{node.lineno}: core has no clock: time.{clock}")
            if isinstance(node, ast.Try | ast.TryStar) and module.name != FIREWALL:
                found += [
                    f"{module.path}:{handler.lineno}: `except Exception` outside {FIREWALL}"
                    for handler in node.handlers
                    if catches_all(handler) and not goes_on_up(handler.body) and not goes_on_up(node.finalbody)
                ]
    found += heavy_roles(known)
    return found


def wrong_import(module: Module, item: Import) -> str | None:
    top = item.module.partition(".")[0]
    mine, theirs = module.layer, layer_of(item.module)
    if top == "superd":
        if not theirs or (item.typing_only and module.name == "superd"):
            return None
        if mine == theirs:
            siblings = mine == "system" and item.module not in ("superd.system", module.name)
            return f"system/ modules do not import each other: {item.module}" if siblings else None
        if item.typing_only and {mine, theirs} <= ROLES:
            return None  # what one role says to another; no code comes with it
        if (module.name, item.module) in LAZY:
            return None if item.lazy or item.typing_only else f"{item.module} only inside the forked child's function"
        if not mine or theirs not in MAY_IMPORT[mine]:
            return f"{mine or 'superd'} may not import {item.module}"
        return None
    if top in sys.stdlib_module_names:
        return f"{mine} may not import {top}" if top in FORBIDDEN.get(mine, NOT_ELSEWHERE) else None
    return None if top in THIRD_PARTY.get(mine, set()) else f"{mine or 'superd'} may not import {item.module}"


def catches_all(node: ast.ExceptHandler) -> bool:
    """`except:`, `except Exception`, `except BaseException`, alone or in a tuple."""
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(name is None or ast.unparse(name) in ("Exception", "BaseException") for name in caught)


def goes_on_up(body: list[ast.stmt]) -> bool:
    """It ends with a `raise`: clean-up, or a better word for it. Or with os._exit: a forked child, which must not
    return to its parent."""
    if not body:
        return False
    last = ast.unparse(body[-1])
    return last.split()[0] == "raise" or last.startswith("os._exit(")


def reads_clock(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
        return node.attr if node.attr in CLOCKS else None
    if isinstance(node, ast.ImportFrom) and node.module == "time":
        return next((alias.name for alias in node.names if alias.name in CLOCKS), None)
    return None


def heavy_roles(known: dict[str, Module]) -> Iterator[str]:
    """Third-party modules that the keeper or a spawner would load, by way of any module of superd."""
    for role in ("superd.keeper", "superd.spawner"):
        todo, seen = [role], {role: role}
        while todo:
            name = todo.pop()
            if name not in known:
                continue
            for item in imports(known[name], known):
                if item.typing_only or (name, item.module) in LAZY:
                    continue
                top = item.module.partition(".")[0]
                if top == "superd" and item.module not in seen:
                    seen[item.module] = f"{seen[name]} -> {item.module}"
                    todo.append(item.module)
                elif top != "superd" and top not in sys.stdlib_module_names:
                    yield f"{known[name].path}:{item.line}: {item.module} reaches {role}: {seen[name]}"


def test_layers() -> None:
    assert complaints(ROOT / "superd") == []


def test_tomli_is_for_the_loader() -> None:
    known = load(ROOT / "superd")
    users = {m.name for m in known.values() for i in imports(m, known) if i.module == "tomli"}
    assert users <= {"superd.core.schema"}


# Each rule can fail: a small tree that breaks it, and the words that must be said.
BROKEN = {
    "upward": ({"core/a.py": "from superd.system import sockets", "system/sockets.py": ""}, "core may not import"),
    "upward, relative": ({"core/a.py": "from ..manager import service", "manager/service.py": ""}, "core may not"),
    "upward, for types": (
        {"core/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import superd.cli.superd"},
        "core may not import",
    ),
    "sideways": ({"manager/a.py": "from superd.spawner import f", "spawner.py": ""}, "manager may not import"),
    "sibling": ({"system/a.py": "from superd.system import b", "system/b.py": ""}, "do not import each other"),
    "sibling, relative": ({"system/a.py": "from . import b", "system/b.py": ""}, "do not import each other"),
    "trio in system": ({"system/a.py": "import trio"}, "system may not import trio"),
    "trio in cli": ({"cli/superd.py": "def f():\n    import trio.lowlevel"}, "cli may not import trio"),
    "cli past the keeper": ({"cli/superd.py": "import superd.manager.main"}, "cli may not import superd.manager"),
    "third party in keeper": ({"keeper.py": "import psutil"}, "keeper may not import psutil"),
    "third party by a detour": (
        {"spawner.py": "import superd.core.schema", "core/schema.py": "import tomli"},
        "tomli reaches superd.spawner: superd.spawner -> superd.core.schema",
    ),
    "eager manager": ({"keeper.py": "import superd.manager.main"}, "only inside the forked child"),
    "a clock in core": ({"core/a.py": "from time import monotonic"}, "core has no clock: time.monotonic"),
    "a clock by its name": ({"core/a.py": "import time\ndef f(): return time.time()"}, "core has no clock: time.time"),
    "logging below the manager": ({"system/a.py": "import logging"}, "system may not import logging"),
    "async": ({"system/a.py": "async def f(): ..."}, "`async def f` outside manager/"),
    "firewall": ({"manager/a.py": "try: ...\nexcept (OSError, Exception): pass"}, "`except Exception` outside"),
    "bare except": ({"core/a.py": "try: ...\nexcept: pass"}, "`except Exception` outside"),
}
FINE = {
    "down": {"manager/a.py": "import trio\nfrom superd.system import b\nasync def f(): ...", "system/b.py": ""},
    "version": {"cli/a.py": "from superd import __version__", "__init__.py": "__version__ = '1'"},
    "a role's types": {"manager/a.py": "if TYPE_CHECKING:\n    from superd.keeper import Options", "keeper.py": ""},
    "python -m superd": {"__main__.py": "from superd.cli.superd import main", "cli/superd.py": ""},
    "forked child": {"keeper.py": "def run_manager():\n    from superd.manager.main import run\n    run()"},
    "the firewall": {"manager/supervisor.py": "try: ...\nexcept Exception: print()"},
    "clean-up": {"system/a.py": "try: ...\nexcept BaseException:\n    print()\n    raise"},
    "times as text": {"core/a.py": "import time\ntime.strftime('', time.gmtime(0))"},
    "forked child's end, finally": {
        "keeper.py": "import os\ntry: ...\nexcept BaseException:\n    print()\nfinally:\n    print()\n    os._exit(1)"
    },
    "forked child's end": {"system/a.py": "import os\ntry: ...\nexcept BaseException:\n    os._exit(1)"},
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "superd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root / "superd"


@pytest.mark.parametrize(("files", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_found(tmp_path: Path, files: dict[str, str], said: str) -> None:
    assert said in "\n".join(complaints(write(tmp_path, files)))


@pytest.mark.parametrize("files", FINE.values(), ids=FINE)
def test_what_is_allowed(tmp_path: Path, files: dict[str, str]) -> None:
    assert complaints(write(tmp_path, files)) == []


def test_neither_preexec_fn_nor_pdeathsig() -> None:  # F4 F5
    """The one deadlocks in a process with threads, the other follows the thread that has made the child."""
    files = (ROOT / "superd").rglob("*.py")
    assert [path for path in files if {"preexec_fn", "PDEATHSIG"} & set(re.findall(r"\w+", path.read_text()))] == []
