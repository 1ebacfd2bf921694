"""Octaves of a volume: the voxels that a sweep is fed, read slab by slab."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box

SLABS_AHEAD = 2
"""Slabs read, or being read, while one is swept, if a thread of its own reads them."""


@dataclass(frozen=True, eq=False)
class Octave:
    """An octave as a level of a volume's pyramid, or level 0 at half its spacing.

    Attributes
    ----------
    level : zarr.Array (z, y, x), float32
        Level of the pyramid, HU.
    first : bool
        Whether it is level 0, not yet blurred to σ0.
    finer : bool
        Whether the octave has half its spacing: values halfway are means of neighbours.
    """

    level: "zarr.Array[Any]"
    first: bool
    finer: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the octave along z, y, x."""
        z, y, x = (2 * n - 1 if self.finer else n for n in self.level.shape)
        return z, y, x

    def slabs(
        self, first: int, last: int, across: tuple[tuple[int, int], tuple[int, int]]
    ) -> Iterator[Callable[[], NDArray[np.float32]]]:
        """Yield, per slab of planes, a callable that reads it, C order.

        Two buffers alternate: a slab is overwritten when the second next is read. Each chunk is
        read once; twice for a finer octave, whose slabs hold half a chunk.

        Parameters
        ----------
        first, last : int
            First plane, and the one after the last.
        across : ((y0, y1), (x0, x1))
            Part of each plane.
        """
        depth = self.level.chunks[0]
        boxes = [(planes, *across) for planes in _slabs(first, last, depth)]
        if chunk_io.can_bypass_zarr(self.level):
            # The threads that sweep read too: others would only compete with them.
            shape = 2, depth, *(stop - start for start, stop in across)
            buffers = np.empty(shape, np.float32)
            yield from (partial(self._read, box, buffers[i % 2]) for i, box in enumerate(boxes))
            return
        with ThreadPoolExecutor(1) as reader:
            ahead: deque[Future[NDArray[np.float32]]] = deque()
            for box in boxes:
                ahead.append(reader.submit(self._read, box))
                if len(ahead) > SLABS_AHEAD:
                    yield ahead.popleft().result
            while ahead:
                yield ahead.popleft().result

    def _read(self, box: Box, buffer: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Read a box of the octave's voxels, into a buffer if the level itself is the octave."""
        if not self.finer:
            out = None if buffer is None else buffer[: box[0][1] - box[0][0]]
            return chunk_io.read(self.level, tuple(slice(*ends) for ends in box), out)
        source = tuple(slice(start // 2, stop // 2 + 1) for start, stop in box)
        values = chunk_io.read(self.level, source)
        for axis, (start, stop) in enumerate(box):
            values = _halfway(values, axis)
            inside = slice(start % 2, start % 2 + stop - start)
            values = values[tuple(inside if a == axis else slice(None) for a in range(3))]
        return np.ascontiguousarray(values)


def _halfway(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Insert the mean between any two neighbours; exact for whole numbers, so in any axis order."""
    n = values.shape[axis]
    out = np.empty([2 * m - 1 if a == axis else m for a, m in enumerate(values.shape)], np.float32)
    source, target = np.moveaxis(values, axis, 0), np.moveaxis(out, axis, 0)
    target[::2] = source
    if n > 1:
        np.add(source[1:], source[:-1], out=target[1::2])
        target[1::2] *= 0.5
    return out


def _slabs(first: int, last: int, depth: int) -> Iterator[tuple[int, int]]:
    """Cut planes where chunks end, so that each chunk is read once."""
    while first < last:
        stop = min((first // depth + 1) * depth, last)
        yield first, stop
        first = stop
