"""Lossless JPEG (process 14, all predictors), the commonest compression of CT in archives.

The free codecs with a suitable licence crash the process on damaged data; this one stays within its
arrays for any input. Source: ITU-T T.81 (1992), annexes C, F and H.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel

_LOSSLESS, _TABLES, _INTERVAL, _SCAN = 0xC3, 0xC4, 0xDD, 0xDA


@dataclass(frozen=True, eq=False)
class _Image:
    """Parameters from the segments before the data.

    Attributes
    ----------
    rows, columns, precision : int
        Size of the frame; precision in bits.
    predictor, shift : int
        Parameters of the scan (Ss and Al).
    interval : int
        Pixels between restarts; 0 for none.
    counts, symbols : ndarray
        Huffman codes of each length 1…16, and their values in order.
    at : int
        Offset of the data, bytes.
    """

    rows: int
    columns: int
    precision: int
    predictor: int
    shift: int
    interval: int
    counts: NDArray[np.int64]
    symbols: NDArray[np.int64]
    position: int


def decode(data: bytes) -> NDArray[np.uint16]:
    """Decode an image of one component.

    Returns
    -------
    ndarray (rows, columns), uint16

    Raises
    ------
    ValueError
        If it is none, or damaged.
    """
    image = _parse(data)
    out = np.zeros((image.rows, image.columns), np.uint16)
    if not _decode(
        np.frombuffer(data, np.uint8)[image.position :],
        image.counts,
        image.symbols,
        np.array([image.predictor, image.precision - image.shift, image.interval]),
        out,
    ):
        raise ValueError("its JPEG data end too early or hold an unknown code")
    out <<= np.uint16(image.shift)
    return out


def _parse(data: bytes) -> _Image:
    tables: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    frame: tuple[int, int, int] | None = None
    interval, position = 0, 2
    if data[:2] != b"\xff\xd8":
        raise ValueError("it does not begin as JPEG does")
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise ValueError("a JPEG marker is missing")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        size = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + size]
        if size < 2 or len(body) < size - 2:
            raise ValueError("a JPEG segment is truncated")
        position += 2 + size
        if marker == _LOSSLESS and len(body) >= 6:
            if body[5] != 1 or not 2 <= body[0] <= 16:
                raise ValueError(f"it has {body[5]} components of {body[0]} bits")
            frame = body[0], int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        elif marker == _TABLES:
            tables |= _huffman_tables(body)
        elif marker == _INTERVAL and len(body) >= 2:
            interval = int.from_bytes(body[:2], "big")
        elif marker == _SCAN:
            if frame is None or len(body) < 6 or body[0] != 1 or body[2] >> 4 not in tables:
                raise ValueError("its JPEG scan lacks a frame or a table")
            precision, rows, columns = frame
            predictor, shift = body[3], body[5] & 15
            if not 1 <= predictor <= 7 or shift >= precision or rows == 0 or columns == 0:
                raise ValueError("its JPEG scan has parameters that do not exist")
            if interval % columns:
                raise ValueError("it restarts within a row")
            counts, symbols = tables[body[2] >> 4]
            return _Image(
                rows, columns, precision, predictor, shift, interval, counts, symbols, position
            )
    raise ValueError("it is no lossless JPEG, or truncated")


def _huffman_tables(body: bytes) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    found, position = {}, 0
    while position + 17 <= len(body):
        counts = np.frombuffer(body, np.uint8, 16, position + 1).astype(np.int64)
        n = int(counts.sum())
        symbols = np.frombuffer(body[position + 17 : position + 17 + n], np.uint8).astype(np.int64)
        if not 0 < n == symbols.size <= 256 or symbols.max() > 16:
            raise ValueError("it has a damaged Huffman table")
        found[body[position]] = counts, symbols
        position += 17 + n
    return found


@kernel
def _decode(
    data: NDArray[np.uint8],
    counts: NDArray[np.int64],
    symbols: NDArray[np.int64],
    parameters: NDArray[np.int64],
    out: NDArray[np.uint16],
) -> bool:
    """Decode pixels; False where the data end too early or hold an unknown code."""
    predictor, bits, interval = parameters
    rows, columns = out.shape
    position, held, n_held, lacking = 0, np.int64(0), np.int64(0), 0
    first_row = True
    for y in range(rows):
        if interval > 0 and y > 0 and (y * columns) % interval == 0:
            # The rest of a byte, then a restart marker.
            held, n_held, lacking = np.int64(0), np.int64(0), 0
            if (
                position + 1 >= data.size
                or data[position] != 0xFF
                or not 0xD0 <= data[position + 1] <= 0xD7
            ):
                return False
            position += 2
            first_row = True
        for x in range(columns):
            # 16 bits of a code and 15 of a difference are enough; behind the end come zeros,
            # which may be looked at, but not used.
            if lacking > n_held:
                return False
            while n_held < 32:
                byte = np.int64(0)
                if position < data.size and data[position] != 0xFF:
                    byte = np.int64(data[position])
                    position += 1
                elif position + 1 < data.size and data[position + 1] == 0:
                    byte = np.int64(0xFF)
                    position += 2
                else:
                    lacking += 8
                held = ((held << 8) | byte) & 0xFFFFFFFFFF
                n_held += 8
            code, first, begin, length = np.int64(0), np.int64(0), np.int64(0), 0
            category = np.int64(-1)
            for length in range(1, 17):
                code = (held >> (n_held - length)) & ((1 << length) - 1)
                if code - first < counts[length - 1]:
                    category = symbols[begin + code - first]
                    break
                begin += counts[length - 1]
                first = (first + counts[length - 1]) << 1
            if category < 0:
                return False
            n_held -= length
            difference = np.int64(32768)
            if category < 16:
                difference = (held >> (n_held - category)) & ((1 << category) - 1)
                n_held -= category
                if category > 0 and difference < 1 << (category - 1):
                    difference -= (1 << category) - 1
            if first_row:
                guess = np.int64(out[y, x - 1]) if x > 0 else np.int64(1) << (bits - 1)
            elif x == 0:
                guess = np.int64(out[y - 1, 0])
            else:
                left, above = np.int64(out[y, x - 1]), np.int64(out[y - 1, x])
                corner = np.int64(out[y - 1, x - 1])
                if predictor == 1:
                    guess = left
                elif predictor == 2:
                    guess = above
                elif predictor == 3:
                    guess = corner
                elif predictor == 4:
                    guess = left + above - corner
                elif predictor == 5:
                    guess = left + ((above - corner) >> 1)
                elif predictor == 6:
                    guess = above + ((left - corner) >> 1)
                else:
                    guess = (left + above) >> 1
            out[y, x] = np.uint16((guess + difference) & 0xFFFF)
        first_row = False
    return bool(lacking <= n_held)
