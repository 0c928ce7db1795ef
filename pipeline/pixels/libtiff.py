"""Catches libtiff's messages while it decodes: by itself it writes them to standard error, without a file name."""

import contextlib
import ctypes
import functools
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_listening = threading.local()
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # module, format, va_list


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """The list that libtiff's errors in this thread are put into while the block runs."""
    _take_over()
    lines: list[str] = []
    _listening.lines = lines
    try:
        yield lines
    finally:
        _listening.lines = None


@_HANDLER
def _write_down(module: bytes | None, template: bytes, arguments: int) -> None:
    text = ctypes.create_string_buffer(300)
    _c_library().vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.c_void_p(arguments))
    line = text.value.decode("utf-8", "replace")
    if (lines := getattr(_listening, "lines", None)) is not None:
        lines.append(line)
    else:  # somebody else's use of Pillow in this process
        print(f"{(module or b'libtiff').decode('utf-8', 'replace')}: {line}", file=sys.stderr)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def libraries(maps: str) -> list[str]:
    """The libtiffs among the files that a process has mapped; not nvImageCodec's libtiff_ext.so, which DALI loads and
    which has a libtiff of its own inside."""
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps.splitlines())
    return [path for path in paths if re.search(r"/libtiff[-.][^/]*$", path)]


@functools.cache
def _take_over() -> None:
    """Hands libtiff our function for errors. Where Pillow's libtiff is not found, its lines stay where they are."""
    with contextlib.suppress(OSError, AttributeError, StopIteration):
        mapped = Path("/proc/self/maps").read_text()
        library = ctypes.CDLL(next(iter(libraries(mapped))))
        library.TIFFSetErrorHandler.restype = ctypes.c_void_p
        library.TIFFSetErrorHandler(_write_down)
