"""Gallery of matches: the patch of the scan beside the patch of the atlas (Fig. 1 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, AtlasStoreError
from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import open_array
from kpt_dask.errors import KptError
from kpt_dask.grid import Grid
from kpt_dask.report.display import AIR, tones_of
from kpt_dask.report.encoding import jpeg_uri
from kpt_dask.report.findings import Findings
from kpt_dask.report.reasons import Match
from kpt_dask.volumes.volume import open_volume

PIXELS = 144
"""Width and height of a patch on the page."""
SIDES = 60.0, 160.0
"""mm; least and largest side of a patch. In between it is `SCALES` times the keypoint's scale."""
SCALES = 14.0
CIRCLE = 2.0
"""Radius of the circle around a keypoint, in its scales."""
WINDOW = 40, 210
"""Tones shown black and white: HU −400 to 570."""
SAME = 0.05
"""mm by which the position of an atlas's keypoint may differ from what its match says."""


@dataclass(frozen=True)
class Pair:
    """The two patches of a match.

    Attributes
    ----------
    atlas : str
        Id of the atlas.
    scale : float
        mm.
    side : float
        Width and height of the patches, mm.
    label : str or None
        Organ that the atlas's keypoint lies in.
    position : (float, float, float)
        Of the scan's keypoint, (z, y, x), mm.
    scan, other : str
        Patches of the scan and of the atlas, as data URIs; "" if the atlas could not be read.
    """

    atlas: str
    scale: float
    side: float
    label: str | None
    position: tuple[float, float, float]
    scan: str
    other: str


class Gallery:
    """Maker of pairs of patches.

    Parameters
    ----------
    findings : Findings
    store : AtlasStore, optional
        Where the atlases are; without it only patches of the scan are shown.

    Attributes
    ----------
    missing : dict of str to str
        Why atlases are not shown, by their ids.
    """

    def __init__(self, findings: Findings, store: AtlasStore | None) -> None:
        self._findings = findings
        self._store = store
        self._sources: dict[str, _Source] = {}
        self._own = _Source(
            findings.volume.levels,
            findings.labels[0],
            findings.volume.grid,
            findings.keypoints.position,
            np.zeros(len(findings.keypoints.position), np.uint16),
        )
        self.missing: dict[str, str] = {}

    def pair_of(self, match: Match, value: int) -> Pair:
        """Draw the two patches of a match, with the outline of an organ."""
        findings = self._findings
        table = findings.table
        colour = next(organ.colour for organ in table if organ.value == value)
        side = float(np.clip(SCALES * match.scale, *SIDES))
        drawing = _Drawing(side, CIRCLE * match.scale, value, colour)
        atlas_id = findings.atlases[match.atlas]
        other, there = self._source(atlas_id, match), ""
        if other is not None:
            try:
                there = drawing.patch(other, match.atlas_position)
            except (AtlasStoreError, KptError, OSError):
                self.missing[atlas_id] = "cannot be read"
        names = {0: None, **{organ.value: organ.name for organ in table}}
        return Pair(
            atlas_id,
            match.scale,
            side,
            names.get(match.label, "another organ"),
            match.position,
            drawing.patch(self._own, match.position),
            there,
        )

    def _source(self, atlas_id: str, match: Match) -> "_Source | None":
        """Open an atlas; None if it is not the one that voted."""
        if self._store is None or atlas_id in self.missing:
            return None
        try:
            if atlas_id not in self._sources:
                self._sources[atlas_id] = _Source.of(self._store[atlas_id])
            source = self._sources[atlas_id]
            positions = source.positions
            k = match.atlas_keypoint
            there = np.array(match.atlas_position)
            if k >= len(positions) or np.abs(positions[k] - there).max() > SAME:
                self.missing[atlas_id] = "is another scan now"
                return None
            if source.organs_of_keypoints[k] != match.label:
                self.missing[atlas_id] = "has other labels now"
                return None
        except (AtlasStoreError, KptError, OSError):
            self.missing[atlas_id] = "is not in the store, or cannot be read"
            return None
        return source


