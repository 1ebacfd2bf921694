"""Evaluation against known labels: Dice, the paper's Table 1, seconds of each station."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable, Snapshot
from atlas_store.arrays.regions import open_array
from atlas_store.keypoints import first_frames
from kpt_dask.annotations.opening import open_pair
from kpt_dask.atlases.add import labels_at, survey
from kpt_dask.atlases.same_scan import KnownScans
from kpt_dask.errors import ParameterError
from kpt_dask.matching.selection import check_selection, how_many
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.resampling.labels_on_scan import Shares, labels_onto
from kpt_dask.runtime import cluster, notices, progress, witness
from kpt_dask.scans.pairs import Pair, labelled_organs
from kpt_dask.scans.scan import Scan
from kpt_dask.segmentation import StationResults, choose_atlases, segment_volume
from kpt_dask.volumes.conversion import convert_into, label_blocks
from kpt_dask.volumes.identity import digest_of
from kpt_dask.volumes.omezarr import write_label_image
from kpt_dask.volumes.volume import Volume, open_volume

LIBRARIES = ("kpt-dask", "dask", "numba", "numpy", "scipy", "xarray", "zarr")
"""Libraries whose versions are stored with the results."""

NAMED = 3
"""Scans named at most in the warning that a store holds them under other ids."""

Planes = Iterator[NDArray[Any]]
SegmentVolume = Callable[[Volume, zarr.Group], StationResults]
"""Function that segments a volume and writes the label map into the group."""


@dataclass(frozen=True, eq=False)
class ScanResult:
    """Measures of one scan's segmentation.

    Attributes
    ----------
    dice : dict of str to float
        Dice coefficient by organ, of those that the reference annotates.
    keypoints : dict of str to (int, int, int)
        Numbers by organ: keypoints in it, those that got a vote, those whose vote is right.
    seconds : dict of str to float
        Time by station, seconds.
    total : float
        Seconds from the scan or its volume to the label map.
    """

    dice: Mapping[str, float]
    keypoints: Mapping[str, tuple[int, int, int]]
    seconds: Mapping[str, float]
    total: float


def evaluate(
    store: AtlasStore,
    scans: Sequence[Pair] | None = None,
    *,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    atlases: int | None = None,
    limit: int | None = None,
    select: int | None = None,
    index: str = "auto",
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
    `client` must see.

    Parameters
    ----------
    store : AtlasStore
        The atlases.
    scans : sequence of Pair, optional
        From `kpt_dask.annotations.layouts.pairs_of`.
    mode, options
        As for `kpt_dask.segment`.
    atlases : int, optional
        Number of atlases to use: the first in natural order other than the scan itself.
    limit : int, optional
        Number of scans to evaluate: the first.
    select, index, memory, client
        As for `kpt_dask.segment`.

    Returns
    -------
    dict
        In JSON types:
        ``mean_dice``, over all pairs of a scan and an organ that its reference annotates;
        ``dice_by_organ``, its mean over the scans;
        ``dice``, by scan and organ;
        ``keypoints`` (the paper's Table 1), by organ: ``mean``, the number of a scan's
        keypoints in the organ, ``labelled``, how many per cent of them got a vote, and
        ``correct``, how many per cent of these are right, both None where there is none;
        ``seconds``, mean of a scan by station, ``total`` from scan to label map;
        ``scans`` and ``atlases``, how many, atlases for each scan;
        ``left_out``, by scan, which atlases were made from it, if they have other names;
        ``warnings``, what was doubtful, one sentence each;
        ``mode``, ``transfer`` (its options), ``store``, ``versions``.

    Raises
    ------
    ParameterError
        If a number is not positive or larger than there are atlases, or the mode is unknown.
    EmptyStoreError
        If no atlas is left for a scan.
    KptError, AtlasStoreError
        If a scan, a reference or the store cannot be used.

    References
    ----------
    C. Wachinger, M. Toews, G. Langs, W. Wells, P. Golland, "Keypoint Transfer for Fast
    Whole-Body Segmentation", IEEE Transactions on Medical Imaging 39(2), 273–282, 2020,
    https://doi.org/10.1109/TMI.2018.2851194.

    Examples
    --------
    >>> import kpt_dask
    >>> from atlas_store import AtlasStore
    >>> result = kpt_dask.evaluate(AtlasStore.open("atlases"), limit=1, mode="affine")
    >>> result["scans"], result["atlases"]
    (1, 2)
    >>> 0 < result["mean_dice"] <= 1
    True
    """
    _check_positive("atlases", atlases)
    _check_positive("scans", limit)
    check_selection(select, index)
    store = Snapshot(store)
    names = [pair.id for pair in scans] if scans is not None else list(store.ids())
    names = names[:limit]
    # Options are checked, and that there are atlases, before any scan is opened.
    options.check(mode, store.organs)
    for name in names:
        _others(store, {name}, atlases)
    choose_atlases(store, ())
    pairs = {pair.id: pair for pair in (scans or [])[:limit]}
    for pair in pairs.values():
        _open(pair, store)
    results: dict[str, ScanResult] = {}
    known, most, left_out = KnownScans(store.atlases()), 0, {}
    with (
        notices.recorded() as doubts,
        cluster.session(client) as session,
        progress.stage("Evaluating scans", total=len(names)) as advance,
    ):
        for name in names:
            with ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kpt-evaluate-"))
                # Workers may have another current folder.
                place = Path(folder).absolute() / "scan.zarr"
                group = zarr.create_group(str(place), zarr_format=3)
                stack.enter_context(witness.shared(session, group, store.documents()))

                def segment_with_others(
                    volume: Volume, group: zarr.Group, name: str = name
                ) -> StationResults:
                    nonlocal most
                    same_scan = {*known.of(digest_of(volume.group), volume.grid.shape), name}
                    others = _others(store, same_scan, atlases)
                    most = max(most, len(others))
                    if same_scan != {name}:
                        left_out[name] = sorted(same_scan - {name})
                    return segment_volume(
                        volume,
                        group,
                        store,
                        others,
                        mode=mode,
                        options=options,
                        select=select,
                        index=index,
                        memory=memory,
                        client=session,
                    )

                if name in pairs:
                    results[name] = _evaluate_pair(
                        pairs[name],
                        group,
                        store,
                        segment_with_others,
                        options.smallest_share(mode),
                        memory,
                        session,
                    )
                else:
                    results[name] = _evaluate_atlas(store[name], group, segment_with_others)
            advance(1)
        _doubt_left_out(store, left_out)
    summary = _summary(results, store, mode, options, how_many(select, most))
    return summary | {"left_out": left_out, "warnings": list(doubts)}


