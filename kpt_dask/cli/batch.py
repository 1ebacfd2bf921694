"""Batches of scans, segmented one after another on the workers of one client.

Each scan uses all workers, so a batch needs the memory of a single scan, and an interruption loses
the work on one scan at most: the next call continues with that scan.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distributed import Client

from kpt_dask.errors import USER_ERRORS, ClusterError, OutputExistsError, ParameterError
from kpt_dask.output import contents
from kpt_dask.runtime import notices
from kpt_dask.scans import label_header
from kpt_dask.scans.scan import scan_name

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """Output files of one scan.

    Attributes
    ----------
    segmentation : Path
        The OME-Zarr with probabilities, labels, keypoints and provenance.
    labels : Path
        The NIfTI label map on the scan's own grid.
    """

    segmentation: Path
    labels: Path

    @property
    def complete(self) -> bool:
        """Whether both exist and are of the same run; each appears only when it is complete."""
        run = contents.run_of(self.segmentation)
        return run is not None and run == label_header.run_of(self.labels)

    def older_than(self, scan: Path) -> bool:
        """Whether a file of the scan was written after the segmentation."""
        root = (self.segmentation / contents.ROOT).stat().st_mtime
        files = scan.rglob("*") if scan.is_dir() else [scan]
        return any(file.stat().st_mtime > root for file in files if file.is_file())

    @property
    def foreign(self) -> bool:
        """Whether the label map is there, and not by this program."""
        return self.labels.exists() and label_header.run_of(self.labels) is None


def outputs(scans: Iterable[Path], out_dir: Path) -> Mapping[Path, Output]:
    """Name the outputs of scans: OUT/NAME.zarr and OUT/NAME.nii.gz.

    Raises
    ------
    ParameterError
        If two scans would write to the same place.
    """
    by_name: dict[str, Path] = {}
    for scan in scans:
        name = scan_name(scan)
        if name in by_name:
            raise ParameterError(
                f"{by_name[name]} and {scan} would both become {out_dir / name}.zarr: "
                "segment them into different folders."
            )
        by_name[name] = scan
    return {
        scan: Output(out_dir / f"{name}.zarr", out_dir / f"{name}.nii.gz")
        for name, scan in by_name.items()
    }


def segment_batch(
    scans: Iterable[Path],
    store: str,
    out_dir: Path,
    client: Client,
    ready: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[Path, str]:
    """Segment every scan that is not segmented yet; a bad scan does not stop the others.

    Parameters
    ----------
    scans : iterable of Path
        CT scans.
    store : str
        Path or URL of the atlas store.
    out_dir : Path
        Folder for the outputs, named as in `outputs`.
    client : distributed.Client
        Client whose workers compute.
    ready : callable, optional
        Called before each scan; its ClusterError says why no scan can be segmented any more, and
        ends the batch.
    **options
        Passed on to `kpt_dask.segmentation.segment`.

    Returns
    -------
    failed : dict of Path to str
        Reason, for every scan that could not be segmented.

    Raises
    ------
    ParameterError
        If two scans would write to the same place.
    """
    from kpt_dask.segmentation import segment

    failed: dict[Path, str] = {}
    left = outputs(scans, out_dir)
    for scan, output in left.items():
        if output.complete:
            log.info("%s: is there already", output.segmentation)
            if output.older_than(scan):
                log.warning(
                    "%s was changed after it was segmented: delete %s to segment it again.",
                    scan,
                    output.segmentation,
                )
            continue
        try:
            ready()
        except ClusterError as error:
            left = {scan: output for scan, output in left.items() if not output.complete}
            return dict.fromkeys(left, str(error)) | failed
        log.info("%s: begins", scan)
        try:
            if output.foreign:
                raise OutputExistsError(
                    f"{output.labels} exists and is not by kpt segment: move it away, or choose"
                    " another folder for the output."
                )
            # Overwriting, because one of the two may be left from an interrupted batch.
            with notices.shown(partial(log.warning, "%s")):
                segment(
                    scan,
                    store,
                    output.segmentation,
                    labels=output.labels,
                    overwrite=True,
                    client=client,
                    **options,
                )
        except USER_ERRORS as error:
            failed[scan] = str(error)
        except Exception as error:
            log.exception("%s: unexpected", scan)
            failed[scan] = f"{type(error).__name__}: {error}"
        if scan in failed:
            log.error("%s: failed: %s", scan, failed[scan])
        else:
            log.info("%s: done", output.segmentation)
    return failed
