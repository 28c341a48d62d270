"""Unpacks bodies of requests that are sent with `Content-Encoding: gzip` or `deflate`."""

import zlib

from starlette.exceptions import HTTPException

_GZIP, _ZLIB, _RAW = 31, 15, -15
"""zlib's numbers for the largest window after a gzip header, after a zlib header, and without a header."""
PLAIN, PACKED = ("", "identity"), ("gzip", "x-gzip", "deflate")


class PackedBody:
    """A body in one of the encodings `PACKED`, which is unpacked piece by piece, to at most `bound` bytes."""

    def __init__(self, bound: int, encoding: str = "gzip") -> None:
        self._bound = bound
        self._encoding = encoding
        self._inner = None if encoding == "deflate" else zlib.decompressobj(_GZIP)
        self._size = 0

    def push(self, packed: bytes, *, last: bool) -> bytes:
        """The bytes of one more piece. Raises HTTPException: 413 beyond the bound, 400 for a body that is not in the
        encoding."""
        pieces = []
        try:
            while packed:
                inner = self._decompressor(packed)
                pieces.append(inner.decompress(packed, self._bound - self._size + 1))
                self._size += len(pieces[-1])
                if self._size > self._bound:
                    raise too_long(self._bound)
                packed = inner.unconsumed_tail or inner.unused_data
        except zlib.error as error:
            raise HTTPException(400, f"the body is not valid {self._encoding}: {error}.") from None
        if last and (self._inner is None or not self._inner.eof):
            raise HTTPException(400, f"the body is not valid {self._encoding}: it ends too early.")
        return b"".join(pieces)

    def _decompressor(self, packed: bytes) -> "zlib._Decompress":
        """The decompressor of the bytes that come next."""
        if self._inner is None:  # some clients send deflate without the zlib header that belongs to it
            self._inner = zlib.decompressobj(_ZLIB if packed[0] & 15 == 8 and packed[0] >> 4 < 8 else _RAW)
        elif self._inner.eof and self._encoding != "deflate":  # a gzip file may consist of several
            self._inner = zlib.decompressobj(_GZIP)
        elif self._inner.eof:
            raise zlib.error("bytes follow its end")
        return self._inner


def too_long(bound: int) -> HTTPException:
    """The error of a body that is longer than `bound` bytes."""
    return HTTPException(413, f"the body is longer than {bound} bytes (--max-body-bytes).")