def _doubt_left_out(store: AtlasStore, left_out: Mapping[str, Sequence[str]]) -> None:
    """Warn of scans that the store holds under other names."""
    if left_out:
        some = [f"{name} as {', '.join(ids)}" for name, ids in left_out.items()]
        more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
        notices.warn(
            f"{store.url} holds evaluated scans under other names"
            f" ({'; '.join(some[:NAMED])}{more}); none was segmented by its own atlas."
        )


def dice(
    reference: Iterable[NDArray[Any]],
    found: Iterable[NDArray[Any]],
    annotated: Iterable[str],
    organs: OrganTable,
) -> dict[str, float]:
    """Dice of each annotated organ: twice the overlap over the sum of both.

    Parameters
    ----------
    reference, found : iterable of ndarray
        Two label maps as the same sequence of parts.
    annotated : iterable of str
        The organs that the reference annotates.
    organs : OrganTable
        Label values by name.

    Returns
    -------
    dict of str to float
        By organ, in the order of the table. An annotated organ that neither shows is
        right: 1.
    """
    size = max(organs.values) + 1
    both, total = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for expected, actual in zip(reference, found, strict=True):
        total += np.bincount(expected.ravel(), minlength=size)
        total += np.bincount(actual.ravel(), minlength=size)
        both += np.bincount(expected[expected == actual], minlength=size)
    wanted = set(annotated)
    return {
        organ.name: float(2 * both[organ.value] / total[organ.value]) if total[organ.value] else 1.0
        for organ in organs
        if organ.name in wanted
    }


def keypoint_votes(
    inside: NDArray[np.uint16],
    voted: NDArray[np.uint16],
    annotated: Iterable[str],
    organs: OrganTable,
) -> dict[str, tuple[int, int, int]]:
    """Count, for each annotated organ, its keypoints, those with a vote, and the right votes.

    Parameters
    ----------
    inside : ndarray (keypoint), uint16
        Label of the reference where each keypoint lies.
    voted : ndarray (keypoint), uint16
        Label that its matches voted for, 0 for none.
    """
    counts = {}
    for name in annotated:
        value = organs.by_name(name).value
        votes = voted[inside == value]
        counts[name] = (
            int(votes.size),
            int(np.count_nonzero(votes)),
            int(np.count_nonzero(votes == value)),
        )
    return counts


def _evaluate_atlas(
    atlas: Atlas, group: zarr.Group, segment_with_others: SegmentVolume
) -> ScanResult:
    volume = open_volume(atlas.image)
    group.update_attributes({"ome": atlas.image.attrs["ome"]})
    start = time.perf_counter()
    with progress.recorded() as seconds:
        found = segment_with_others(volume, group)
    total = time.perf_counter() - start
    labels, organs = atlas.labels, atlas.organ_table
    inside = labels_at(found.keypoints.position.values, labels, volume.grid)
    scores = dice(_planes(labels), _planes(found.labels), atlas.annotated, organs)
    atlas.ensure_present()
    return _result(scores, inside, found, atlas.annotated, organs, seconds, total)


