"""Segmentation of a scan: all stations in order, from the file to the label map."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import (
    Atlas,
    AtlasKeypoints,
    AtlasNotFoundError,
    AtlasStore,
    EmptyStoreError,
    OrganTable,
    Snapshot,
    write_keypoints,
)
from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import open_array
from atlas_store.keypoints import first_frames
from kpt_dask.atlases.same_scan import KnownScans
from kpt_dask.errors import ParameterError
from kpt_dask.keypoints.extraction import extract
from kpt_dask.keypoints.parameters import CHOICES, PARAMETERS
from kpt_dask.label_files.request import LabelRequest
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.selection import (
    BY_ORGANS,
    annotating,
    check_selection,
    how_many,
    propose_atlases,
    restrict_to,
    select_atlases,
)
from kpt_dask.matching.voting import vote, votes_for
from kpt_dask.options import DEFAULTS, SPACINGS, TransferOptions, check_organs
from kpt_dask.organ_transfer.delivery import Decision, decided
from kpt_dask.organ_transfer.doubts import (
    doubt_alone,
    doubt_disagreement,
    doubt_hu,
    doubt_little,
    doubt_unshown,
    doubt_volumes,
    unshown,
)
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.measures import OrganMeasures, as_delivered, organ_measures
from kpt_dask.organ_transfer.modes import transfer
from kpt_dask.organ_transfer.probability import TILING, create_probability
from kpt_dask.output.commit import replacing_together
from kpt_dask.output.places import check_outputs
from kpt_dask.remote import Remote
from kpt_dask.report.writing import ReportRequest, findings_of
from kpt_dask.resampling.labels_on_scan import Shares
from kpt_dask.runtime import cluster, notices, witness
from kpt_dask.scans.label_header import RUN
from kpt_dask.scans.scan import Scan, open_scan
from kpt_dask.volumes.conversion import convert_into
from kpt_dask.volumes.identity import digest_of
from kpt_dask.volumes.lazy import lazy_array
from kpt_dask.volumes.omezarr import create_label_image, finish_label_image
from kpt_dask.volumes.volume import Volume, open_volume

ENCODING_TYPE = "kpt-segmentation"
ENCODING_VERSION = "1"


@dataclass(frozen=True, eq=False)
class StationResults:
    """Results of the stations between a volume and its label map.

    Attributes
    ----------
    atlases : tuple of str
        The atlases that were used.
    keypoints, matches, votes : xarray.Dataset
        From `kpt_dask.extract`, `kpt_dask.match` and `kpt_dask.vote`.
    labels : zarr.Array
        The label map on the working grid, (z, y, x).
    label_levels : tuple of zarr.Array
        The label map and its coarser levels.
    probability : zarr.Array
        The organs' shares on the working grid, (organ, z, y, x).
    organs : mapping of str to OrganMeasures
        What was found of each organ, in the order of the table.
    weights : float64 array (organ, atlas)
        Part of each atlas in an organ's votes.
    """

    atlases: tuple[str, ...]
    keypoints: xr.Dataset
    matches: xr.Dataset
    votes: xr.Dataset
    labels: "zarr.Array[Any]"
    label_levels: tuple["zarr.Array[Any]", ...]
    probability: "zarr.Array[Any]"
    organs: Mapping[str, OrganMeasures]
    weights: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A finished segmentation.

    Attributes
    ----------
    path : Path or Remote
        Absolute path, or URL, of the OME-Zarr output: the scan, ``labels/organs``, ``probability``,
        ``keypoints``, ``matches``, ``votes``, and its provenance as attribute ``kpt``.
    organs : mapping of str to OrganMeasures
        What was found of each organ, in the order of the organ table.
    volume_grid : str
        Grid of the label map that `volume_ml` of the organs was measured on: "scan" for the
        scan's own grid, if a label map was written on it, else "working".
    atlases : tuple of str
        The atlases that were used.
    n_keypoints, n_matches : int
        Numbers of keypoints of the scan, and of matches with all atlases.
    seconds : float
        Wall time of the whole way.
    warnings : tuple of str
        Doubts about the scan or the answer, one sentence each.
    unshown : tuple of str
        Organs that no atlas that was used shows, which could not be found.
    """

    path: Path | Remote
    organs: Mapping[str, OrganMeasures]
    volume_grid: str
    atlases: tuple[str, ...]
    n_keypoints: int
    n_matches: int
    seconds: float
    warnings: tuple[str, ...] = ()
    unshown: tuple[str, ...] = ()

    def open_probability(self) -> xr.DataArray:
        """Open the probabilities lazily; see `open_probability`."""
        return open_probability(self.path)


