"""``kpt atlas``: make a store of annotated scans, fill it, look at it."""

from typing import TYPE_CHECKING, Any

import click

from kpt_dask.cli.atlas_check import check, check_option, doubt_added
from kpt_dask.cli.atlas_edit import note, relabel
from kpt_dask.cli.common import (
    Failure,
    annotated_option,
    columns,
    console,
    fail,
    json_option,
    layout_option,
    memory_option,
    overwrite_option,
    print_json,
    say,
    scheduler_option,
    series_option,
    size,
    store_argument,
    table,
    working,
)
from kpt_dask.cli.plain_text import printable
from kpt_dask.options import LABELS, SCANS

if TYPE_CHECKING:
    from atlas_store import Atlas, AtlasInfo, AtlasStore
    from kpt_dask.atlases.add import AddOutcome


@click.group()
def atlas() -> None:
    """Keep a store of annotated scans: the atlases.

    STORE is a folder, or the URL of one in an object store (s3://…).
    """


atlas.add_command(check)
atlas.add_command(note)
atlas.add_command(relabel)


@atlas.command()
@store_argument
@click.option(
    "--organs",
    default="visceral",
    show_default=True,
    metavar="TABLE",
    help="What the label values mean: visceral, openkbp, or a TOML file.",
)
@click.option(
    "--spacing",
    type=float,
    default=2.0,
    show_default=True,
    help="Of the grid that all atlases are brought to, mm.",
)
@click.option(
    "--descriptor",
    type=click.Choice(["upright", "invariant"]),
    default="upright",
    show_default=True,
    help="What keypoints are compared by: invariant ones also match in turned patients.",
)
@click.option(
    "--finer", is_flag=True, help="Find smaller keypoints too, from half the voxel size on."
)
def create(store: str, organs: str, spacing: float, descriptor: str, finer: bool) -> None:
    """Create an empty store.

    Scans that are segmented from it are treated as its atlases are.

    \b
    Example:
      kpt atlas create atlases --organs openkbp
    """
    from atlas_store import AtlasStore, load_organs
    from kpt_dask.atlases.add import store_parameters

    parameters = store_parameters(spacing, descriptor=descriptor, finer=finer)
    made = AtlasStore.create(store, load_organs(organs), parameters)
    say(f"{made.url}: an empty store for {', '.join(made.organs.names)}.")