def _open(pair: Pair, store: AtlasStore) -> tuple[Scan, Scan]:
    return open_pair(pair.scan, pair.labels, store.organs, values=pair.values, series=pair.series)


def _evaluate_pair(
    pair: Pair,
    group: zarr.Group,
    store: AtlasStore,
    segment_with_others: SegmentVolume,
    threshold: float,
    memory: int | None,
    client: Client,
) -> ScanResult:
    scan, labels = _open(pair, store)
    organs = store.organs
    annotated = labelled_organs(labels, organs)
    start = time.perf_counter()
    with progress.recorded() as seconds:
        spacing: float = store.parameters["spacing"]
        volume = convert_into(scan, group, spacing=spacing, memory=memory, client=client)
        found = segment_with_others(volume, group)
    total = time.perf_counter() - start
    blocks = label_blocks(labels, volume)
    reference = write_label_image(group, "reference", blocks, volume.grid, organs)
    level = open_array(reference, "0")
    remaining = survey(level, volume.grid, organs)
    if lost := [name for name in annotated if name not in remaining]:
        notices.warn(
            f"{labels.path} shows {', '.join(lost)} in so few voxels that none is left at"
            f" {volume.grid.spacing[0]:g} mm: not counted as annotated."
        )
        annotated = tuple(name for name in annotated if name in remaining)
    inside = labels_at(found.keypoints.position.values, level, volume.grid)
    shares = Shares(found.probability, organs.values, threshold, volume.grid)
    actual = labels_onto(shares, scan.grid)
    scores = dice(_each_plane(labels.label_slabs()), _each_plane(actual), annotated, organs)
    return _result(scores, inside, found, annotated, organs, seconds, total)


def _result(
    scores: dict[str, float],
    inside: NDArray[np.uint16],
    found: StationResults,
    annotated: Sequence[str],
    organs: OrganTable,
    seconds: dict[str, float],
    total: float,
) -> ScanResult:
    first = first_frames(found.keypoints.position.values, found.keypoints.scale.values)
    votes = keypoint_votes(inside[first], found.votes.label.values[first], annotated, organs)
    return ScanResult(scores, votes, dict(seconds), total)


def _summary(
    results: Mapping[str, ScanResult],
    store: AtlasStore,
    mode: str,
    options: TransferOptions,
    atlases: int,
) -> dict[str, Any]:
    by_organ = {
        name: [result.dice[name] for result in results.values() if name in result.dice]
        for name in store.organs.names
    }
    stations = dict.fromkeys(name for result in results.values() for name in result.seconds)
    seconds = {
        name: float(np.mean([result.seconds.get(name, 0.0) for result in results.values()]))
        for name in stations
    }
    return {
        "mean_dice": float(np.mean([value for values in by_organ.values() for value in values])),
        "dice_by_organ": {n: float(np.mean(values)) for n, values in by_organ.items() if values},
        "dice": {name: dict(result.dice) for name, result in results.items()},
        "keypoints": _table1(results, store.organs),
        "seconds": seconds | {"total": float(np.mean([r.total for r in results.values()]))},
        "scans": len(results),
        "atlases": atlases,
        "mode": mode,
        "transfer": options.to_json(mode, store.organs),
        "store": {"url": store.url, "uuid": store.uuid, "parameters": dict(store.parameters)},
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _table1(results: Mapping[str, ScanResult], organs: OrganTable) -> dict[str, Any]:
    """Average the keypoint statistics as the paper's Table 1 does."""
    table = {}
    for name in organs.names:
        counts = np.array([r.keypoints[name] for r in results.values() if name in r.keypoints])
        if counts.size:
            inside, labelled, correct = counts.sum(axis=0).tolist()
            table[name] = {
                "mean": inside / len(counts),
                "labelled": 100 * labelled / inside if inside else None,
                "correct": 100 * correct / labelled if labelled else None,
            }
    return table


def _others(store: AtlasStore, same_scan: Set[str], atlases: int | None) -> tuple[str, ...]:
    """Choose the atlases for a scan: never those made from it."""
    used = choose_atlases(store, [name for name in sorted(same_scan) if name in store])
    if atlases is not None and atlases > len(used):
        raise ParameterError(
            f"{store.url} has {len(used)} atlases besides {', '.join(sorted(same_scan))}, not"
            f" {atlases}; ask for fewer."
        )
    return used[:atlases]


def _planes(array: "zarr.Array[Any]") -> Planes:
    """Read a label map plane by plane, chunk by chunk."""
    depth = (array.shards or array.chunks)[0]
    return _each_plane(array[z : z + depth] for z in range(0, array.shape[0], depth))


def _each_plane(slabs: Iterable[Any]) -> Planes:
    for slab in slabs:
        yield from np.asarray(slab)


def _check_positive(what: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ParameterError(f"The number of {what} must be at least 1, not {number}.")
