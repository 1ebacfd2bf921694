"""NiiVue, a viewer in one file, and the volumes that it shows: put into a page, never shipped.

It is looked for where ``npm pack @niivue/niivue`` was run, or wherever the user says it is.
"""

import gzip
import os
import re
import tarfile
import zlib
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store.storage.cache import cache_folder
from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.report.display import AIR, Display, hu_of_tones

VARIABLE = "KPT_VIEWER"
"""Environment variable: path of NiiVue, as a ``.js`` file or npm's ``.tgz``."""
SCRIPT = "niivue.umd.js"
PACKED = "niivue-niivue-*.tgz"
"""Name of what npm packs."""
MOST_BYTES = 32 << 20
"""Of a viewer; a larger file is another one."""


@dataclass(frozen=True)
class Viewer:
    """NiiVue.

    Attributes
    ----------
    script : str
        JavaScript that defines ``niivue``, safe inside an HTML element.
    origin : str
        Name and version.
    """

    script: str
    origin: str


def how_to_install() -> str:
    """Say how to make NiiVue known, in one sentence."""
    # Not the whole path: a page is handed on, and who made it is nobody's business.
    home = os.path.expanduser("~")
    folder = str(cache_folder())
    if folder.startswith(f"{home}/"):
        folder = f"~{folder.removeprefix(home)}"
    return (
        f"For a viewer in 3-D run “npm pack @niivue/niivue” in {folder} and make the page"
        f" again, or name NiiVue's {SCRIPT} by --viewer or {VARIABLE}."
    )


def find_viewer(given: str | os.PathLike[str] | None = None) -> Viewer | None:
    """Find NiiVue: in the file given, in that of `VARIABLE`, or in the user's cache.

    Parameters
    ----------
    given : path, optional
        ``niivue.umd.js``, or the package ``niivue-niivue-….tgz`` that holds it.

    Returns
    -------
    Viewer or None
        None if nobody named one and there is none.

    Raises
    ------
    ParameterError
        If the named file is missing or something else.
    """
    named = given if given is not None else os.environ.get(VARIABLE) or None
    if named is not None:
        return _read(Path(named))
    folder = cache_folder()
    if not folder.is_absolute():  # of a user without a home
        return None
    plain = [path for path in (folder / SCRIPT,) if path.is_file()]
    packed = sorted(folder.glob(PACKED), key=_version)
    for path in (*plain, *reversed(packed)):
        return _read(path)
    return None


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _read(path: Path) -> Viewer:
    origin = "NiiVue"
    try:
        if path.suffix == ".tgz":
            with tarfile.open(path) as archive:
                [member] = (m for m in archive if m.name.endswith(f"/{SCRIPT}"))
                file = archive.extractfile(member)
                data = b"" if file is None else file.read(MOST_BYTES + 1)
            origin += f" {'.'.join(map(str, _version(path)))}"
        else:
            with open(path, "rb") as file:
                data = file.read(MOST_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ParameterError(
            f"{path} cannot be read as a viewer: {error.strerror or error}; give NiiVue's {SCRIPT}."
        ) from error
    except (tarfile.TarError, zlib.error, ValueError, EOFError) as error:
        raise ParameterError(
            f"{path} is no viewer ({error}); give NiiVue's {SCRIPT}, or its npm package (.tgz)."
        ) from error
    if len(data) > MOST_BYTES or "niivue" not in text[:4096]:
        raise ParameterError(
            f"{path} is not {SCRIPT} of NiiVue; give that file, or its npm package (.tgz)."
        )
    # Inside an element, these would end it or begin a comment; in strings they mean the same.
    return Viewer(re.sub(r"<(?=/script|script|!--)", r"\\x3c", text, flags=re.IGNORECASE), origin)


STEPS = 8, 16, 24
"""HU in a grey value of the scan: the finest that fits."""


def scan_nifti(display: Display, step: int) -> str:
    """Encode the scan as NIfTI: uint8 with a slope of `step` HU from −1000 on, packed, base64."""
    table = np.clip(np.rint((hu_of_tones() - float(AIR)) / step), 0, 255).astype(np.uint8)
    return _nifti(table[display.tones], display.grid, (step, AIR))


def organs_nifti(display: Display) -> str:
    """Encode the numbers of organs as NIfTI: uint8 if they fit, else uint16; packed, base64."""
    numbers = display.organs
    narrow = numbers.size == 0 or int(numbers.max()) < 256
    return _nifti(numbers.astype(np.uint8) if narrow else numbers, display.grid, (1, 0))


def _nifti(voxels: NDArray[Any], grid: Grid, scaling: tuple[float, float]) -> str:
    # Imported here: only pages need it.
    from nibabel import Nifti1Header

    # NIfTI's world grows to the right and to the front, and its first axis is x.
    spacing, (z, y, x) = float(grid.spacing[0]), grid.origin
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = -x, -y, z
    header: Any = Nifti1Header()  # type: ignore[no-untyped-call]
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape[::-1])
    header.set_sform(affine, "scanner")
    header.set_qform(affine, "scanner")
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = scaling
    header["vox_offset"], header["magic"] = _DATA_AT, b"n+1"
    start: bytes = header.binaryblock
    start = start.ljust(_DATA_AT, b"\0")
    return b64encode(gzip.compress(start + voxels.tobytes(), 6, mtime=0)).decode("ascii")


_DATA_AT = 352
"""Byte at which the voxels of a NIfTI file begin."""
