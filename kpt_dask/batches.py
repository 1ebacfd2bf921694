"""Batches of scans, segmented one after another with the atlases of one store.

Each scan uses all threads or workers, so a batch needs the memory of a single scan, and an
interruption loses the work on one scan at most: the next call continues with that scan.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from distributed import Client

from kpt_dask.errors import USER_ERRORS, ClusterError, OutputExistsError, ParameterError
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.output import contents
from kpt_dask.runtime import notices, progress
from kpt_dask.scans import label_header
from kpt_dask.scans.scan import open_labels, scan_name

if TYPE_CHECKING:
    from kpt_dask.organ_transfer.measures import OrganMeasures

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

    Where scans have the same name, the folders that tell them apart are part of every name.

    Raises
    ------
    ParameterError
        If two scans would write to the same place.

    Examples
    --------
    >>> from pathlib import Path
    >>> named = outputs([Path("s1/ct.nii"), Path("s2/ct.nii")], Path("out"))
    >>> [output.labels.name for output in named.values()]
    ['s1-ct.nii.gz', 's2-ct.nii.gz']
    """
    scans = list(scans)
    names = [scan_name(scan) for scan in scans]
    if len({*names}) < len({*scans}):
        above = [scan.absolute().parent for scan in scans]
        common = os.path.commonpath(above)
        names = [
            "-".join((*folder.relative_to(common).parts, name))
            for folder, name in zip(above, names, strict=True)
        ]
    by_name: dict[str, Path] = {}
    for scan, name in zip(scans, names, strict=True):
        if by_name.setdefault(name, scan) != scan:
            raise ParameterError(
                f"{by_name[name]} and {scan} would both become {out_dir / name}.zarr: "
                "segment them into different folders."
            )
    return {
        scan: Output(out_dir / f"{name}.zarr", out_dir / f"{name}.nii.gz")
        for name, scan in by_name.items()
    }


def check_batch(
    store: str,
    *,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    organs: Sequence[str] = (),
    exclude: Sequence[str] = (),
    select: int | None = None,
    index: str = "auto",
) -> None:
    """Refuse what `kpt_dask.segment` refuses whatever the scan is, with its errors."""
    from atlas_store import AtlasStore
    from kpt_dask.matching.selection import check_selection
    from kpt_dask.segmentation import choose_atlases, choose_organs

    opened = AtlasStore.open(store)
    options.check(mode, opened.organs, choose_organs(opened, organs))
    choose_atlases(opened, exclude)
    check_selection(select, index)


@dataclass(frozen=True)
class Outcome:
    """What became of one scan of a batch.

    Attributes
    ----------
    scan : Path
    output : Output
    seconds : float
        Wall time; 0 if the outputs were there already.
    organs : mapping of str to OrganMeasures
        What was found of each organ, volumes as in the label map; empty if the scan failed.
    warnings : tuple of str
        Doubts about the scan or the answer, one sentence each.
    error : str, optional
        Why it could not be segmented.
    """

    scan: Path
    output: Output
    seconds: float = 0.0
    organs: "Mapping[str, OrganMeasures]" = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        """Say it in a line."""
        if self.error is not None:
            return f"{self.scan}: failed: {self.error}"
        done = f"done in {self.seconds:.1f} s" if self.seconds else "is there already"
        return f"{self.output.segmentation}: {done}"


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Raise ParameterError if a scan of a batch could not be segmented; it names each, and why."""
    failed = [f"\n  {one.scan}: {one.error}" for one in outcomes if one.error is not None]
    if failed:
        raise ParameterError(f"{len(failed)} of {len(outcomes)} scans failed:{''.join(failed)}")


def segment_batch(
    scans: Iterable[Path],
    store: str,
    out_dir: Path,
    client: Client | None = None,
    ready: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Segment every scan that is not segmented yet; a bad scan does not stop the others.

    Parameters
    ----------
    scans : iterable of Path
        CT scans.
    store : str
        Path or URL of the atlas store.
    out_dir : Path
        Folder for the outputs, named as in `outputs`.
    client : distributed.Client, optional
        Client whose workers compute; by default threads of this process.
    ready : callable, optional
        Called before each scan; its ClusterError says why no scan can be segmented any more, and
        ends the batch.
    **options
        Passed on to `kpt_dask.segmentation.segment`.

    Yields
    ------
    Outcome
        Of each scan, in their order, as soon as it is known.

    Raises
    ------
    ParameterError
        If two scans would write to the same place.

    Examples
    --------
    >>> import kpt_dask
    >>> from pathlib import Path
    >>> scans = [Path("body_4_ct.nii.gz")]
    >>> [done] = kpt_dask.segment_batch(scans, "atlases", Path("results"), mode="organ")
    >>> done.output.labels.as_posix(), done.error
    ('results/body_4_ct.nii.gz', None)
    """
    named = outputs(scans, out_dir)
    ended = None
    with progress.stage("Scans", total=len(named)) as advance:
        for scan, output in named.items():
            if output.complete:
                yield _read(scan, output)
            else:
                ended = ended or _ended(ready)
                if ended is None:
                    yield _segment(scan, output, store, client=client, **options)
                else:
                    yield Outcome(scan, output, error=ended)
            advance(1)


def _ended(ready: Callable[[], None]) -> str | None:
    """Ask whether work can go on; the reason if not."""
    try:
        ready()
    except ClusterError as error:
        return str(error)
    return None


def _segment(scan: Path, output: Output, store: str, **options: Any) -> Outcome:
    # Imported here, as below: the help of commands needs neither.
    from kpt_dask.segmentation import segment

    start = time.perf_counter()
    log.info("%s: begins", scan)
    try:
        if output.foreign:
            raise OutputExistsError(
                f"{output.labels} exists and is not by kpt segment: move it away, or choose"
                " another folder for the output."
            )
        # Overwriting, because one of the two may be left from an interrupted batch.
        found = segment(
            scan, store, output.segmentation, labels=output.labels, overwrite=True, **options
        )
    except USER_ERRORS as error:
        why = str(error)
    except Exception as error:
        log.exception("%s: unexpected", scan)
        why = f"{type(error).__name__}: {error}"
    else:
        seconds = time.perf_counter() - start
        return Outcome(scan, output, seconds, found.organs, found.warnings)
    return Outcome(scan, output, time.perf_counter() - start, error=why)


def _read(scan: Path, output: Output) -> Outcome:
    """Read what an earlier batch found."""
    from kpt_dask.organ_transfer.measures import as_delivered
    from kpt_dask.report.findings import open_findings

    if output.older_than(scan):
        notices.warn(
            f"{scan} was changed after it was segmented: delete {output.segmentation} to segment"
            " it again."
        )
    try:
        findings = open_findings(str(output.segmentation))
        labels = open_labels(output.labels)
        counts = np.zeros(np.iinfo(np.uint16).max + 1, np.int64)
        for slab in labels.label_slabs():
            counts += np.bincount(slab.reshape(-1), minlength=counts.size)
    except USER_ERRORS as error:
        return Outcome(scan, output, error=str(error))
    organs = as_delivered(findings.organs, counts[list(findings.table.values)], labels.grid)
    return Outcome(scan, output, 0.0, organs, tuple(findings.about.get("warnings", ())))
