"""Segment scans whose labels are known, and compare: leave-one-out, or the scans of a folder."""

import time
from collections.abc import Container, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zarr
from distributed import Client

from atlas_store import Atlas, AtlasStore, AtlasStoreError, Snapshot
from atlas_store.keypoints import first_frames
from kpt_dask.atlases.add import labels_at
from kpt_dask.atlases.profiles import organ_profiles
from kpt_dask.atlases.same_scan import KnownScans
from kpt_dask.errors import (
    GridMismatchError,
    LabelError,
    ParameterError,
    ScanFormatError,
    ScanNotFoundError,
    some_of,
)
from kpt_dask.evaluation.baseline import Baseline, check_baseline
from kpt_dask.evaluation.claims import Claim
from kpt_dask.evaluation.folder import writing
from kpt_dask.evaluation.known_scan import (
    KnownAtlas,
    KnownFiles,
    KnownScan,
    Reference,
    open_files,
    planes,
)
from kpt_dask.evaluation.limited_view import (
    MODES,
    Judged,
    crop_around,
    cropped_volume,
    limited_view_summary,
)
from kpt_dask.evaluation.overlap import dice
from kpt_dask.evaluation.pictures import draw_scan
from kpt_dask.evaluation.summary import ScanResult, numbers_of_atlases, summarize
from kpt_dask.evaluation.table1 import background_votes, keypoint_votes
from kpt_dask.matching.selection import check_selection, how_many
from kpt_dask.options import DEFAULTS, TransferOptions, check_count
from kpt_dask.organ_transfer.doubts import unshown
from kpt_dask.output.places import check_outputs
from kpt_dask.runtime import cluster, notices, progress
from kpt_dask.scans.pairs import Pair
from kpt_dask.segmentation import (
    StationResults,
    choose_atlases,
    segment_volume,
    temporary_image,
)
from kpt_dask.volumes.identity import digest_of
from kpt_dask.volumes.volume import Volume

_FAULTS = (ScanNotFoundError, ScanFormatError, GridMismatchError, LabelError)
"""Errors of the files of one scan, which others may not have."""

NAMED = 3
"""Scans named at most in the warning that a store holds them under other ids."""


