"""`superctl schema`: JSON Schema of a file, for editors."""

from __future__ import annotations

import json
import os
import sys

import superd
from superd.cli.failure import OK
from superd.core import jsonschema

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("service", "superd"), default="service", help="default: service")


def run(options: argparse.Namespace, connect: Callable[[], object]) -> int:
    make = jsonschema.service_schema if options.what == "service" else jsonschema.daemon_schema
    if not options.quiet:
        print(json.dumps(make(), indent=2))
    return OK


def installed_file(what: str) -> str | None:
    """Where the same text is as a file: in share/superd of the installation, or beside the package in a clone."""
    clone = os.path.dirname(os.path.dirname(os.path.abspath(superd.__file__)))
    for directory in (os.path.join(clone, "schema"), os.path.join(sys.prefix, "share/superd/schema")):
        path = os.path.join(directory, f"{what}.json")
        if os.path.isfile(path):
            return path
    return None
