"""Unpacks bodies of requests that are sent with `Content-Encoding: gzip`."""

import zlib

from starlette.exceptions import HTTPException

_GZIP = 31
"""zlib's number for a gzip header and the largest window."""
PLAIN, PACKED = ("", "identity"), ("gzip", "x-gzip")


class GzipBody:
    """A body that is unpacked piece by piece, to at most `bound` bytes."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._inner = zlib.decompressobj(_GZIP)
        self._size = 0

    def push(self, packed: bytes, *, last: bool) -> bytes:
        """The bytes of one more piece. Raises HTTPException: 413 beyond the bound, 400 for what is no gzip."""
        pieces = []
        try:
            while packed:
                if self._inner.eof:  # a gzip file may consist of several
                    self._inner = zlib.decompressobj(_GZIP)
                pieces.append(self._inner.decompress(packed, self._bound - self._size + 1))
                self._size += len(pieces[-1])
                if self._size > self._bound:
                    raise too_long(self._bound)
                packed = self._inner.unconsumed_tail or self._inner.unused_data
        except zlib.error as error:
            raise HTTPException(400, f"the body is not valid gzip: {error}.") from None
        if last and not self._inner.eof:
            raise HTTPException(400, "the body is not valid gzip: it ends too early.")
        return b"".join(pieces)


def too_long(bound: int) -> HTTPException:
    """The error of a body that is longer than `bound` bytes."""
    return HTTPException(413, f"the body is longer than {bound} bytes (--max-body-bytes).")