def evaluate(
    store: AtlasStore | str | Path,
    scans: Sequence[Pair] | None = None,
    *,
    out: str | Path | None = None,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    atlases: int | Sequence[int] | None = None,
    cropped: Sequence[str] = (),
    baseline: str | None = None,
    registrations: str | Path | None = None,
    limit: int | None = None,
    select: int | None = None,
    index: str = "auto",
    overwrite: bool = False,
    memory: int | None = None,
    client: Client | None = None,
) -> dict[str, Any]:
    """Segment scans whose labels are known, and compare.

    Without `scans`, each atlas is segmented by the others, from its stored volume, and
    compared with its stored label map, both on the working grid. Otherwise each scan is
    converted, and compared with its label map on its own grid. An atlas that was made from
    the scan, whatever it is called, or that has its id is never used for it. An organ of which
    nothing is left on the working grid does not count as annotated. Nothing is written to the
    store; temporary files go to the system's temporary folder (``TMPDIR``), which the workers of
    `client` must see. A scan whose files cannot be used, and an atlas that is removed or replaced
    meanwhile, is left out with a warning, unless none is left.

    Parameters
    ----------
    store : AtlasStore, str or Path
        The atlases.
    scans : sequence of Pair, optional
        From `kpt_dask.annotations.layouts.pairs_of`.
    out : str or Path, optional
        Folder for ``index.html``, a page of tables and plots, ``measures.csv``, one row for each
        scan and organ, ``results.json``, the answer, and ``limited_view.csv`` if `cropped`.
    mode, options
        As for `kpt_dask.segment`.
    atlases : int or sequence of int, optional
        Number of atlases to use: the first in natural order other than the scan itself. Of
        several numbers, the largest gives the answer, and Dice is also given for the others.
    cropped : sequence of str
        Organs: each scan is also cropped along the body around each of them, to a third of its
        length, and segmented by `mode`, and by ``across`` and ``organ``, as a whole and cropped.
    baseline : str, optional
        ``syn``: the same atlases are also registered to each scan by ANTs SyN (extra
        ``baselines``), and their labels fused, which takes minutes for each atlas and scan and
        some GiB of memory.
    registrations : str or Path, optional
        Folder in which registrations are kept for another time; in the user's cache unless given.
    limit : int, optional
        Number of scans to evaluate: the first.
    select, index, memory, client
        As for `kpt_dask.segment`.
    overwrite : bool
        Whether `out` may replace the folder of an earlier evaluation.

    Returns
    -------
    dict
        In JSON types:
        ``mean_dice``, over all pairs of a scan and an organ that its reference annotates, and
        ``mean_dice_interval``, its 95 % bootstrap interval over scans, None for a single scan;
        ``dice_by_organ``, its mean over the scans;
        ``dice``, by scan and organ;
        ``measures``, by scan and organ: ``dice``, ``mean_distance_mm``, ``distance_95_mm`` and
        ``surface_dice`` (at 3 mm) of `kpt_dask.measures.surfaces.Agreement`;
        ``claims``, by scan and organ: ``confidence``, ``volume_ml``, ``low_ml``, ``high_ml`` and
        ``reference_ml`` of `kpt_dask.evaluation.claims.Claim`;
        ``trust``, how often what answers say of themselves is true: see
        `kpt_dask.evaluation.claims.trust`;
        ``measures_by_organ``: ``scans``, how many annotate it; ``only_one_shows``, in how many of
        them only the reference or only the result shows it, and so has no distance; of each
        measure the ``mean`` and its ``interval``;
        ``keypoints`` (the paper's Table 1), by organ: ``mean``, the number of a scan's
        keypoints in the organ, ``labelled``, how many per cent of them got a vote, and
        ``correct``, how many per cent of these are right, both None where there is none;
        ``background``, the same of the keypoints in no organ, if background were a label to vote
        for, and ``in_organ``, how many per cent of them the segmentation counts as an organ's;
        ``seconds``, mean of a scan by station, ``total`` from scan to label map;
        ``seconds_by_scan``, the same of each scan;
        ``scans`` and ``atlases``, how many, atlases for each scan;
        ``by_atlases``, if `atlases` are several: Dice for each number;
        ``baselines``, if asked for: ``mean_dice``, ``dice_by_organ`` and ``dice``, on the working
        grid, and ``seconds`` by scan, of each way to fuse the labels of registered atlases;
        ``limited_view``, if a scan was cropped: see
        `kpt_dask.evaluation.limited_view.limited_view_summary`;
        ``left_out``, by scan, which atlases were made from it, if they have other names;
        ``failed``, by scan, why its files could not be used;
        ``warnings``, what was doubtful, one sentence each;
        ``mode``, ``transfer`` (its options), ``store``, ``versions``, ``date``, ``machine``.

    Raises
    ------
    ParameterError
        If a number is not positive or larger than there are atlases, or the mode or an organ is
        unknown.
    EmptyStoreError
        If no atlas is left for a scan.
    OutputExistsError
        If `out` exists and `overwrite` is false, or it holds anything else.
    KptError, AtlasStoreError
        If no scan or reference, or not the store, can be used.

    References
    ----------
    C. Wachinger, M. Toews, G. Langs, W. Wells, P. Golland, "Keypoint Transfer for Fast
    Whole-Body Segmentation", IEEE Transactions on Medical Imaging 39(2), 273–282, 2020,
    https://doi.org/10.1109/TMI.2018.2851194.

    Examples
    --------
    >>> import kpt_dask
    >>> result = kpt_dask.evaluate("atlases", limit=1, mode="affine")
    >>> result["scans"], result["atlases"]
    (1, 2)
    >>> 0 < result["mean_dice"] <= 1
    True
    """
    *fewer, number = _numbers(atlases)
    check_count("The number of scans", limit)
    check_selection(select, index)
    store = Snapshot(AtlasStore.of(store))
    names = [pair.id for pair in scans] if scans is not None else list(store.ids())
    names = names[:limit]
    pairs = {pair.id: pair for pair in (scans or [])[:limit]}
    # Options are checked, and that there are atlases, before any scan is opened.
    options.check(mode, store.organs)
    _check_organs(cropped, store)
    if baseline is not None:
        check_baseline(baseline, registrations)
    elif registrations is not None:
        raise ParameterError("Registrations are those of a baseline; ask for one, such as syn.")
    if out is not None:
        read = [path for pair in pairs.values() for path in (pair.scan, pair.labels)]
        check_outputs(folders=[out], inputs=[store.url, *read], overwrite=overwrite)
    for name in names:
        _others(store, {name}, number)
    choose_atlases(store, ())
    with ExitStack() as stack:
        doubts = stack.enter_context(notices.recorded())
        left_out = _LeftOut(store, pairs, len(names))
        # All files are opened before the first scan is segmented, which takes long.
        for name, pair in pairs.items():
            with left_out.unless_judged(name):
                open_files(pair, store)
        session = stack.enter_context(cluster.session(client))
        folder = stack.enter_context(writing(out, overwrite=overwrite))
        advance = stack.enter_context(progress.stage("Evaluating scans", total=len(names)))
        judge = _Judge(
            store, mode, options, number, fewer, tuple(cropped), select, index, memory, session
        )
        if baseline is not None:
            kept = None if registrations is None else Path(registrations)
            judge.baseline = Baseline(store.organs, kept)
        results = {}
        for name in names:
            if name not in left_out.failed:
                with left_out.unless_judged(name):
                    known = judge.known(name, pairs.get(name))
                    results[name], picture = judge.judge(name, known, draw=folder is not None)
                    if folder is not None:
                        folder.keep(name, picture)
            advance(1)
        if not any(result.measures for result in results.values()):
            raise LabelError("No reference shows an organ, so there is nothing to compare with.")
        judge.keep_only(results)
        judge.doubt_unshown()
        summary = judge.summary(results) | {"failed": left_out.failed}
        judge.doubt_left_out()
        summary["warnings"] = list(doubts)
        if folder is not None:
            folder.write(summary, store.organs)
    return summary


