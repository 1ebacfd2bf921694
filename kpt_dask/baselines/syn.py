"""Registration of an atlas to a scan by symmetric normalization (ANTs SyN), kept once it is made.

Needs the extra ``baselines`` (antspyx). A registration takes minutes, so its result is kept in a
folder, under a name made of everything that it depends on.
"""

import tempfile
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ParameterError
from kpt_dask.output.commit import replacing

SEED = 1
"""Seed of the sampling of voxels, so that a registration can be repeated."""
OUTSIDE = -1000
"""HU of what lies outside an atlas: air."""


class Image(NamedTuple):
    """A scan or an atlas in memory.

    Attributes
    ----------
    voxels : array (z, y, x)
        HU.
    spacing : (float, float, float)
        mm.
    origin : (float, float, float)
        First voxel, mm; axes of all images point the same way.
    """

    voxels: NDArray[Any]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Registered(NamedTuple):
    """An atlas on the scan's grid.

    Attributes
    ----------
    image : float32 array (z, y, x)
        HU, linear.
    labels : uint16 array (z, y, x)
        Nearest neighbour.
    seconds, cpu_seconds : float
        Wall and processor time of the registration and both warps, when it was made.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint16]
    seconds: float
    cpu_seconds: float


def check_installed() -> None:
    """Raise `ParameterError` where antspyx is not installed."""
    try:
        version("antspyx")
    except ModuleNotFoundError:
        raise ParameterError(
            "Registration by SyN needs antspyx, which is not installed; pip install"
            " 'kpt-dask[baselines]'."
        ) from None


def register(scan: Image, atlas: Image, labels: NDArray[Any], cache: Path) -> Registered:
    """Register an atlas to a scan, affinely and then by SyN with ANTs' defaults.

    Parameters
    ----------
    scan, atlas : Image
        Fixed and moving image.
    labels : unsigned integer array (z, y, x)
        Label map of the atlas, on its grid.
    cache : Path
        Folder in which registrations are kept; made if it is missing.

    Returns
    -------
    Registered

    Raises
    ------
    ParameterError
        If antspyx is not installed.

    References
    ----------
    B. B. Avants, C. L. Epstein, M. Grossman, J. C. Gee, "Symmetric diffeomorphic image
    registration with cross-correlation", Medical Image Analysis 12(1), 26–41, 2008,
    https://doi.org/10.1016/j.media.2007.06.004.
    """
    check_installed()
    kept = cache / f"{_key(scan, atlas, labels)}.npz"
    if not kept.exists():
        made = _register(scan, atlas, labels)
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(kept, overwrite=True) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **made._asdict())
    with np.load(kept, allow_pickle=False) as arrays:
        times = float(arrays["seconds"]), float(arrays["cpu_seconds"])
        return Registered(arrays["image"], arrays["labels"], *times)


def _register(scan: Image, atlas: Image, labels: NDArray[Any]) -> Registered:
    import ants

    start, cpu_start = time.perf_counter(), time.process_time()
    fixed, moving = (_ants_image(one, one.voxels) for one in (scan, atlas))
    with tempfile.TemporaryDirectory(prefix="kpt-syn-") as folder:
        prefix = f"{folder}/"
        found = ants.registration(fixed, moving, "SyN", outprefix=prefix, random_seed=SEED)
        warps = found["fwdtransforms"]
        warped = ants.apply_transforms(
            fixed, moving, warps, interpolator="linear", defaultvalue=OUTSIDE
        )
        drawn = ants.apply_transforms(
            fixed, _ants_image(atlas, labels), warps, interpolator="nearestNeighbor"
        )
    return Registered(
        np.asarray(warped.numpy(), np.float32),
        np.asarray(np.rint(drawn.numpy()), np.uint16),
        time.perf_counter() - start,
        time.process_time() - cpu_start,
    )


def _ants_image(image: Image, values: NDArray[Any]) -> Any:
    import ants

    return ants.from_numpy(
        np.asarray(values, np.float32), origin=list(image.origin), spacing=list(image.spacing)
    )


def _key(scan: Image, atlas: Image, labels: NDArray[Any]) -> str:
    digest = sha256(f"SyN {version('antspyx')} {SEED} {OUTSIDE}".encode())
    for image, values in ((scan, scan.voxels), (atlas, atlas.voxels), (atlas, labels)):
        digest.update(repr((values.shape, values.dtype.str, image.spacing, image.origin)).encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:32]