@atlas.command()
@store_argument
@click.argument("scan", type=click.Path())
@click.argument("labels", type=click.Path())
@click.option("--id", "atlas_id", metavar="ID", help="Its name; the scan's name unless given.")
@annotated_option
@check_option
@series_option
@overwrite_option
@memory_option
@scheduler_option
@json_option
def add(
    store: str,
    scan: str,
    labels: str,
    atlas_id: str | None,
    annotated: tuple[str, ...] | None,
    checked: bool,
    series: str | None,
    overwrite: bool,
    memory: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Add the scan SCAN with the labels LABELS, which lie on the same grid.

    LABELS is a label map with the values of the store's organs; or a NIfTI label map that names
    them (as of TotalSegmentator), a folder with a mask for each organ (liver.nii.gz, …), a
    segmentation of 3D Slicer (.seg.nrrd), a DICOM SEG or an RTSTRUCT, whose names decide. Names
    that the store does not know are reported and left out.

    \b
    Examples:
      kpt atlas add atlases anna_ct.nii.gz anna_organs.nii.gz --id anna
      kpt atlas add atlases ct_folder contours.dcm --id berta
    """
    from atlas_store import AtlasStore
    from kpt_dask.atlases.add import add_atlas
    from kpt_dask.runtime import notices

    opened = AtlasStore.open(store)
    with notices.recorded() as doubts, working(scheduler) as client:
        added = add_atlas(
            opened,
            scan,
            labels,
            atlas_id=atlas_id,
            annotated=annotated,
            series=series,
            replace=overwrite,
            memory=memory,
            client=client,
        )
        if checked:
            doubt_added(opened, added.id, memory, client)
    if as_json:
        print_json(_describe(added) | {"warnings": doubts})
    else:
        say(f"{added.id}: {_in_short(added)}.")


@atlas.command("add-folder")
@store_argument
@click.argument("folder", metavar="DIR", type=click.Path())
@layout_option
@click.option(
    "--scan",
    "scan_pattern",
    metavar="PATTERN",
    help=f"How scans are named; {{id}} is the id of the atlas.  [default: {SCANS}]",
)
@click.option(
    "--labels",
    "labels_pattern",
    metavar="PATTERN",
    help="How their labels are named: label maps, folders of masks, segmentations."
    f"  [default: {LABELS}]",
)
@annotated_option
@series_option
@overwrite_option
@memory_option
@scheduler_option
@json_option
def add_folder(
    store: str,
    folder: str,
    layout: str | None,
    scan_pattern: str | None,
    labels_pattern: str | None,
    annotated: tuple[str, ...] | None,
    series: str | None,
    overwrite: bool,
    memory: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Add all annotated scans of a folder; those that are there already are skipped.

    A scan that cannot be added does not stop the others. Run it again after an interruption. Their
    labels are not checked against each other: kpt atlas check does that, best once all are there.

    \b
    Examples:
      kpt atlas add-folder atlases scans --scan '{id}/ct.nii.gz' --labels '{id}/organs.nii.gz'
      kpt atlas add-folder atlases Totalsegmentator_dataset --layout totalsegmentator
    """
    from rich.console import Console

    from atlas_store import AtlasStore
    from kpt_dask.atlases import add
    from kpt_dask.runtime import notices

    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    opened = AtlasStore.open(store)
    with notices.recorded() as doubts, working(scheduler) as client:
        outcomes = add.add_folder(
            opened,
            folder,
            layout=layout,
            scan_pattern=scan_pattern,
            labels_pattern=labels_pattern,
            annotated=annotated,
            series=series,
            replace=overwrite,
            memory=memory,
            client=client,
            told=lambda outcome: errors.print(printable(_describe_outcome(outcome))),
        )
    failed = {o.id: o.problem for o in outcomes if o.problem is not None}
    added = [o.id for o in outcomes if o.info is not None]
    present = [o.id for o in outcomes if o.info is None and o.problem is None]
    if as_json:
        answer = {"added": added, "present": present, "failed": failed, "warnings": doubts}
        print_json(answer)
    else:
        say(f"{len(added)} added, {len(present)} there already, {len(failed)} failed.")
    if failed:
        fail(f"{len(failed)} of {len(outcomes)} scans were not added: {', '.join(failed)}.")


@atlas.command("list")
@store_argument
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only atlases of which it holds, such as 'keypoints<500', organ=liver, 'added>=2026-01' "
    "or from~ct. Several must all hold.",
)
@click.option(
    "--sort",
    metavar="COLUMN",
    help="id, organs, keypoints, in_organs, added or from; -COLUMN for the largest first.",
)
@click.option("--removed", is_flag=True, help="List what kpt atlas restore can bring back.")
@json_option
def list_atlases(
    store: str, where: tuple[str, ...], sort: str | None, removed: bool, as_json: bool
) -> None:
    """List the atlases of a store.

    \b
    Examples:
      kpt atlas list atlases
      kpt atlas list atlases --where organ=liver --where 'keypoints<500' --sort -added
    """
    from atlas_store import AtlasStore
    from kpt_dask.cli.atlas_filter import COLUMNS, filtered

    opened = AtlasStore.open(store)
    gone = {one.info.uuid: one for one in opened.removed()} if removed else {}
    found = gone.values() if removed else opened.atlases()
    _warn_of_lost(opened)
    infos = filtered([one.info for one in found], where, sort, opened.organs)
    if as_json:
        when = {uuid: {"removed": one.removed.isoformat()} for uuid, one in gone.items()}
        print_json([_describe(info) | when.get(info.uuid, {}) for info in infos])
        return
    header: tuple[str, ...] = (
        *("id", "organs annotated", "keypoints", "in organs"),
        *("size (z, y, x)", "added (UTC)", "from"),
    )
    rows: list[tuple[str, ...]] = [
        (
            info.id,
            _organs(info.annotated, opened.organs.names),
            str(info.keypoints),
            str(sum(organ.keypoints for organ in info.organs.values())),
            " × ".join(map(str, info.shape)),
            COLUMNS["added"](info),
            COLUMNS["from"](info),
        )
        for info in infos
    ]
    if removed:
        header += ("removed (UTC)", "version")
        for i, info in enumerate(infos):
            rows[i] += (f"{gone[info.uuid].removed:%Y-%m-%d %H:%M:%S}", info.uuid[:8])
    if rows:
        say(columns(header, rows, left=(0, 1, 5, 6, 7, 8)))
    one, many = ("removed atlas", "removed atlases") if removed else ("atlas", "atlases")
    number = _count(len(found), one, many)
    if where:
        number = f"{len(infos)} of {number}"
    say(f"{opened.url}: {number} at {opened.parameters['spacing']:g} mm.")


