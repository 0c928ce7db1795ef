"""Parquet files, local or by URL, opened with errors that say what to do."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from pipeline.files import is_remote, local_path
from pipeline.sources.remote import reading_from


@contextlib.contextmanager
def opened_parquet(place: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, which reads what it is asked for and no more.

    FileNotFoundError when there is none, ValueError when it is damaged, at any time, or when pyarrow is missing.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{place}: reading Parquet takes pyarrow: pip install pyarrow") from None
    with contextlib.ExitStack() as stack:
        source: Any = local_path(place)
        if is_remote(place):
            fs, path = reading_from(place)
            source = stack.enter_context(fs.open(path, "rb"))
            if not source.seekable():  # a server that knows no ranges
                source = io.BytesIO(source.read())
        elif not source.exists():
            raise FileNotFoundError(f"no such list: {place}")
        try:
            # Page by page, else a row group is in memory as a whole and once more decoded.
            yield stack.enter_context(pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{place} is not a whole Parquet file ({error}): fetch or write it again") from None
        except OSError as error:
            # pyarrow's own errors are OSErrors without a number: a page whose bytes do not decode.
            if error.errno is not None or is_remote(place):
                raise
            raise ValueError(f"{place} is not a whole Parquet file ({error}): fetch or write it again") from None