def segment(
    scan: str | Path,
    store: AtlasStore | str | Path,
    out: str | Path,
    *,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    exclude: Sequence[str] = (),
    select: int | None = None,
    index: str = "auto",
    series: str | None = None,
    labels: str | Path | Sequence[str | Path] | None = None,
    split: str | Path | None = None,
    organs: Sequence[str] = (),
    largest: bool = False,
    report: str | Path | None = None,
    picture: str | Path | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    client: Client | None = None,
) -> Segmentation:
    """Segment a scan from the annotated atlases of a store.

    Parameters
    ----------
    scan : str or Path
        A file or folder that `kpt_dask.scans.scan.open_scan` reads.
    store : AtlasStore, str or Path
        The atlases.
    out : str or Path
        Folder of the OME-Zarr output, or its URL in an object store (s3://…), to which it is
        uploaded when it is complete.
    mode : str
        One of `kpt_dask.options.MODES`.
    options : TransferOptions
        Threshold, ν, widths of kernels.
    exclude : sequence of str
        Ids of atlases to leave out.
    select : int, optional
        Use only so many atlases, those that agree best with the scan, and all if there are no
        more; `kpt_dask.matching.selection.USUAL` if not given.
    index : str
        Search for these atlases: one of `atlas_store.index.search.MODES`.
    series : str, optional
        UID of the DICOM series, needed where a folder or zip holds several.
    labels : str, Path or sequence of these, optional
        Files for the label map on the scan's own grid, each in the format that its ending names:
        ``.nii.gz``, ``.nii``, ``.nrrd``, ``.seg.nrrd`` (3D Slicer), ``.mha``, ``.dcm`` (DICOM SEG),
        ``rtstruct:FILE.dcm``, ``.label`` (names and colours for ITK-SNAP).
    split : str or Path, optional
        Folder for a mask of each organ on the scan's own grid, ``NAME.nii.gz``.
    organs : sequence of str
        Names of the organs to segment; all of the store if empty. A few take less time: one of
        seven of the head and neck a third. Their labels differ a little from those of all organs,
        which compete for voxels and help to align the atlases: Dice of both 0.91 to 0.98 there,
        and no difference to the annotation beyond chance.
    largest : bool
        Whether label files keep only the largest connected component of each organ.
    report : str or Path, optional
        HTML file that shows the answer and why; see `kpt_dask.write_report`.
    picture : str or Path, optional
        PNG of a slide's size: the organs over three slices.
    overwrite : bool
        Whether outputs of earlier runs may be replaced; they are kept until the new ones are
        complete. The ``run`` in the attribute ``kpt`` of `out` is also in the header field
        ``descrip`` of NIfTI label maps: outputs of one run have the same.
    memory : int, optional
        Bytes that each station may take in each process.
    client : distributed.Client, optional
        Client whose workers compute; by default the current one, else threads of this process.

    Raises
    ------
    KptError, AtlasStoreError
        One sentence on what is wrong with an input or an option; nothing is left half-written.

    Returns
    -------
    Segmentation
        Volumes (mL) and mean intensities (HU) of the organs, and where the arrays lie.

    References
    ----------
    C. Wachinger, M. Toews, G. Langs, W. Wells, P. Golland, "Keypoint Transfer for Fast
    Whole-Body Segmentation", IEEE Transactions on Medical Imaging 39(2), 273–282, 2020,
    https://doi.org/10.1109/TMI.2018.2851194.

    Examples
    --------
    >>> import kpt_dask
    >>> found = kpt_dask.segment(
    ...     "body_4_ct.nii.gz", "atlases", "out.zarr", mode="affine", labels="organs.nii.gz"
    ... )
    >>> found.atlases, found.volume_grid
    (('body_1', 'body_2', 'body_3'), 'scan')
    >>> found.organs["liver"].volume_ml > 0
    True
    """
    start = time.perf_counter()
    store = Snapshot(AtlasStore.of(store))
    with notices.recorded() as doubts:
        source = open_scan(scan, series=series)
    table, used = choose(
        store,
        mode=mode,
        options=options,
        exclude=exclude,
        select=select,
        index=index,
        organs=organs,
    )
    request = LabelRequest.parse(labels, split, largest=largest)
    request.check(table, source.grid)
    shown = ReportRequest.parse(report, picture)
    label_files = request.targets(table)
    files = [*label_files, *shown.targets()]
    inputs = (source.path, store.url)
    targets = check_outputs(images=[out], files=files, inputs=inputs, overwrite=overwrite)
    with ExitStack() as stack:
        later = stack.enter_context(notices.recorded())
        session = stack.enter_context(cluster.session(client))
        partials = stack.enter_context(replacing_together(targets, overwrite=overwrite))
        group = zarr.create_group(str(partials[0]), zarr_format=3)
        stack.enter_context(witness.shared(session, group, store.documents()))
        spacing: float = store.parameters["spacing"]
        volume = convert_into(source, group, spacing=spacing, memory=memory, client=session)
        atlases = [atlas for atlas in store.atlases() if atlas.id in used]
        _doubt_itself(source, volume, store, atlases)
        found = segment_volume(
            volume,
            group,
            store,
            used,
            organs=table,
            mode=mode,
            options=options,
            select=select,
            index=index,
            memory=memory,
            client=session,
        )
        said = _provenance(group, found, table, mode, options, store)
        measures, volume_grid = found.organs, "working"
        threshold = options.smallest_share(mode)
        if request:
            decision = Decision(
                Shares(found.probability, table.values, threshold, volume.grid),
                table,
                table.values,
                source.grid,
            )
            label_map, counts = decided(decision, request, memory=memory, client=session)
            label_map = replace(label_map, scan=source.file, description=f"{RUN}{said['run']}")
            request.write(partials[1 : 1 + len(label_files)], label_map)
            measures = as_delivered(measures, counts, source.grid)
            volume_grid = "scan"
        voted = [atlas for atlas in atlases if atlas.id in found.atlases]
        finished = Segmentation(
            path=targets[0] if isinstance(targets[0], Remote) else Path(out).absolute(),
            organs=measures,
            volume_grid=volume_grid,
            atlases=found.atlases,
            n_keypoints=first_frames(
                found.keypoints.position.values, found.keypoints.scale.values
            ).size,
            n_matches=found.matches.sizes["match"],
            seconds=time.perf_counter() - start,
            unshown=unshown(measures, voted),
        )
        where = str(source.path)
        doubt_little(where, measures, finished.n_keypoints, finished.n_matches, atlases)
        doubt_unshown(where, finished.unshown, atlases, asked=bool(organs))
        shared = doubt_alone(where, measures, found.weights, found.atlases)
        doubt_disagreement(where, shared)
        doubt_volumes(where, measures, voted)
        doubt_hu(where, measures, voted)
        finished = replace(finished, warnings=(*doubts, *later))
        _keep(group, found, {**said, "warnings": list(finished.warnings)})
        for array in (*volume.levels, *found.label_levels, found.probability):
            chunk_io.check_complete(array)
        if shown.targets():
            findings = findings_of(finished.path, group, measures, volume_grid)
            shown.write(findings, store, partials[1 + len(label_files) :])
    return replace(finished, seconds=time.perf_counter() - start)