@atlas.command()
@store_argument
@click.argument("atlas_id", metavar="[ID]", required=False)
@json_option
def info(store: str, atlas_id: str | None, as_json: bool) -> None:
    """Say what a store is made for, or what an atlas of it holds.

    \b
    Examples:
      kpt atlas info atlases
      kpt atlas info atlases anna
    """
    from atlas_store import AtlasStore

    opened = AtlasStore.open(store)
    if atlas_id is None:
        _show_store(opened, as_json)
    else:
        _show_atlas(opened[atlas_id].info, _note(opened, atlas_id), as_json)


@atlas.command()
@store_argument
@click.argument("atlas_id", metavar="ID")
@click.argument("folder", metavar="DIR", type=click.Path())
@overwrite_option
def export(store: str, atlas_id: str, folder: str, overwrite: bool) -> None:
    """Write the scan and the labels of an atlas to DIR, as NIfTI on the grid of the store.

    They are DIR/ID_ct.nii.gz and DIR/ID_seg.nii.gz, which kpt atlas add-folder finds.

    \b
    Example:
      kpt atlas export atlases anna back
    """
    from atlas_store import AtlasStore
    from kpt_dask.exports import export_atlas

    opened = AtlasStore.open(store)
    with working(None):
        scan, labels = export_atlas(opened[atlas_id], folder, overwrite=overwrite)
    say(f"{atlas_id}: {scan} and {labels}.")


@atlas.command()
@store_argument
@click.argument("atlas_ids", metavar="ID…", nargs=-1, required=True)
def remove(store: str, atlas_ids: tuple[str, ...]) -> None:
    """Remove atlases from a store.

    Their data stays until kpt atlas prune, so that kpt atlas restore can bring them back.

    \b
    Example:
      kpt atlas remove atlases anna
    """
    from atlas_store import AtlasStore

    opened = AtlasStore.open(store)
    # All or none: a mistyped id among them is found before the first is gone.
    missing = [atlas_id for atlas_id in atlas_ids if atlas_id not in opened]
    if missing:
        fail(f"{opened.url} has no atlas {', '.join(missing)}: use an id that it lists.")
    for atlas_id in atlas_ids:
        restorable = opened.remove(atlas_id)
        say(f"{atlas_id}: removed{'; kpt atlas restore brings it back' if restorable else ''}.")


@atlas.command()
@store_argument
@click.argument("atlas_ids", metavar="ID…", nargs=-1, required=True)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an atlas of this id that is there, which can be restored in turn.",
)
@click.option(
    "--version",
    default="",
    metavar="VERSION",
    help="The version of one ID that kpt atlas list --removed shows so, not the last.",
)
def restore(store: str, atlas_ids: tuple[str, ...], overwrite: bool, version: str) -> None:
    """Bring atlases back, of each id the last that was removed or replaced.

    \b
    Examples:
      kpt atlas restore atlases anna
      kpt atlas restore atlases anna --overwrite      undo a relabel, or an add --overwrite
      kpt atlas restore atlases anna --overwrite --version 6b6d23e1
    """
    from atlas_store import AtlasStore

    if version and len(atlas_ids) > 1:
        fail("--version is that of one atlas: give one ID with it.")
    opened = AtlasStore.open(store)
    # Which of several was brought back is no question where it was named.
    removed = [] if version else [one.info.id for one in opened.removed()]
    for atlas_id in atlas_ids:
        restored = opened.restore(atlas_id, version=version, replace=overwrite)
        several = removed.count(atlas_id)
        of = f", the last removed of {several}; --version takes another of list --removed"
        say(f"{atlas_id}: {_in_short(restored.info)}{of if several > 1 else ''}.")


@atlas.command()
@store_argument
@click.option(
    "--older-than",
    type=float,
    default=30.0,
    show_default=True,
    metavar="DAYS",
    help="Only what was removed or replaced longer ago; 0 for all.",
)
def prune(store: str, older_than: float) -> None:
    """Delete the data of removed and replaced atlases for ever.

    \b
    Example:
      kpt atlas prune atlases --older-than 7
    """
    from datetime import timedelta

    from atlas_store import AtlasStore

    if not 0 <= older_than < float("inf"):
        fail(f"--older-than must be a number of days, 0 or more, not {older_than:g}.")
    opened = AtlasStore.open(store)
    # More days than any date has would not fit; nothing is that old.
    pruned = opened.prune(timedelta(days=min(older_than, timedelta.max.days)))
    left = len(opened.removed())
    say(
        f"{opened.url}: {_count(len(pruned), 'removed atlas', 'removed atlases')} deleted, {left}"
        " can be restored still."
    )


