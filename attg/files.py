"""Atomic writes, checksums, requests for many files, reading in another process."""

import contextlib
import errno
import hashlib
import itertools
import math
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def sha256(path):
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_or_errno(path):
    """sha256, or the number of the OSError that reading raises."""
    try:
        return sha256(path)
    except OSError as error:
        return error.errno


def in_threads(function, rows):
    """[function(row)] for a range of rows, in 16 threads.

    A network file system answers each request late, but many at once: the sizes of
    ImageNet's files, asked for one by one, take over ten minutes at 0.5 ms each.
    """
    size = max(1, math.ceil(len(rows) / 256))
    parts = (rows[i : i + size] for i in range(0, len(rows), size))
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda part: [function(row) for row in part], parts)
        return list(itertools.chain.from_iterable(results))


def in_fork(function, *args):
    """function(*args), which returns plain values or arrays, in a forked process.

    Loader workers that are forked later would share the files that it opens, and read at
    each other's positions. Where workers are not forked, it runs in this process.
    """
    if sys.platform != "linux":
        return function(*args)
    import torch  # here, because cli.py comes before torch

    def run():
        # Threads of OpenMP are not forked; the child would wait for them.
        torch.set_num_threads(1)
        sender.send(function(*args))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise ValueError("data: the process that read images has died") from error
    finally:
        process.join()


@contextlib.contextmanager
def path_in_errors(path):
    """Add the path to errors such as "No space left on device", which name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path that replaces `path` when the block ends without an error.

    Readers see the old file or the complete new one, even if the process is killed.
    Symbolic links are followed; ValueError for what is no regular file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"{path}: a folder or device; choose the name of a file")
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path_in_errors(path):
            yield temporary
            with open(temporary, "r+b") as file:
                try:
                    # Otherwise a power cut could leave an empty file under its name.
                    os.fsync(file.fileno())
                except OSError as error:
                    # Some file systems do not support it.
                    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                        raise
                    message = f"fsync: {error.strerror}; a power cut may lose {path}"
                    warnings.warn(message, stacklevel=3)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