def segment_volume(
    volume: Volume,
    group: zarr.Group,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    *,
    organs: OrganTable | None = None,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    select: int | None = None,
    index: str = "auto",
    keypoints: xr.Dataset | None = None,
    memory: int | None = None,
    client: Client | None = None,
) -> StationResults:
    """Go from a volume to its label map; `group` is the OME-Zarr image that receives it.

    `organs` are those of the store to segment, by default all. `keypoints` are those of the
    volume, extracted with the parameters of the store, if they are known already. The other
    parameters are those of `segment`; `options` must fit the mode and the store.
    """
    if keypoints is None:
        keypoints = extract(
            volume,
            descriptor=store.parameters["descriptor"],
            finer=store.parameters["finer"],
            memory=memory,
            client=client,
        )
    kept = Snapshot(store)
    settings = _Options(organs or store.organs, mode, options, select, index, memory, client)
    while True:
        try:
            return _label(volume, group, kept, tuple(atlas_ids), keypoints, settings)
        except AtlasNotFoundError:
            gone = kept.gone(atlas_ids)
            left = [atlas_id for atlas_id in atlas_ids if atlas_id not in gone]
            if not gone or not left:
                raise
            atlas_ids = left
            notices.warn(
                f"{store.url}: {', '.join(gone)} removed or replaced while the scan was segmented;"
                f" the answer is that of the {len(left)} other atlases."
            )