@atlas.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.argument("atlas_ids", metavar="[ID]…", nargs=-1)
@click.option("--as", "new_id", metavar="ID", help="Another id in TO, for one atlas.")
def copy(source: str, target: str, atlas_ids: tuple[str, ...], new_id: str | None) -> None:
    """Copy atlases from the store FROM to the store TO; all of them unless ids are given.

    Both must have the same organs and parameters. Atlases whose id is in TO already are skipped, so
    that an interrupted copy goes on when it is run again. Copying all merges two stores.

    \b
    Examples:
      kpt atlas copy atlases s3://bucket/atlases
      kpt atlas copy atlases others anna --as anna_2
    """
    from atlas_store import AtlasStore
    from kpt_dask.runtime import notices, progress

    opened, into = AtlasStore.open(source), AtlasStore.open(target)
    ids = atlas_ids or tuple(opened.ids())
    if new_id is not None and len(ids) != 1:
        fail(f"--as names one atlas, and {len(ids)} are copied: give the id of one.")
    wanted = opened.atlases(ids)
    there = {one.id: one for one in into.atlases()}
    copied, other, labels, notes = 0, [], [], []
    with progress.shown(), progress.stage("Copying atlases", total=len(wanted)) as advance:
        for one in wanted:
            name = one.id if new_id is None else new_id
            if name not in there:
                into.copy_from(one, name)
                copied += 1
            elif there[name].info.scan_digest != one.info.scan_digest:
                other.append(name)
            elif _labels_of(there[name]) != _labels_of(one):
                labels.append(name)
            elif _note(into, name) != _note(opened, one.id):
                notes.append(name)
            advance(1)
    present = len(wanted) - copied - len(other)
    say(f"{into.url}: {copied} copied, {present} there already.")
    if labels:
        notices.warn(
            f"{into.url} has other labels by the ids {', '.join(labels)} than {opened.url}: to"
            " replace them, remove these with kpt atlas remove and copy again."
        )
    if notes:
        notices.warn(
            f"{into.url} has other notes by the ids {', '.join(notes)} than {opened.url}: write"
            " them with kpt atlas note."
        )
    if other:
        fail(
            f"{into.url} has other scans by the ids {', '.join(other)}: copy them one by one, each"
            " with --as."
        )


@atlas.command()
@store_argument
@click.option("--repair", is_flag=True, help="Remove what interrupted adds and removals left.")
@json_option
def verify(store: str, repair: bool, as_json: bool) -> None:
    """Read all of a store again, and say what is wrong with it.

    \b
    Example:
      kpt atlas verify atlases --repair
    """
    from dataclasses import asdict

    from atlas_store import AtlasStore
    from kpt_dask.runtime import progress

    opened = AtlasStore.open(store)
    with progress.shown(), progress.stage("Verifying"):
        problems = opened.verify(repair=repair)
    if as_json:
        print_json([asdict(problem) for problem in problems])
    else:
        for problem in problems:
            say(str(problem))
        if not problems:
            say(f"{opened.url}: {_count(len(opened), 'atlas', 'atlases')}, all sound.")
    left = sum(not problem.repaired for problem in problems)
    if left:
        raise Failure(f"{opened.url} has {_count(left, 'problem', 'problems')}.")


@atlas.command("index")
@store_argument
def build_index(store: str) -> None:
    """Build graphs by which a large store is searched, and keep them in your cache.

    With graphs, kpt segment finds the atlases that are like a scan without comparing the scan's
    keypoints with all of the store's. A store of some 4000 atlases gets them by itself, when it is
    first searched. A graph takes a minute or more to build. As a store grows, new graphs are needed
    now and then: run this again.

    \b
    Example:
      kpt atlas index atlases
    """
    from atlas_store import AtlasStore
    from atlas_store.index.search import AtlasIndex
    from kpt_dask.runtime import progress

    opened = AtlasStore.open(store)
    with progress.shown():
        with progress.stage("Reading keypoints"):
            index = AtlasIndex.open(opened)
        number = index.n_graphs
        # It is not known before which of them the cache lacks.
        with progress.stage("Building graphs", total=number) as advance:
            built = 0
            for _ in index.build_graphs():
                built += 1
                advance(1)
            advance(number - built)
    if number == 0:
        say(f"{opened.url}: too few keypoints for a graph; all are compared, which is faster.")
        return
    say(f"{opened.url}: {_count(number, 'graph', 'graphs')}, {built} of them built now.")


