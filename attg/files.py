"""Atomic writes, file locks and checksums."""

import contextlib
import errno
import hashlib
import os
import socket
import sys
import time
import warnings
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
def naming(path):
    """Add the path to errors such as "No space left on device", which name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_replaceable(path):
    """Whether there is a regular file of this name, or none."""
    return Path(path).is_file() or not Path(path).exists()


@contextlib.contextmanager
def replacing(path):
    """A temporary path that replaces `path` when the block ends without an error.

    Readers see the old file or the complete new one, even if the process is killed.
    Symbolic links are followed; ValueError for what is no regular file.
    """
    target = Path(os.path.realpath(path))
    if not is_replaceable(path):
        raise ValueError(f"{path}: a folder or device; choose the name of a file")
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            yield temporary
            with open(temporary, "r+b") as file:
                sync(file)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file):
    """Write an open file to the disk; a power cut could leave an empty one under its name.

    Some file systems do not support it: that is a warning.
    """
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        message = f"fsync: {error.strerror}; a power cut may lose what is written"
        warnings.warn(message, stacklevel=2)


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
                message = f"{holder} is writing here; wait, or choose another path"
                raise ValueError(f"{output}: {message}") from None
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
