"""Atomic writes, file locks and checksums."""

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


def sha256(path):
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path):
    """A temporary path that replaces `path` when the block ends without an error.

    Readers see the old file or the complete new one, even if the process is killed.
    """
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        # Without fsync, a power cut can leave the new name on an empty file.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, output, timeout=0):
    """Hold an exclusive lock file for the duration of the block.

    output: what the lock protects, for messages. Raises ValueError that names the holder
    if another process keeps the lock for `timeout` seconds. The lock ends with its
    process, however that ends. Without file locks (Windows, some network file systems)
    it only warns.
    """
    path = Path(path)
    is_new_folder = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = acquire_lock(path, output, time.monotonic() + timeout)
    except OSError as error:
        raise OSError(f"{output}: cannot write here ({error})") from error
    try:
        yield
    finally:
        # Removed while the lock is held: a waiting process notices and creates a new
        # file. Windows cannot remove an open file, and has no lock to hold.
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        if is_new_folder:
            # Succeeds only if nothing was written.
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def acquire_lock(path, output, deadline):
    """Open the lock file and lock it; see locked. deadline: of time.monotonic()."""
    while True:
        file = open(path, "a+")
        try:
            if fcntl is None:
                raise OSError("no file locks on this system")
            # Not flock: forked loader workers would inherit its locks.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{output}: {holder} is writing here; wait until it has ended, or "
                    "choose another path"
                ) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            print(f"{output}: not locked against other runs ({error})", file=sys.stderr)
            return file
        # The previous holder may have removed the file after this process opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()
