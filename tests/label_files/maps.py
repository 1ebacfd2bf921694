"""Label maps for the tests of label files, and where their voxels lie."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import Organ
from kpt_dask.grid import Grid
from kpt_dask.label_files.label_map import LabelMap, dtype_of
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.scans.scan import open_scan
from tests.scans.dicom_writer import write_folder
from tests.scans.formats import REVERSED

Array = NDArray[Any]

ORGANS = (
    Organ(1, "liver", 50.0, (200, 100, 60)),
    Organ(5, "kidney_left", 50.0, (0, 128, 255)),
    Organ(7, "my_organ_with_a_long_name", 50.0, (9, 9, 9)),
    Organ(9, "spleen", 50.0, (1, 2, 3)),
)
"""Of which the last does not occur."""

WIDE = (*ORGANS, Organ(300, "rib_left_1", 300.0, (250, 240, 230)))

SHAPE = 9, 40, 36


def labels(shape: tuple[int, int, int] = SHAPE, organs: tuple[Organ, ...] = ORGANS) -> Array:
    """Balls and a shell with a hole; the last organ is nowhere."""
    k, j, i = np.indices(shape).astype(float) / np.reshape(shape, (3, 1, 1, 1))
    made = np.zeros(shape, dtype_of(organs))
    made[(k - 0.5) ** 2 + (j - 0.3) ** 2 + (i - 0.3) ** 2 < 0.05] = 1
    far = (j - 0.65) ** 2 + (i - 0.65) ** 2
    made[(far < 0.06) & (far > 0.012) & (k > 0.3)] = 5
    made[2, 0, 0] = 7
    if organs[-1].value > 255:
        made[-1, -3:, -2:] = 300
    return made


def affine(turned: bool = False) -> Array:
    """From (i, j, k) to (x, y, z), LPS; axial planes, turned about the body's axis or not."""
    c, s = (np.cos(0.3), np.sin(0.3)) if turned else (1.0, 0.0)
    made = np.eye(4)
    made[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * [0.9765625, 0.8, 2.5]
    made[:3, 3] = -30, 20.5, -100
    return made


def label_map(
    values: Array | None = None,
    of: Array | None = None,
    organs: tuple[Organ, ...] = ORGANS,
    **others: Any,
) -> LabelMap:
    """Make a label map of values (k, j, i) on a grid with an affine (i, j, k) to (x, y, z)."""
    values = labels(organs=organs) if values is None else values
    k, j, i = values.shape
    grid = Grid((k, j, i), REVERSED @ (affine() if of is None else of) @ REVERSED)
    voxels = PackedLabels.of((k, j, i), values.dtype, [values])
    return LabelMap(voxels, grid, organs, **others)


def of_series(folder: Path, values: Array | None = None, turned: bool = False) -> LabelMap:
    """Make a label map of a DICOM series, which is written to a folder."""
    values = labels() if values is None else values
    hu = np.zeros(values.shape, np.int16)
    write_folder(folder, hu, affine(turned))
    scan = open_scan(folder)
    voxels = PackedLabels.of(scan.grid.shape, values.dtype, [values])
    return LabelMap(voxels, scan.grid, ORGANS, scan.file)


def places(values: Array, of: Array) -> dict[tuple[float, ...], int]:
    """Labels by their place in the world, in tenths of mm, but for the background."""
    k, j, i = np.nonzero(values)
    points = np.rint((of[:3, :3] @ np.stack([i, j, k])).T * 10 + of[:3, 3] * 10)
    return dict(zip(map(tuple, points.tolist()), values[k, j, i].tolist(), strict=True))
