"""Files of a scan: one CT series, its slices in order, on one regular grid."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError, some_of
from kpt_dask.grid import Grid
from kpt_dask.scans.dicom_frames import Frame, frames_of
from kpt_dask.scans.dicom_header import COMPRESSED, MOST_PIXELS, NATIVE, Header

MOST_LISTED = 12
"""Series that a sentence lists."""

UNEVEN = 0.1
"""Tolerance of a slice's position on the regular grid, as a share of the slices' distance. Some
scanners round positions to 0.1 mm; keypoints are not located more exactly either."""

FAR_APART = 1.5
"""Distance of slices, in their thickness, from which some may be missing between them."""

SAME_PLACE = 0.01
"""Distance of slices, mm, up to which they are at the same place."""

SAME_DIRECTION = 1e-3
"""Difference of direction cosines: half a pixel across a slice of 512."""

SAME_SCAN = "AcquisitionNumber", "KVP", "ConvolutionKernel"
"""Elements that do not alternate from slice to slice of one scan."""


def choose_series(
    path: Path, headers: Iterable[Header], series: str | None
) -> tuple[list[Header], list[str]]:
    """Choose the CT series of a folder.

    Parameters
    ----------
    path : Path
        Path to name in messages.
    headers : iterable of Header
        Headers of all images.
    series : str, optional
        UID of the wanted series, or words of its description.

    Returns
    -------
    chosen : list of Header
        Without localizers.
    doubts : list of str
        Images that were left out, one sentence each.

    Raises
    ------
    ScanFormatError
        If there is no CT series, or several and none was named.
    """
    found: dict[str, list[Header]] = {}
    for header in headers:
        found.setdefault(header.series, []).append(header)
    if not found:
        raise ScanFormatError(f"{path} holds no DICOM image; give the folder of a CT series.")
    if series is not None:
        wanted = {uid: group for uid, group in found.items() if _is_called(series, uid, group)}
        if not wanted:
            raise ScanFormatError(
                f"{path} holds no series {series}; it holds {_listed(found.values())}."
            )
        found = wanted
    usable = {uid: kept for uid, group in found.items() if (kept := _of_ct(group))}
    if not usable:
        raise ScanFormatError(
            f"{path} holds no slices of a CT, but {_listed(found.values())}; only CT has HU."
        )
    # A single plane beside a scan is a picture of it.
    several = [uid for uid, group in usable.items() if sum(h.n_frames for h in group) > 1]
    if len(several) > 1 or (not several and len(usable) > 1):
        raise ScanFormatError(
            f"{path} holds {len(usable)} CT series: {_listed(usable.values())}; choose one with"
            " --series UID."
        )
    [uid] = several or usable
    chosen, doubts = usable[uid], []
    if len(chosen) < len(found[uid]):
        left = next(header for header in found[uid] if header not in chosen)
        doubts.append(
            f"{path}: {len(found[uid]) - len(chosen)} images of the series are no slices of a CT"
            f" and are left out, {left.shown} among them."
        )
    return chosen, doubts


def _is_called(series: str, uid: str, group: Sequence[Header]) -> bool:
    """Whether a series has a UID, or the same words in its description."""
    words = series.casefold().split()
    told = group[0].text("SeriesDescription").casefold().split()
    return uid == series or (bool(words) and set(words) <= set(told))


def _of_ct(group: Sequence[Header]) -> list[Header]:
    return [header for header in group if header.is_ct and not header.is_localizer]


def _listed(groups: Iterable[Sequence[Header]]) -> str:
    """Name series: UID, modality, description, number of images."""
    told = []
    for group in groups:
        first, n = group[0], sum(header.n_frames for header in group)
        said = [first.text("Modality") or "no modality", first.text("SeriesDescription")]
        kind = "localizer" if all(header.is_localizer for header in group) else ""
        images = f"{n} image{'s' * (n != 1)}"
        about = ", ".join(filter(None, [*said, kind, images]))
        told.append(f"{first.series or 'no UID'} ({about})")
    return some_of(told, MOST_LISTED)


def in_order(
    path: Path, headers: Sequence[Header]
) -> tuple[list[Frame], Grid, list[tuple[Frame, Frame]], list[str]]:
    """Put the slices of a series in order, from first to last along the normal.

    Returns
    -------
    frames : list of Frame
        Each slice once.
    grid : Grid
        On which they lie; sheared for a tilted gantry.
    copies : list of (Frame, Frame)
        Slices that are left out, each after the one of the same UID and place that is kept.
    doubts : list of str
        Doubts about the grid, one sentence each.

    Raises
    ------
    ScanFormatError
        If they are no regular grid: the slice at fault is named.
    """
    for header in headers:
        _check_pixels(header, headers[0])
        _check_patient(header, headers[0])
    frames = [frame for header in headers for frame in frames_of(header)]
    first, doubts = frames[0], []
    if len({header.text("FrameOfReferenceUID") for header in headers}) > 1:
        doubts.append(
            f"{path} has slices of several frames of reference (FrameOfReferenceUID), in which"
            " positions need not mean the same place; look at the scan before it is used."
        )
    for frame in frames:
        if frame.calibrated != first.calibrated:
            without, other = (frame, first) if first.calibrated else (first, frame)
            raise ScanFormatError(
                f"{without.shown} has no RescaleIntercept, which {other.shown} has, so their values"
                " cannot both be HU; get a new copy of the series."
            )
        lengths = np.sqrt((first.axes**2).sum(axis=1))
        if np.abs((frame.axes - first.axes) / lengths[:, None]).max() > SAME_DIRECTION:
            same = np.allclose(np.sqrt((frame.axes**2).sum(axis=1)), lengths, rtol=SAME_DIRECTION)
            what = "another orientation" if same else "another PixelSpacing"
            raise ScanFormatError(
                f"{frame.shown} has {what} than {first.shown}; keep slices of one kind only."
            )
    normal = np.cross(*first.axes)
    normal /= np.sqrt(normal @ normal)
    along = np.array([frame.position @ normal for frame in frames])
    order = np.argsort(along, kind="stable")
    frames, along = [frames[i] for i in order], along[order]
    frames, along, copies = _once(frames, along)
    if copies:
        doubts.append(f"{path}: {len(copies)} copies of slices that occur twice are left out.")
    if (doubt := _alternating(path, frames)) is not None:
        doubts.append(doubt)
    step = _step(path, frames, along, normal)
    apart, thickness = float(step @ normal), frames[0].thickness
    if apart > FAR_APART * thickness > 0:
        doubts.append(
            f"{path}: slices of {thickness:.4g} mm lie {apart:.4g} mm apart; see whether some"
            " are missing between them."
        )
    if len(frames) == 1:
        doubts.append(
            f"{path} is a single slice; give the folder of its series to read the whole scan."
        )
    affine = np.eye(4)
    # Columns (k, j, i), rows (z, y, x).
    columns = np.stack([step, first.axes[1], first.axes[0]], axis=1)
    affine[:3, :3] = columns[::-1]
    affine[:3, 3] = frames[0].position[::-1]
    shape = len(frames), first.header.whole("Rows"), first.header.whole("Columns")
    return frames, Grid(shape, affine), copies, doubts


def _once(
    frames: list[Frame], along: NDArray[np.float64]
) -> tuple[list[Frame], NDArray[np.float64], list[tuple[Frame, Frame]]]:
    """Leave out further slices of one UID and place; refuse different slices at one place."""
    kept, copies = [0], []
    for i in range(1, len(frames)):
        last, frame = frames[kept[-1]], frames[i]
        if along[i] - along[kept[-1]] > SAME_PLACE:
            kept.append(i)
        elif last.header.instance != frame.header.instance or not last.header.instance:
            raise ScanFormatError(
                f"{frame.shown} lies at the same place as {last.shown}; keep one of them (or one"
                " phase, if the series has several)."
            )
        elif last.header is frame.header:
            raise ScanFormatError(f"{frame.shown} lies at the same place as {last.shown}.")
        else:
            copies.append((last, frame))
    return [frames[i] for i in kept], along[kept], copies


def _alternating(path: Path, frames: list[Frame]) -> str | None:
    """Doubt slices of two scans that lie between each other.

    A scan in several acquisitions has them one after the other: no value comes back.
    """
    for keyword in SAME_SCAN:
        told = [str(frame.header.raw(keyword)) for frame in frames]
        begins = [i for i in range(1, len(told)) if told[i] != told[i - 1]]
        if len(begins) > 2 and len(begins) + 1 - len(set(told)) > 1:
            one, other = (frames[begins[0] + i].shown for i in (-1, 0))
            return (
                f"{path} may hold two scans in one series: {keyword} changes to and fro along the"
                f" slices, as between {one} and {other}; keep the slices of one scan only."
            )
    return None


def _step(
    path: Path, frames: list[Frame], along: NDArray[np.float64], normal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Find the step from slice to slice; refuse a slice that is missing or out of line."""
    if len(frames) == 1:
        if frames[0].thickness <= 0:
            raise ScanFormatError(
                f"{path} is a single slice that does not say how thick it is (SliceThickness);"
                " give the folder of its series."
            )
        return normal * frames[0].thickness
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    for i in np.flatnonzero(np.abs(gaps - usual) > 2 * UNEVEN * usual):
        raise ScanFormatError(
            f"{frames[i + 1].shown} lies {gaps[i]:.4g} mm from {frames[i].shown}, other slices"
            f" {usual:.4g} mm from each other: slices are "
            f"{'missing between them' if gaps[i] > usual else 'unevenly spaced'}; complete the"
            " series, or resample it to even spacing."
        )
    places = np.array([frame.position for frame in frames])
    step: NDArray[np.float64] = (places[-1] - places[0]) / (len(frames) - 1)
    off = np.sqrt(((places - places[0] - np.arange(len(frames))[:, None] * step) ** 2).sum(axis=1))
    worst = int(off.argmax())
    if off[worst] > max(UNEVEN * usual, SAME_PLACE):
        raise ScanFormatError(
            f"{frames[worst].shown} lies {off[worst]:.3g} mm beside its place in a row of evenly"
            " spaced slices; complete the series, or resample it to even spacing."
        )
    return step