@dataclass(eq=False)
class _Judge:
    """What all scans of an evaluation share; see `evaluate`."""

    store: Snapshot
    mode: str
    options: TransferOptions
    number: int | None
    fewer: Sequence[int]
    cropped: tuple[str, ...]
    select: int | None
    index: str
    memory: int | None
    client: Client
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        """Begin without results."""
        # Read once: an atlas may go after it voted.
        self._atlases = {atlas.id: atlas for atlas in self.store.atlases()}
        self._known = KnownScans(self._atlases.values())
        self._left_out: dict[str, list[str]] = {}
        self._unshown: dict[str, list[str]] = {}
        self._most: dict[int | None, int] = dict.fromkeys((*self.fewer, self.number), 0)

    def known(self, name: str, pair: Pair | None) -> KnownScan:
        """Open a scan whose labels are known: files, or the atlas of this id."""
        if pair is None:
            return KnownAtlas(self.store[name])
        share = self.options.smallest_share(self.mode)
        return KnownFiles.of(pair, self.store, share, self.memory, self.client)

    def keep_only(self, judged: Container[str]) -> None:
        """Forget what was doubtful in scans that were then left out."""
        for of_scan in (self._left_out, self._unshown):
            for name in [name for name in of_scan if name not in judged]:
                del of_scan[name]

    def judge(self, name: str, known: KnownScan, *, draw: bool) -> tuple[ScanResult, str]:
        """Segment a scan and compare it with its labels; draw it, or return an empty picture."""
        with temporary_image(self.store, self.client) as group:
            start = time.perf_counter()
            with progress.recorded() as seconds:
                volume = known.open_volume(group)
                same = self._same_scan(name, volume)
                found = self._segment(volume, group, same, self.number)
            total = time.perf_counter() - start
            reference = known.reference(volume, group)
            measures, said = reference.compare(found)
            first = first_frames(found.keypoints.position.values, found.keypoints.scale.values)
            inside = labels_at(found.keypoints.position.values, reference.labels, volume.grid)
            voted = found.votes.label.values
            counts = keypoint_votes(
                inside[first], voted[first], reference.annotated, reference.organs
            )
            background = background_votes(
                inside, found.matches, reference.annotated, reference.organs, first
            )
            claims = {n: Claim.of(said[n], reference.volumes_ml[n]) for n in measures}
            self._doubt_unshown(name, reference.annotated, found.atlases)
            result = ScanResult(measures, claims, counts, background, dict(seconds), total)
            picture = ""
            if draw:
                shown = [o for o in self.store.organs if o.name in reference.annotated]
                arrays = volume.levels[0], reference.labels, found.labels
                picture = draw_scan(*arrays, shown, float(volume.grid.spacing[0]))
            by_atlases = {}
            for number in self.fewer:
                with temporary_image(self.store, self.client, volume.group) as other:
                    again = self._segment(volume, other, same, number)
                    agreements = reference.compare(again).agreements
                    by_atlases[number] = {n: a.dice for n, a in agreements.items()}
            limited = self._limited(name, volume, reference, found, same)
            if self.baseline is not None:
                self.baseline.judge(name, volume, reference, self._used(found.atlases))
        return replace(result, by_atlases=by_atlases, limited=limited), picture

    def summary(self, results: Mapping[str, ScanResult]) -> dict[str, Any]:
        """Summarize all scans."""
        used = {n: how_many(self.select, most) for n, most in self._most.items()}
        found = summarize(results, self.store, self.mode, self.options, used[self.number])
        if self.fewer:
            rows = {n: voting for n, voting in used.items() if n is not None}
            found["by_atlases"] = numbers_of_atlases(results, rows, self.store.organs)
        if self.cropped:
            judged = [one for result in results.values() for one in result.limited]
            never = sorted({*self.cropped} - {one.around for one in judged})
            if never:
                notices.warn(f"No scan annotates {' or '.join(never)}: none was cropped around it.")
            if judged:
                found["limited_view"] = limited_view_summary(judged, self.cropped)
        if self.baseline is not None:
            found["baselines"] = self.baseline.summary()
        return found | {"left_out": self._left_out}

    def doubt_left_out(self) -> None:
        """Warn of scans that the store holds under other names."""
        if self._left_out:
            some = [f"{name} as {', '.join(ids)}" for name, ids in self._left_out.items()]
            notices.warn(
                f"{self.store.url} holds evaluated scans under other names"
                f" ({some_of(some, NAMED, '; ')}); none was segmented by its own atlas."
            )

    def doubt_unshown(self) -> None:
        """Warn of organs that could not be found, and count as such."""
        if unshown_of := [one for several in self._unshown.values() for one in several]:
            notices.warn(
                f"No atlas that was used shows {some_of(unshown_of)}, so it cannot be found, and"
                " counts with a Dice of 0; add atlases that show it, or use more of them."
            )

    def _doubt_unshown(self, name: str, annotated: Sequence[str], used: Sequence[str]) -> None:
        missing = unshown(annotated, self._used(used))
        self._unshown[name] = [f"{organ} of {name}" for organ in missing]

    def _used(self, ids: Sequence[str]) -> list[Atlas]:
        return [self._atlases[atlas_id] for atlas_id in ids if atlas_id in self._atlases]

    def _same_scan(self, name: str, volume: Volume) -> Set[str]:
        same = {*self._known.of(digest_of(volume.group), volume.grid.shape), name}
        if same != {name}:
            self._left_out[name] = sorted(same - {name})
        return same

    def _segment(
        self,
        volume: Volume,
        group: zarr.Group,
        same_scan: Set[str],
        number: int | None,
        mode: str | None = None,
    ) -> StationResults:
        """Segment a volume by all atlases but those of the same scan."""
        others = _others(self.store, same_scan, number)
        self._most[number] = max(self._most[number], len(others))
        options = self.options
        if mode not in (None, self.mode):
            # What is meant for one mode may be refused by another.
            options = replace(options, fast=False, threshold=None, across={})
        return segment_volume(
            volume,
            group,
            self.store,
            others,
            mode=mode or self.mode,
            options=options,
            select=self.select,
            index=self.index,
            memory=self.memory,
            client=self.client,
        )

    def _limited(
        self,
        name: str,
        volume: Volume,
        reference: Reference,
        found: StationResults,
        same_scan: Set[str],
    ) -> list[Judged]:
        """Judge the scan cropped around organs, by several modes, on the working grid."""
        if not self.cropped:
            return []
        organs, number = reference.organs, self.number
        [along_z, *_] = organ_profiles(reference.labels, organs.values)
        extents = {
            organ.name: (int(at[0]), int(at[-1]) + 1)
            for organ, profile in zip(organs, along_z, strict=True)
            if organ.name in reference.annotated and len(at := profile.nonzero()[0])
        }
        height, spacing = volume.grid.shape[0], float(volume.grid.spacing[0])
        crops = [crop_around(o, extents, height, spacing) for o in self.cropped if o in extents]
        if not crops:
            return []
        modes = tuple(dict.fromkeys((self.mode, *MODES)))
        whole = {}
        for mode in modes:
            with temporary_image(self.store, self.client, volume.group) as group:
                labels = found.labels
                if mode != self.mode:
                    labels = self._segment(volume, group, same_scan, number, mode).labels
                whole[mode] = dice(
                    planes(reference.labels), planes(labels), reference.annotated, organs
                )
        judged = []
        for crop in crops:
            with temporary_image(self.store, self.client) as place:
                part = cropped_volume(volume, crop, place, memory=self.memory, client=self.client)
                for mode in modes:
                    with temporary_image(self.store, self.client, part.group) as group:
                        labels = self._segment(part, group, same_scan, number, mode).labels
                        expected = planes(reference.labels, crop.first, crop.last)
                        scores = dice(expected, planes(labels), crop.inside, organs)
                    judged += [
                        Judged(name, crop.around, mode, organ, whole[mode][organ], score)
                        for organ, score in scores.items()
                    ]
        return judged


