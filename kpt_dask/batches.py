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

from atlas_store import AtlasStore
from kpt_dask.errors import (
    USER_ERRORS,
    ClusterError,
    OutputExistsError,
    ParameterError,
    sentence_of,
)
from kpt_dask.options import DEFAULTS
from kpt_dask.output import contents
from kpt_dask.runtime import notices, progress
from kpt_dask.scans import label_header
from kpt_dask.scans.scan import open_labels, open_scan, scan_name

if TYPE_CHECKING:
    from kpt_dask.organ_transfer.measures import OrganMeasures

log = logging.getLogger(__name__)

OPTIONS = frozenset({"mode", "options", "exclude", "select", "index", "series", "organs", "memory"})
"""Options of `kpt_dask.segment` that a batch takes."""


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

    @property
    def anew(self) -> str:
        """Advice on how to segment the scan anew."""
        return f"move {self.segmentation} and {self.labels} away to segment the scan again"


def outputs(scans: Iterable[Path], out_dir: Path) -> Mapping[Path, Output]:
    """Name the outputs of scans: OUT/NAME.zarr and OUT/NAME.nii.gz.

    A scan that is given twice counts once. Where scans have the same name, the folders that tell
    them apart are part of every name.

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
    places = {Path(os.path.abspath(scan)): scan for scan in reversed(list(scans))}
    paths = dict(reversed(places.items()))
    names = [scan_name(path) for path in paths]
    if len({*names}) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [
            "-".join((*path.parent.relative_to(common).parts, name))
            for path, name in zip(paths, names, strict=True)
        ]
    by_name: dict[str, Path] = {}
    for scan, name in zip(paths.values(), names, strict=True):
        if by_name.setdefault(name, scan) != scan:
            raise ParameterError(
                f"{by_name[name]} and {scan} would both become {out_dir / name}.zarr: "
                "segment them into different folders."
            )
    return {
        scan: Output(out_dir / f"{name}.zarr", out_dir / f"{name}.nii.gz")
        for name, scan in by_name.items()
    }


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
    scans: Iterable[str | Path],
    store: AtlasStore | str | Path,
    out_dir: str | Path,
    client: Client | None = None,
    ready: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Outcome]:
    """Segment every scan that is not segmented yet; a bad scan does not stop the others.

    An answer that is there is kept if it was made from the same voxels, whatever the options; no
    label map is ever replaced.

    Parameters
    ----------
    scans : iterable of str or Path
        CT scans.
    store : AtlasStore, str or Path
        The atlases.
    out_dir : str or Path
        Folder for the outputs, named as in `outputs`.
    client : distributed.Client, optional
        Client whose workers compute; by default threads of this process.
    ready : callable, optional
        Called before each scan; its ClusterError says why no scan can be segmented any more, and
        ends the batch.
    **options
        Those of `kpt_dask.segment` but for outputs: mode, options, exclude, select, index, series,
        organs, memory.

    Returns
    -------
    iterator of Outcome
        Of each scan, in their order; each is segmented when it is asked for.

    Raises
    ------
    ParameterError
        If two scans would write to the same place, or an option is none.

    Examples
    --------
    >>> import kpt_dask
    >>> [done] = kpt_dask.segment_batch(["body_4_ct.nii.gz"], "atlases", "results", mode="organ")
    >>> done.output.labels.as_posix(), done.error
    ('results/body_4_ct.nii.gz', None)
    """
    if unknown := sorted(set(options) - OPTIONS):
        raise ParameterError(
            f"segment_batch has no option {unknown[0]}; use {', '.join(sorted(OPTIONS))}."
        )
    named = outputs(map(Path, scans), Path(out_dir))
    return _each(named, store, ready, {**options, "client": client})


def _each(
    named: Mapping[Path, Output],
    store: AtlasStore | str | Path,
    ready: Callable[[], None],
    settings: Mapping[str, Any],
) -> Iterator[Outcome]:
    ended = None
    with progress.stage("Scans", total=len(named)) as advance:
        for scan, output in named.items():
            complete = output.complete
            if not complete and ended is None:
                ended = _ended(ready)
            if complete or ended is None:
                answer = _read if complete else _segment
                yield _outcome(answer, scan, output, store, settings)
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


def _outcome(
    answer: Callable[..., Outcome],
    scan: Path,
    output: Output,
    store: AtlasStore | str | Path,
    settings: Mapping[str, Any],
) -> Outcome:
    """Get the answer of `_segment` or `_read`, or why there is none."""
    start = time.perf_counter()
    try:
        return answer(scan, output, store, settings)
    except Exception as error:
        # As a command does; the log of a job tells more.
        if not isinstance(error, USER_ERRORS):
            if os.environ.get("KPT_DEBUG"):
                raise
            log.info("%s: unexpected", scan, exc_info=True)
        return Outcome(scan, output, time.perf_counter() - start, error=sentence_of(error))


def _segment(
    scan: Path, output: Output, store: AtlasStore | str | Path, settings: Mapping[str, Any]
) -> Outcome:
    # Imported here, as below: the help of commands needs neither.
    from kpt_dask.segmentation import segment
    from kpt_dask.volumes.conversion import check_made_from
    from kpt_dask.volumes.volume import open_volume

    log.info("%s: begins", scan)
    # Whoever edited it would lose that.
    if os.path.lexists(output.labels):
        raise OutputExistsError(
            f"{output.labels} exists without the {output.segmentation} of its run: {output.anew}."
        )
    # A batch that was killed may have put this one in place and not the labels yet.
    half = contents.run_of(output.segmentation) is not None
    if half:
        opened = open_scan(scan, series=settings.get("series"))
        check_made_from(open_volume(output.segmentation), opened, str(output.segmentation))
    found = segment(
        scan, store, output.segmentation, labels=output.labels, overwrite=half, **settings
    )
    return Outcome(scan, output, found.seconds, found.organs, found.warnings)


def _read(
    scan: Path, output: Output, store: AtlasStore | str | Path, settings: Mapping[str, Any]
) -> Outcome:
    """Read what an earlier batch found in a scan."""
    from kpt_dask.organ_transfer.measures import as_delivered
    from kpt_dask.report.findings import open_findings
    from kpt_dask.segmentation import choose_organs
    from kpt_dask.volumes.conversion import check_made_from

    where = str(output.segmentation)
    try:
        findings = open_findings(where)
        # Names tell nothing: another patient's scan may have had this one.
        opened = open_scan(scan, series=settings.get("series"))
        check_made_from(findings.volume, opened, where)
        labels = open_labels(output.labels)
        counts = np.zeros(np.iinfo(np.uint16).max + 1, np.int64)
        for slab in labels.label_slabs():
            counts += np.bincount(slab.reshape(-1), minlength=counts.size)
    except USER_ERRORS as error:
        raise OutputExistsError(f"{sentence_of(error).rstrip('.')}; {output.anew}.") from error
    made = findings.about["segmentation"]
    mode, options = settings.get("mode", "local"), settings.get("options", DEFAULTS)
    table = choose_organs(AtlasStore.of(store), settings.get("organs", ()))
    asked = {"mode": mode, "transfer": options.to_json(mode, table), "organ_table": table.to_json()}
    if any(made.get(what) != value for what, value in asked.items()):
        notices.warn(f"{where} was made with other options, and is kept: {output.anew}.")
    organs = as_delivered(findings.organs, counts[list(findings.table.values)], labels.grid)
    return Outcome(scan, output, 0.0, organs, tuple(findings.about.get("warnings", ())))
