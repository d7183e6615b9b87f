"""Memory that a training frees in one update is needed in the next.

The GNU C library hands large pieces back to the system when they are freed at the end of its
memory, and has to be given them anew, page by page and filled with zeros. What lies at the end is
chance. docs/performance.md says what it took in training, and what it costs to keep them.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE = 2**30


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in pieces up to a gigabyte, for what it needs next.

    For programs that are a training: it holds for the whole process, until it ends.

    Returns:
        whether it could be set; False where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, _LARGE) for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