class _LeftOut:
    """Scans that cannot be judged, which do not stop the others; see `evaluate`.

    Attributes
    ----------
    failed : dict of str to str
        By scan, what is wrong with its files.
    """

    def __init__(self, store: Snapshot, pairs: Container[str], scans: int) -> None:
        self.failed: dict[str, str] = {}
        self._store = store
        self._pairs = pairs
        self._scans = scans

    @contextmanager
    def unless_judged(self, name: str) -> Iterator[None]:
        """Leave a scan out, with a warning, if it cannot be judged; the last one is an error."""
        try:
            yield
        except _FAULTS as error:
            if name not in self._pairs:
                raise
            self._leave_out(error, f"The scan {name} is left out: {error}")
            self.failed[name] = str(error)
        except AtlasStoreError as error:
            if name in self._pairs or not self._store.gone([name]):
                raise
            self._leave_out(
                error,
                f"{self._store.url}: the atlas {name} was removed or replaced while scans were"
                " evaluated, so it is left out; run this again to evaluate the store as it is now.",
            )

    def _leave_out(self, error: Exception, sentence: str) -> None:
        self._scans -= 1
        if not self._scans:
            raise error
        notices.warn(sentence)


def _others(store: AtlasStore, same_scan: Set[str], atlases: int | None) -> tuple[str, ...]:
    """Choose the atlases for a scan: never those made from it."""
    used = choose_atlases(store, [name for name in sorted(same_scan) if name in store])
    if atlases is not None and atlases > len(used):
        raise ParameterError(
            f"{store.url} has {len(used)} atlases besides {', '.join(sorted(same_scan))}, not"
            f" {atlases}; ask for fewer."
        )
    return used[:atlases]


def _numbers(atlases: int | Sequence[int] | None) -> list[Any]:
    """Sort numbers of atlases, the one of the answer last; None for all."""
    if atlases is None:
        return [None]
    numbers = sorted({atlases} if isinstance(atlases, int) else {*atlases})
    for number in numbers:
        check_count("The number of atlases", number)
    return numbers or [None]


def _check_organs(names: Sequence[str], store: AtlasStore) -> None:
    unknown = sorted({*names} - {*store.organs.names})
    if unknown:
        raise ParameterError(
            f"Scans cannot be cropped around {', '.join(unknown)}: the atlases know"
            f" {', '.join(store.organs.names)}."
        )