@dataclass(frozen=True, eq=False)
class _Source:
    """A scan with labels, of which patches are shown."""

    levels: Sequence["zarr.Array[Any]"]
    labels: "zarr.Array[Any]"
    grid: Grid
    positions: NDArray[np.float32]
    organs_of_keypoints: NDArray[np.uint16]

    @classmethod
    def of(cls, atlas: Atlas) -> "_Source":
        volume, keypoints = open_volume(atlas.image), atlas.keypoint_arrays()
        return cls(
            volume.levels,
            open_array(atlas.image, "labels/organs/0"),
            volume.grid,
            keypoints["position"],
            keypoints["label"],
        )


@dataclass(frozen=True)
class _Drawing:
    """How patches of a match are drawn."""

    side: float
    radius: float
    value: int
    colour: tuple[int, int, int]

    def patch(self, source: _Source, position: Sequence[float]) -> str:
        """Draw the axial patch around a point, mm; beyond the scan there is air."""
        # Imported here: only pages need it.
        from PIL import Image, ImageDraw

        level = 0
        while (
            level < len(source.levels) - 1
            and self.side / (float(source.grid.spacing[0]) * 2 ** (level + 1)) >= PIXELS / 2
        ):
            level += 1
        hu, shift = self._cut(source, position, level)
        outline = self._cut_labels(source, position)
        low, high = WINDOW
        tones = (tones_of(hu).astype(np.float32) - low) * (255 / (high - low))
        grey = Image.fromarray(np.clip(tones, 0, 255).astype(np.uint8))
        box = (shift[1], shift[0], shift[1] + shift[2], shift[0] + shift[2])
        grey = grey.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC, box=box)
        picture = np.array(grey.convert("RGB"))
        picture[outline] = self.colour
        image = Image.fromarray(picture)
        middle, r = PIXELS / 2, self.radius / self.side * PIXELS
        ring = (middle - r, middle - r, middle + r, middle + r)
        ImageDraw.Draw(image).ellipse(ring, outline=(255, 235, 0), width=2)
        return jpeg_uri(np.asarray(image), 85)

    def _cut(
        self, source: _Source, position: Sequence[float], level: int
    ) -> tuple[NDArray[Any], tuple[float, float, float]]:
        """Voxels (y, x) around a point, and where in them the patch begins, and its size."""
        array, spacing = source.levels[level], float(source.grid.spacing[0]) * 2**level
        index = (np.asarray(position) - source.grid.origin) / spacing
        size = self.side / spacing
        # Half a voxel from centres to edges; two voxels more for interpolation.
        begin = np.floor(index[1:] + 0.5 - size / 2).astype(int) - 2
        n = int(np.ceil(size)) + 5
        values = _padded(array, round(float(index[0])), begin, n, AIR)
        first = index[1:] + 0.5 - size / 2 - begin
        return values, (float(first[0]), float(first[1]), size)

    def _cut_labels(self, source: _Source, position: Sequence[float]) -> NDArray[np.bool_]:
        """Outline of the organ in the patch, bool (row, column) of the picture."""
        from scipy.ndimage import binary_dilation

        spacing = float(source.grid.spacing[0])
        index = (np.asarray(position) - source.grid.origin) / spacing
        offset = ((np.arange(PIXELS) + 0.5) / PIXELS - 0.5) * self.side / spacing
        rows, columns = (np.rint(index[a] + offset).astype(int) for a in (1, 2))
        begin = np.array([rows[0], columns[0]])
        n = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
        values = _padded(source.labels, round(float(index[0])), begin, n, 0)
        inside = values[np.ix_(rows - begin[0], columns - begin[1])] == self.value
        outline: NDArray[np.bool_] = binary_dilation(inside, iterations=2) & ~inside
        return outline


def _padded(
    array: "zarr.Array[Any]", z: int, begin: NDArray[np.int64], n: int, fill: float
) -> NDArray[Any]:
    """Read n × n voxels (y, x) of a plane; `fill` beyond the array."""
    out = np.full((n, n), fill, array.dtype)
    z = min(max(z, 0), array.shape[0] - 1)
    region, target = [slice(z, z + 1)], []
    for first, size in zip(begin.tolist(), array.shape[1:], strict=True):
        low, high = max(first, 0), min(first + n, size)
        if low >= high:
            return out
        region.append(slice(low, high))
        target.append(slice(low - first, high - first))
    out[tuple(target)] = chunk_io.read(array, tuple(region))[0]
    return out