@dataclass(frozen=True, eq=False)
class _Options:
    """The options of a segmentation; see `segment`."""

    organs: OrganTable
    mode: str
    options: TransferOptions
    select: int | None
    index: str
    memory: int | None
    client: Client | None


def _label(
    volume: Volume,
    group: zarr.Group,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    settings: _Options,
) -> StationResults:
    """Go from keypoints to the label map; done again, nothing of the first time is left."""
    mode, organs, client = settings.mode, settings.organs, settings.client
    across = settings.options.across
    kept = how_many(settings.select, len(atlas_ids))
    if kept < len(atlas_ids):
        atlas_ids = propose_atlases(
            keypoints,
            store,
            atlas_ids,
            kept,
            mode=mode,
            index=settings.index,
            organs=organs,
            across=across,
        )
    elif mode not in BY_ORGANS:
        # There, those that annotate other organs only vote against these.
        atlas_ids = annotating(store, atlas_ids, organs)
    atlases = AtlasKeypoints.load(store, atlas_ids)
    matches = match(keypoints, atlases, client=client)
    if kept < len(atlases):
        chosen = select_atlases(
            matches, keypoints, atlases, store, kept, mode=mode, organs=organs, across=across
        )
        matches = restrict_to(matches, chosen, len(atlases))
        atlas_ids = [atlas_ids[i] for i in chosen]
        atlases = atlases.only(chosen)
    votes = vote(matches, keypoints.sizes["keypoint"], store.organs)
    probability = create_probability(group, volume.grid, organs, mode)
    levels = create_label_image(group, "organs", volume.grid, organs, TILING.shard)
    # Blocks that no organ reaches are not computed.
    chunk_io.write_empty(levels[0])
    job = TransferJob(
        volume,
        organs,
        probability,
        levels[0],
        mode,
        settings.options,
        settings.memory,
        atlas_organs=store.organs,
    )
    evidence = Evidence(keypoints, matches, votes)
    used = store.atlases(atlas_ids)
    counts = transfer(job, used, evidence, atlas_keypoints=atlases, client=client)
    finish_label_image(group, "organs", levels, volume.grid, organs)
    votes = votes_for(votes, organs)
    showing = [sum(name in atlas.organs for atlas in used) for name in organs.names]
    measures = organ_measures(counts, organs, volume.grid, keypoints, votes, showing)
    return StationResults(
        tuple(atlas_ids),
        keypoints,
        matches,
        votes,
        levels[0],
        levels,
        probability,
        measures,
        counts.weights,
    )