def _describe(info: "AtlasInfo") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(info)


def _in_short(info: "AtlasInfo") -> str:
    organs = _count(len(info.annotated), "organ", "organs")
    within = sum(organ.keypoints for organ in info.organs.values())
    return (
        f"{organs} annotated, {info.keypoints} keypoints ({within} in organs),"
        f" {size(info.shape, info.spacing[0])}"
    )


def _describe_outcome(outcome: "AddOutcome") -> str:
    if outcome.problem is not None:
        return f"{outcome.id}: not added: {outcome.problem}"
    if outcome.info is not None:
        return f"{outcome.id}: {_in_short(outcome.info)}"
    return f"{outcome.id}: there already"


def _organs(annotated: tuple[str, ...], known: tuple[str, ...]) -> str:
    """Name what is annotated, or what is not, whichever is shorter."""
    missing = [name for name in known if name not in annotated]
    count = f"{len(annotated)} of {len(known)}"
    if not missing:
        return f"all {len(known)}"
    if len(missing) < len(annotated):
        return f"{count}: all but {', '.join(missing)}"
    return f"{count}: {', '.join(annotated)}"


def _labels_of(atlas: "Atlas") -> tuple[tuple[str, ...], dict[str, str]]:
    """Give what is annotated, and the SHA-256 of the parts of the label map."""
    from atlas_store.layout import LABELS

    parts = atlas.sealed.digests().items()
    return atlas.annotated, {key: sha256 for key, sha256 in parts if key.startswith(LABELS)}


def _show_store(store: "AtlasStore", as_json: bool) -> None:
    infos = [found.info for found in store.atlases()]
    annotated = {n: sum(n in info.annotated for info in infos) for n in store.organs.names}
    if as_json:
        about: dict[str, Any] = {"url": store.url, "uuid": store.uuid}
        about |= {"atlases": [info.id for info in infos], "annotated": annotated}
        about |= {"organs": store.organs.to_json(), "parameters": dict(store.parameters)}
        print_json(about)
        return
    organs = table("organ", "SNOMED CT", "label", "ν (HU)", "atlases", "keypoints", left=2)
    for organ in store.organs:
        code = " ".join(organ.snomed) if organ.snomed else ""
        shown = [info.organs[organ.name].keypoints for info in infos if organ.name in info.organs]
        mean = f"{sum(shown) / len(shown):.1f}" if shown else ""
        numbers = str(organ.value), f"{organ.nu:g}", str(annotated[organ.name]), mean
        organs.add_row(organ.name, code, *numbers)
    say(f"{store.url}: {_count(len(infos), 'atlas', 'atlases')}.")
    console().print(organs)
    say("Atlases that annotate an organ, and keypoints in it on average where it shows.")
    made_with = ", ".join(f"{name} {value}" for name, value in store.parameters.items())
    say(f"Made with {made_with}.")


def _warn_of_lost(store: "AtlasStore") -> None:
    """Warn of atlases that a list cannot show, as they have data and no marker."""
    from kpt_dask.errors import some_of
    from kpt_dask.runtime import notices

    if lost := store.without_marker():
        notices.warn(
            f"{store.url} holds complete data of {some_of(lost)} without a marker, so that they are"
            " not listed: see kpt atlas verify."
        )


def _note(store: "AtlasStore", atlas_id: str) -> str:
    from atlas_store import StoreFormatError
    from kpt_dask.runtime import notices

    try:
        return store.note(atlas_id)
    except StoreFormatError as error:
        notices.warn(str(error))
        return ""


def _show_atlas(info: "AtlasInfo", note: str, as_json: bool) -> None:
    from kpt_dask.cli.atlas_filter import moment

    if as_json:
        print_json(_describe(info) | {"note": note})
        return
    voxel = info.spacing[0] * info.spacing[1] * info.spacing[2] / 1000
    organs = table("organ", "volume (mL)", "keypoints", "centroid (z, y, x, mm)")
    for name in info.annotated:
        if found := info.organs.get(name):
            centroid = ", ".join(f"{mm:.0f}" for mm in found.centroid)
            organs.add_row(name, f"{found.voxels * voxel:.1f}", str(found.keypoints), centroid)
        else:
            organs.add_row(name, "not shown", "", "")
    say(f"{info.id}: {_in_short(info)}.")
    console().print(organs)
    made_from = " and ".join(info.source)
    say(f"Added {moment(info)} UTC from {made_from} with {info.software}.")
    if note:
        say(f"Note: {note}")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