def _check_patient(header: Header, first: Header) -> None:
    """Refuse slices of another patient."""
    if header.text("PatientID") != first.text("PatientID"):
        raise ScanFormatError(
            f"{header.shown} has another PatientID than {first.shown}, in one series; keep slices"
            " of one patient only."
        )


def _check_pixels(header: Header, first: Header) -> None:
    """Refuse pixels that are not read, or differ from those of the first file."""
    shown = header.shown
    if header.syntax not in (*NATIVE, *COMPRESSED):
        raise ScanFormatError(
            f"{shown} has the transfer syntax {header.syntax}, which is not read; convert it with"
            " gdcmconv --raw or dcmconv."
        )
    rows, columns = header.whole("Rows"), header.whole("Columns")
    if rows < 1 or columns < 1 or rows * columns > MOST_PIXELS:
        raise ScanFormatError(f"{shown} has {rows} × {columns} pixels, which no scanner makes.")
    if (rows, columns) != (first.whole("Rows"), first.whole("Columns")):
        raise ScanFormatError(
            f"{shown} has {rows} × {columns} pixels, {first.shown}"
            f" {first.whole('Rows')} × {first.whole('Columns')}; keep slices of one size only."
        )
    if header.whole("SamplesPerPixel", 1) != 1:
        raise ScanFormatError(f"{shown} is a colour picture, no CT; leave it out.")
    bits, stored = header.whole("BitsAllocated"), header.whole("BitsStored")
    if (
        bits not in (8, 16, 32)
        or not 1 <= stored <= bits
        or header.whole("HighBit", stored - 1) != stored - 1
        or header.whole("PixelRepresentation", 0) not in (0, 1)
    ):
        raise ScanFormatError(
            f"{shown} has pixels of {stored} bits in {bits}, ending at bit"
            f" {header.whole('HighBit', stored - 1)}, which is not read; convert it with dcm2niix."
        )