@contextmanager
def temporary_image(
    store: AtlasStore, client: Client, image: zarr.Group | None = None
) -> Iterator[zarr.Group]:
    """Make a temporary group for `segment_volume`, where every worker sees it.

    It is empty, or the image that the label map of another's voxels is written into.
    """
    with tempfile.TemporaryDirectory(prefix="kpt-") as folder:
        # Workers may have another current folder.
        group = zarr.create_group(str(Path(folder).absolute() / "scan.zarr"), zarr_format=3)
        if image is not None:
            group.update_attributes({"ome": image.attrs["ome"]})
        with witness.shared(client, group, store.documents()):
            yield group


def choose(
    store: AtlasStore,
    *,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    exclude: Sequence[str] = (),
    select: int | None = None,
    index: str = "auto",
    organs: Sequence[str] = (),
) -> tuple[OrganTable, tuple[str, ...]]:
    """Choose organs and atlases; refuse what `segment` refuses whatever the scan is.

    Returns
    -------
    organs : OrganTable
        From `choose_organs`.
    atlases : tuple of str
        From `choose_atlases`.
    """
    table = choose_organs(store, organs)
    options.check(mode, store.organs, table)
    used = choose_atlases(store, exclude)
    check_selection(select, index)
    return table, used


def choose_atlases(store: AtlasStore, exclude: Sequence[str]) -> tuple[str, ...]:
    """Ids of the atlases to use, in natural order, once everything that was asked is possible.

    Raises
    ------
    ParameterError
        If an id to exclude is unknown, or the store's keypoints were extracted
        in another way than a scan's are now.
    EmptyStoreError
        If no atlas is left.
    """
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    ids = store.ids()
    unknown = sorted(set(exclude) - set(ids))
    if unknown:
        raise ParameterError(
            f"{store.url} has no atlas {', '.join(unknown)} to exclude; see kpt atlas list."
        )
    differing = [k for k, v in PARAMETERS.items() if store.parameters.get(k) != v]
    differing += [k for k, known in CHOICES.items() if store.parameters.get(k) not in known]
    if differing:
        raise ParameterError(
            f"{store.url} holds keypoints of another {', '.join(differing)} than this version "
            "extracts; make the store anew, or use the version that made it."
        )
    spacing: Any = store.parameters.get("spacing")
    if type(spacing) not in (int, float) or not SPACINGS[0] <= spacing <= SPACINGS[1]:
        raise ParameterError(
            f"{store.url} has the spacing {spacing!r}, not one of {SPACINGS[0]:g} to"
            f" {SPACINGS[1]:g} mm; make the store anew."
        )
    used = tuple(i for i in ids if i not in set(exclude))
    if not used:
        raise EmptyStoreError(f"{store.url} has no atlas to use; add one with kpt atlas add.")
    return used


def choose_organs(store: AtlasStore, names: Sequence[str]) -> OrganTable:
    """Organs of the store to segment: those of these names, or all if there is none.

    Raises
    ------
    ParameterError
        If a name is unknown.
    """
    names = (names,) if isinstance(names, str) else names
    check_organs(names, store.organs)
    return store.organs.only(names) if names else store.organs


