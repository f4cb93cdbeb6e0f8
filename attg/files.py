"""
Files written whole or not at all, and by one run at a time; checksums, sheets of
pictures, tables of results.
"""

import contextlib
import hashlib
import os
import socket
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def require(condition, message):
    """ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def sha256(path):
    """The checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path):
    """
    A temporary path that takes the place of `path` when the block ends well: all or
    nothing, even if killed.
    """
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        # Without fsync a power cut can leave the new name with none of the content.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, what, patience=0):
    """Keeps others from what a lock file stands for while the block runs.

    ValueError if another process holds it and does not let go within `patience` seconds;
    `what` and the holder are named. The lock is a process's own: it ends with it, however
    that ends, and forked workers do not inherit it. Where a file system knows no locks,
    as some that machines share do not, and on Windows, a warning says that nothing keeps
    two runs apart.
    """
    path = Path(path)
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = take_lock(path, what, time.monotonic() + patience)
    except OSError as error:
        raise OSError(
            f"{what}: cannot be written ({error}); name another place"
        ) from error
    try:
        yield
    finally:
        # While it is held: whoever waits sees that the file is gone, and makes another.
        # Windows removes no file that is open, and there none is held.
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        if made:
            # Nothing was written.
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def take_lock(path, what, until):
    """The lock file, open, once this process holds it; see locked."""
    while True:
        file = open(path, "a+")
        try:
            if fcntl is None:
                raise OSError("no locks on this system")
            # Not flock, whose locks forked workers keep.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            require(
                time.monotonic() < until,
                f"{what}: {holder} is writing there; wait until it has ended, or name "
                "another place",
            )
            time.sleep(0.1)
            continue
        except OSError as error:
            words = f"{what}: nothing keeps a second run from writing there ({error})"
            print(words, file=sys.stderr)
            return file
        # The one that held it may have removed the file in between.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()
