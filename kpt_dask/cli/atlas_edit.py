"""Commands of `kpt atlas` that change what an atlas says: its labels, and a note."""

import click

from kpt_dask.cli.atlas_check import check_option, doubt_added
from kpt_dask.cli.common import (
    annotated_option,
    memory_option,
    say,
    scheduler_option,
    store_argument,
    working,
)


@click.command()
@store_argument
@click.argument("atlas_id", metavar="ID")
@click.argument("labels", type=click.Path())
@annotated_option
@check_option
@memory_option
@scheduler_option
def relabel(
    store: str,
    atlas_id: str,
    labels: str,
    annotated: tuple[str, ...] | None,
    checked: bool,
    memory: int | None,
    scheduler: str | None,
) -> None:
    """Replace the labels of an atlas by LABELS; its scan stays.

    LABELS lie on the grid of the files that kpt atlas export writes. The old labels stay until the
    new ones are complete; kpt atlas restore --overwrite brings them back.

    \b
    Example:
      kpt atlas export atlases anna drawn
      kpt atlas relabel atlases anna drawn/anna_seg.nii.gz
    """
    from atlas_store import AtlasStore
    from kpt_dask.relabelling import relabel as replace_labels

    opened = AtlasStore.open(store)
    with working(scheduler) as client:
        info = replace_labels(
            opened, atlas_id, labels, annotated=annotated, memory=memory, client=client
        )
        if checked:
            doubt_added(opened, info.id, memory, client)
    say(f"{info.id}: {len(info.annotated)} organs annotated, {', '.join(info.annotated)}.")


@click.command()
@store_argument
@click.argument("atlas_id", metavar="ID")
@click.argument("text", required=False)
def note(store: str, atlas_id: str, text: str | None) -> None:
    """Note TEXT about an atlas, in place of its note; without TEXT, print the note.

    An empty TEXT deletes the note.

    \b
    Examples:
      kpt atlas note atlases anna 'left kidney drawn with its cyst'
      kpt atlas note atlases anna
    """
    from atlas_store import AtlasStore
    from kpt_dask.errors import ParameterError

    opened = AtlasStore.open(store)
    if text is None:
        say(opened.note(atlas_id) or f"There is no note on {atlas_id}.")
        return
    try:
        opened.set_note(atlas_id, text)
    except ValueError as error:
        raise ParameterError(str(error)) from error
    say(f"{atlas_id}: noted." if text else f"{atlas_id}: no note any more.")
