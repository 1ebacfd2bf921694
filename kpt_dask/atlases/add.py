"""Making atlases of annotated scans: volume, labels, crop, strips and labelled keypoints.

An atlas appears in the store when it is complete, or not at all.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import (
    AtlasExistsError,
    AtlasInfo,
    AtlasStore,
    AtlasStoreError,
    OrganInfo,
    OrganTable,
    ParameterMismatchError,
)
from atlas_store.arrays.regions import Region, open_array
from atlas_store.crop import write_crop
from atlas_store.organ_strips import write_strips
from atlas_store.storage.digests import digest_of_file
from kpt_dask.annotations.layouts import pairs_of
from kpt_dask.annotations.opening import open_pair
from kpt_dask.atlases.profiles import organ_profiles
from kpt_dask.atlases.same_scan import KnownScans
from kpt_dask.errors import USER_ERRORS, LabelError, ParameterError
from kpt_dask.grid import Grid
from kpt_dask.keypoints.extraction import extract
from kpt_dask.keypoints.parameters import keypoint_parameters
from kpt_dask.options import SPACINGS
from kpt_dask.runtime import cluster, notices, progress, witness
from kpt_dask.scans.pairs import labelled_organs
from kpt_dask.scans.scan import Scan, scan_name
from kpt_dask.volumes.conversion import AIR_HU, convert_into, label_blocks
from kpt_dask.volumes.identity import digest_of
from kpt_dask.volumes.omezarr import write_label_image


@dataclasses.dataclass(frozen=True)
class AddOutcome:
    """Result of adding one scan of a folder.

    Attributes
    ----------
    id : str
        Id of the atlas.
    info : AtlasInfo or None
        Marker of the atlas, if it was added.
    problem : str or None
        Reason why it could not be added. Both are None if the store had the atlas already.
    """

    id: str
    info: AtlasInfo | None = None
    problem: str | None = None


def store_parameters(
    spacing: float = 2.0, *, descriptor: str = "upright", finer: bool = False
) -> dict[str, Any]:
    """Parameters that all atlases of a store are made with, for `AtlasStore.create`.

    Parameters
    ----------
    spacing : float
        Voxel size of the working grid, mm.
    descriptor, finer
        As for `kpt_dask.extract`.

    Raises
    ------
    ParameterError
        If the spacing is none of `kpt_dask.options.SPACINGS`, or the descriptor is unknown.

    Returns
    -------
    dict
        In JSON types: the spacing (mm) and what keypoints are extracted with.

    Examples
    --------
    >>> import kpt_dask
    >>> kpt_dask.store_parameters(4.0)["spacing"]
    4.0
    """
    if not SPACINGS[0] <= spacing <= SPACINGS[1]:
        raise ParameterError(
            f"The spacing must be a number from {SPACINGS[0]:g} to {SPACINGS[1]:g} mm, not"
            f" {spacing:g}."
        )
    return {"spacing": float(spacing), **keypoint_parameters(descriptor, finer)}


def add_atlas(
    store: AtlasStore | str | Path,
    scan: str | Path,
    labels: str | Path,
    *,
    atlas_id: str | None = None,
    annotated: Sequence[str] | None = None,
    values: Mapping[int, str] | None = None,
    series: str | None = None,
    replace: bool = False,
    relabelled: AtlasInfo | None = None,
    memory: int | None = None,
    client: Client | None = None,
) -> AtlasInfo:
    """Add an annotated scan to a store.

    Parameters
    ----------
    store : AtlasStore, str or Path
        Created with `store_parameters`.
    scan, labels : str or Path
        A scan and its labels on the same grid: a label map with the values of the store's organ
        table; or a folder with a mask for each organ, ``.seg.nrrd``, DICOM SEG or RTSTRUCT, whose
        names decide.
    atlas_id : str, optional
        Its name in the store; the scan's file name without ending unless given.
    annotated : sequence of str, optional
        Names of the organs that the annotator looked for; by default those whose labels occur on
        the working grid. An organ that vanishes there, such as a stray voxel, is left out with a
        warning. Labelled organs that are not named are left out of the atlas: they neither vote
        nor are transferred. Named organs without a label are known to be outside the scan.
    values : mapping of int to str, optional
        Names of the values of a label map, where they are not those of the store.
    series : str, optional
        UID of the DICOM series, needed where a folder or zip holds several.
    replace : bool
        Whether to replace an existing atlas of this id; it stays until the new one is complete.
    relabelled : AtlasInfo, optional
        Marker of the atlas of the store whose scan this is: where the scan came from, and the note,
        stay.
    memory : int, optional
        Memory budget of extraction in each process, bytes.
    client : distributed.Client, optional
        Client whose workers compute blocks; by default the current one, else threads of this
        process.

    Returns
    -------
    AtlasInfo
        Marker of the atlas.

    Raises
    ------
    GridMismatchError
        If the labels lie on another grid than the scan.
    LabelError
        If there is no label, or one that the organ table does not know.
    AtlasNotFoundError
        If the atlas to replace was replaced or removed meanwhile.
    ScanFormatError
        If the values of the scan cannot be HU, as of MR or PET.
    KptError, AtlasStoreError
        If a file, an option or the store cannot be used. The store is left as it was.

    Examples
    --------
    >>> import kpt_dask
    >>> from atlas_store import AtlasStore, load_organs
    >>> store = AtlasStore.create("one", load_organs(), kpt_dask.store_parameters(4.0))
    >>> info = kpt_dask.add_atlas("one", "body_1_ct.nii.gz", "body_1_seg.nii.gz", atlas_id="first")
    >>> info.id, len(store)
    ('first', 1)
    """
    store = AtlasStore.of(store)
    source, labelled = open_pair(scan, labels, store.organs, values=values, series=series)
    # Of an atlas that is there already, the labels alone are new.
    source = dataclasses.replace(source, must_be_hu=relabelled is None)
    made_with = store_parameters(
        store.parameters.get("spacing", 2.0),
        descriptor=store.parameters.get("descriptor", "upright"),
        finer=store.parameters.get("finer", False),
    )
    name = scan_name(source.path) if atlas_id is None else atlas_id
    with store.draft(name, made_with, replace=relabelled or replace) as draft:
        if relabelled is not None:
            draft.keep_note()
        wanted = _annotated(labelled, store.organs, annotated)
        image = draft.group.create_group("image")
        with cluster.session(client) as session, witness.shared(session, image):
            spacing: float = made_with["spacing"]
            volume = convert_into(source, image, spacing=spacing, memory=memory, client=session)
            digest = digest_of(image)
            _doubt_twice(store, name, digest, volume.grid.shape)
            blocks = _mask_labels(label_blocks(labelled, volume), store.organs, wanted)
            write_label_image(image, "organs", blocks, volume.grid, store.organs)
            keypoints = extract(
                volume,
                descriptor=made_with["descriptor"],
                finer=made_with["finer"],
                memory=memory,
                client=session,
            )
        voxels = open_array(image, "labels/organs/0")
        organs = survey(voxels, volume.grid, store.organs)
        if not organs:
            raise LabelError(
                f"{labels} shows no organ that is left at {made_with['spacing']:g} mm; use a"
                " store of a smaller spacing."
            )
        wanted = _surviving(labelled, wanted, organs, annotated is not None, made_with["spacing"])
        what = organs, store.organs
        held, coding = write_crop(
            draft.group, volume.levels[0], voxels, *what, float(volume.grid.spacing[0]), int(AIR_HU)
        )
        write_strips(draft.group, held, coding, *what)
        label = labels_at(keypoints.position.values, voxels, volume.grid)
        z, y, x = volume.grid.spacing.tolist()
        z0, y0, x0 = volume.grid.origin.tolist()
        return draft.commit(
            keypoints.assign(label=("keypoint", label)),
            annotated=wanted,
            organs=organs,
            shape=volume.grid.shape,
            spacing=(z, y, x),
            origin=(z0, y0, x0),
            source=(_scan_source(source, relabelled), labelled.path),
            scan_digest=digest,
        )


def add_folder(
    store: AtlasStore | str | Path,
    folder: str | Path,
    *,
    layout: str | None = None,
    scan_pattern: str | None = None,
    labels_pattern: str | None = None,
    annotated: Sequence[str] | None = None,
    series: str | None = None,
    replace: bool = False,
    memory: int | None = None,
    client: Client | None = None,
    told: Callable[[AddOutcome], None] | None = None,
) -> list[AddOutcome]:
    """Add every scan of a folder that has a label map; a bad one does not stop the others.

    Parameters
    ----------
    store, annotated, memory, client
        As for `add_atlas`.
    folder : str or Path
        Folder of the scans.
    layout : str, optional
        Layout of a public collection, one of `kpt_dask.annotations.layouts.LAYOUTS`: patterns, and
        what values mean.
    scan_pattern, labels_pattern : str, optional
        Patterns as for `kpt_dask.scans.pairs.find_pairs`; the text at ``{id}`` is the id of the
        atlas.
    series : str, optional
        UID of the DICOM series, or words of its description, in every scan that holds several.
    replace : bool
        Whether to replace existing atlases; otherwise they are skipped, with a warning where one
        was made from another file than that of its id.
    told : callable, optional
        Callback for each outcome, as soon as it is known.

    Returns
    -------
    list of AddOutcome
        One for each scan, in natural order of the ids.

    Raises
    ------
    ParameterError, ScanNotFoundError
        If there is nothing to add; see `kpt_dask.scans.pairs.find_pairs`.
    ParameterMismatchError
        If the store was made with other parameters.

    Examples
    --------
    >>> import kpt_dask
    >>> from atlas_store import AtlasStore, load_organs
    >>> store = AtlasStore.create("some", load_organs(), kpt_dask.store_parameters(4.0))
    >>> outcomes = kpt_dask.add_folder("some", "scans")
    >>> [outcome.id for outcome in outcomes]
    ['body_2']
    """
    store = AtlasStore.of(store)
    outcomes = []
    pairs = pairs_of(folder, layout, scan_pattern, labels_pattern, series)
    with (
        cluster.session(client) as session,
        progress.stage("Adding atlases", total=len(pairs)) as advance,
    ):
        for pair in pairs:
            outcome = AddOutcome(pair.id)
            if not replace and pair.id in store:
                _doubt_there(store, pair.id, pair.scan)
            else:
                try:
                    info = add_atlas(
                        store,
                        pair.scan,
                        pair.labels,
                        atlas_id=pair.id,
                        annotated=annotated,
                        values=pair.values,
                        series=pair.series,
                        replace=replace,
                        memory=memory,
                        client=session,
                    )
                    outcome = AddOutcome(pair.id, info)
                except AtlasExistsError:
                    pass
                except ParameterMismatchError:
                    raise
                except USER_ERRORS as error:
                    outcome = AddOutcome(pair.id, problem=str(error))
            outcomes.append(outcome)
            if told is not None:
                told(outcome)
            advance(1)
    return outcomes


def survey(labels: "zarr.Array[Any]", grid: Grid, organs: OrganTable) -> dict[str, OrganInfo]:
    """Measure the organs that a label map shows, in one streamed pass.

    Parameters
    ----------
    labels : zarr.Array (z, y, x)
        On the working grid.
    grid : Grid
        Its grid.
    organs : OrganTable
        The organs to look for.

    Returns
    -------
    dict of str to OrganInfo
        By name, in the order of the table; keypoints are not counted.
    """
    profiles = organ_profiles(labels, organs.values)
    found = {}
    for i, organ in enumerate(organs):
        along = [profile[i] for profile in profiles]
        voxels = int(along[0].sum())
        if voxels:
            z, y, x = ((int(p.nonzero()[0][0]), int(p.nonzero()[0][-1]) + 1) for p in along)
            centre = grid.to_mm([np.arange(p.size) @ p / voxels for p in along])
            found[organ.name] = OrganInfo(
                voxels, (z, y, x), (float(centre[0]), float(centre[1]), float(centre[2]))
            )
    return found


def labels_at(
    position: NDArray[np.float32], labels: "zarr.Array[Any]", grid: Grid
) -> NDArray[np.uint16]:
    """Label of the voxel nearest to each point.

    Parameters
    ----------
    position : ndarray (n, 3), float32
        (z, y, x) in mm; what lies outside belongs to the nearest edge.
    labels : zarr.Array (z, y, x)
        The label map.
    grid : Grid
        Its grid.

    Returns
    -------
    ndarray (n), uint16
    """
    voxel = np.floor(grid.to_index(position) + 0.5).astype(np.int64)
    z, y, x = np.clip(voxel, 0, np.array(grid.shape) - 1).T
    if not len(z):
        return np.zeros(0, np.uint16)
    return np.asarray(labels.vindex[z, y, x]).astype(np.uint16)


def _scan_source(scan: Scan, relabelled: AtlasInfo | None) -> Any:
    if relabelled is None or not relabelled.source:
        return scan.path
    digests = relabelled.source_digests
    return relabelled.source[0], digests[0] if digests else None


def _annotated(
    labels: Scan, organs: OrganTable, annotated: Sequence[str] | None
) -> tuple[str, ...]:
    """Name the annotated organs, in the order of the table."""
    shown = labelled_organs(labels, organs)
    if annotated is None:
        return shown
    wanted = {organs.by_name(name).name for name in annotated}
    if not wanted.intersection(shown):
        raise LabelError(
            f"{labels.path} shows none of the organs that are said to be annotated; it shows"
            f" {', '.join(shown)}."
        )
    return tuple(name for name in organs.names if name in wanted)


def _surviving(
    labels: Scan, wanted: tuple[str, ...], found: Container[str], asked: bool, spacing: float
) -> tuple[str, ...]:
    """Leave out the organs that vanish on the working grid, unless they were named."""
    lost = [name for name in wanted if name not in found]
    if lost and asked:
        notices.warn(
            f"{labels.path} shows no {', '.join(lost)} at {spacing:g} mm: kept as annotated and"
            " not in the scan, as --annotated says."
        )
    elif lost:
        notices.warn(
            f"{labels.path} shows {', '.join(lost)} in so few voxels that none is left at"
            f" {spacing:g} mm: not counted as annotated; name the organs with --annotated if"
            " whoever annotated the scan looked for them."
        )
    return wanted if asked else tuple(name for name in wanted if name in found)


def _doubt_twice(store: AtlasStore, name: str, digest: str, shape: tuple[int, int, int]) -> None:
    """Warn if the store holds the scan under another id."""
    others = (atlas for atlas in store.atlases() if atlas.id != name)
    if same := KnownScans(others).of(digest, shape):
        notices.warn(
            f"The scan of {name} is in {store.url} already, as {', '.join(same)}: its labels vote"
            f" twice; remove one with kpt atlas remove."
        )


def _doubt_there(store: AtlasStore, atlas_id: str, scan: str | Path) -> None:
    """Warn if the atlas of this id was made from another file.

    Its voxels would tell whether it is another scan, but reading them takes long.
    """
    try:
        digests = store[atlas_id].info.source_digests
    except AtlasStoreError:
        # Removed meanwhile, or damaged, which kpt atlas verify tells.
        return
    before, now = digests[0] if digests else None, digest_of_file(scan)
    if None not in (before, now) and before != now:
        notices.warn(
            f"{scan} is not the file that {atlas_id} in {store.url} was made from, so it was not"
            " added: add it under another id with kpt atlas add --id, or all anew with --overwrite."
        )


def _mask_labels(
    blocks: Iterable[tuple[Region, NDArray[np.uint16]]],
    organs: OrganTable,
    names: Iterable[str],
) -> Iterator[tuple[Region, NDArray[np.uint16]]]:
    """Set the labels of organs that are not annotated to 0."""
    kept = np.zeros(1 << 16, np.uint16)
    for name in names:
        kept[organs.by_name(name).value] = organs.by_name(name).value
    for region, part in blocks:
        yield region, kept[part]