def open_probability(path: str | Path | Remote) -> xr.DataArray:
    """Open the probabilities of a segmentation lazily.

    Parameters
    ----------
    path : str, Path or Remote
        The OME-Zarr output of `kpt_dask.segment`, or its URL.

    Returns
    -------
    xarray.DataArray
        (organ, z, y, x) float32: an organ's share of the votes at a voxel; the attribute
        ``description`` says of which votes, which depends on the mode. Coordinates ``z``,
        ``y``, ``x`` in mm, LPS, and ``organ``, the names. Values are read where they are looked
        at, and only as long as the output is that of the same run.

    Raises
    ------
    ScanNotFoundError, ScanFormatError
        If there is no volume at `path`; reading values raises the first if it was deleted or
        replaced since, and MissingChunkError if a file of it was.
    KeyError
        If it is a volume without probabilities.

    Examples
    --------
    >>> import kpt_dask
    >>> probability = kpt_dask.open_probability("body_4.zarr")
    >>> probability.dims, str(probability.dtype)
    (('organ', 'z', 'y', 'x'), 'float32')
    >>> bool(probability.sel(organ="liver").max() > 0.5)
    True
    """
    volume = open_volume(path)
    array = open_array(volume.group, "probability")
    axes = {
        name: (name, volume.grid.origin[a] + volume.grid.spacing[a] * np.arange(n), {"units": "mm"})
        for a, (name, n) in enumerate(zip("zyx", volume.grid.shape, strict=True))
    }
    return xr.DataArray(
        lazy_array(volume.group, array, (1, *(array.shards or array.chunks)[1:])),
        dims=("organ", "z", "y", "x"),
        coords={"organ": list(array.attrs["organs"]), **axes},  # type: ignore[arg-type]
        name="probability",
        attrs={"description": array.attrs["description"]},
    )


def _doubt_itself(scan: Scan, volume: Volume, store: AtlasStore, atlases: Sequence[Atlas]) -> None:
    """Warn if atlases that are used were made from the scan itself."""
    same = KnownScans(atlases).of(digest_of(volume.group), volume.grid.shape)
    if same:
        excluded = " ".join(f"--exclude {name}" for name in same)
        notices.warn(
            f"{scan.path} is in {store.url} itself, as {', '.join(same)}, whose labels vote too;"
            f" to see what the others make of it, add {excluded}."
        )


def _provenance(
    group: zarr.Group,
    found: StationResults,
    organs: OrganTable,
    mode: str,
    options: TransferOptions,
    store: AtlasStore,
) -> dict[str, Any]:
    """Describe inputs, options and versions, with a digest of the results as ``run``."""
    libraries = ("dask", "numpy", "scipy", "numba", "zarr", "xarray")
    said = {
        **cast(dict[str, Any], group.attrs["kpt"]),
        "segmentation": {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "mode": mode,
            "transfer": options.to_json(mode, organs),
            "parameters": dict(store.parameters),
            "atlases": list(found.atlases),
            "organ_table": organs.to_json(),
            "organs": {name: asdict(organ) for name, organ in found.organs.items()},
            # Part of each atlas in an organ's votes, in the order of the atlases; rounded, since
            # powers differ in the last bit from processor to processor.
            "weights": dict(zip(organs.names, found.weights.round(6).tolist(), strict=True)),
            # Grid of the label map in this image: its bytes do not depend on other outputs.
            "volume_grid": "working",
            "versions": {name: version(name) for name in libraries},
        },
    }
    # Digest of the results, not of the time: the same input gives the same bytes.
    digest = sha256(json.dumps(said, sort_keys=True).encode())
    for table in (found.keypoints, found.matches, found.votes):
        for name in sorted(map(str, table.data_vars)):
            digest.update(np.ascontiguousarray(table[name].values).data)
    return {**said, "run": digest.hexdigest()[:32]}


def _keep(group: zarr.Group, found: StationResults, said: dict[str, Any]) -> None:
    """Write keypoints, matches, votes and provenance."""
    write_keypoints(group.create_group("keypoints"), found.keypoints)
    # Names as an attribute: Zarr has no settled way to store an array of strings.
    votes = found.votes.drop_vars("organ").assign_attrs(organs=found.votes.organ.values.tolist())
    for name, table in (("matches", found.matches), ("votes", votes)):
        table = table.assign_attrs({"encoding-type": f"kpt-{name}", "encoding-version": "1"})
        path = f"{group.path}/{name}" if group.path else name
        table.to_zarr(
            group.store, group=path, zarr_format=3, consolidated=False, write_empty_chunks=True
        )
    group.update_attributes({"kpt": said})
