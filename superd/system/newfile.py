"""Writes a small file so that a reader finds the old one, the new one or none, and never half of one."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress


def put_file(directory: str, name: str, data: bytes, *, replace: bool) -> None:
    """DIRECTORY/NAME with mode 0644. The directory is made if it is missing; the one above it has to be there.

    No link is followed, neither at the directory nor at the file (FAILURES D2). As root nothing is written where
    others may write. Raises OSError; FileExistsError if there is something at NAME and `replace` does not allow it.
    """
    with suppress(FileExistsError):
        os.mkdir(directory, 0o755)
    where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(where)
        if os.geteuid() == 0 and (facts.st_uid != 0 or facts.st_mode & 0o022):
            raise PermissionError(errno.EPERM, "the directory is not root's alone", directory)
        fresh = f".{name}.{secrets.token_hex(8)}"  # names with a dot in front are passed over
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=where)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(fd, 0o644)
                os.fsync(fd)
            if replace:
                os.rename(fresh, name, src_dir_fd=where, dst_dir_fd=where)
            else:
                os.link(fresh, name, src_dir_fd=where, dst_dir_fd=where, follow_symlinks=False)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=where)
        os.fsync(where)
    finally:
        os.close(where)
