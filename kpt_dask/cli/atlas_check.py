"""``kpt atlas check``: doubts about the annotations of a store."""

from typing import TYPE_CHECKING, Any

import click

from kpt_dask.cli.common import (
    Failure,
    json_option,
    memory_option,
    overwrite_option,
    print_json,
    say,
    scheduler_option,
    working,
)

if TYPE_CHECKING:
    from distributed import Client

    from atlas_store import AtlasStore

ENOUGH = 10
"""Other atlases from which new labels are checked: fewer do not say what is usual."""


check_option = click.option(
    "--check/--no-check",
    "checked",
    default=True,
    help=f"Whether to check its labels against what the others say, as kpt atlas check does, where"
    f" the store has {ENOUGH} others, and to warn; it takes some twenty seconds of a core."
    "  [default: check]",
)


@click.command()
@click.argument("store", metavar="STORE")
@click.argument("atlas_ids", metavar="[ID]…", nargs=-1)
@click.option(
    "--select",
    type=int,
    default=10,
    show_default=True,
    metavar="K",
    help="Predict each atlas from the K others that agree best with it.",
)
@click.option(
    "--html",
    "page",
    type=click.Path(),
    metavar="FILE",
    help="Also write the findings to FILE, each with a picture of its labels beside the predicted.",
)
@overwrite_option
@memory_option
@scheduler_option
@json_option
def check(
    store: str,
    atlas_ids: tuple[str, ...],
    select: int,
    page: str | None,
    overwrite: bool,
    memory: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Check the annotations of atlases against what the other atlases say; of all unless named.

    kpt atlas verify tells whether data is what was added; this command doubts what was added. Each
    atlas is predicted from the others, in a second or so. Named are: left and right, or other
    organs, that are taken for each other; mirrored or shifted label maps; labels that do not fit
    the scan; organs with an unusual Dice, volume, intensity or position, or with slices missing;
    and patients who are there twice. Unusual is what lies more than 4.5 robust standard deviations
    from the median of the store, which takes 10 atlases. Nothing is written to the store. The exit
    code is 1 if anything is found; whether it is wrong, a person must see.

    \b
    Examples:
      kpt atlas check atlases --html doubts.html
      kpt atlas check atlases anna berta --json
    """
    from kpt_dask.annotation_check.schedule import check_atlases
    from kpt_dask.runtime import notices

    with notices.recorded() as doubts, working(scheduler) as client:
        result = check_atlases(
            store,
            atlas_ids,
            select=select,
            page=page,
            overwrite=overwrite,
            memory=memory,
            client=client,
        )
    number = f"{len(result.checked)} {'atlas' if len(result.checked) == 1 else 'atlases'}"
    if as_json:
        answer: dict[str, Any] = {"checked": result.checked, "unchecked": result.unchecked}
        answer["findings"] = [finding.to_json() for finding in result.findings]
        print_json(answer | {"warnings": doubts})
    else:
        for finding in result.findings:
            say(str(finding))
        for sentence in result.unchecked:
            say(sentence)
        if not result.findings:
            say(f"{store}: {number} checked, nothing unusual.")
    if result.findings:
        wrong = len({one.atlas for one in result.findings})
        raise Failure(f"{store}: {wrong} of {number} checked should be looked at.")


def doubt_added(
    store: "AtlasStore", atlas_id: str, memory: int | None, client: "Client | None"
) -> None:
    """Check an atlas that was just added or relabelled, and warn of what is found; it stays."""
    from kpt_dask.annotation_check.schedule import check_atlases
    from kpt_dask.errors import USER_ERRORS
    from kpt_dask.runtime import notices

    if len(store) <= ENOUGH:
        return
    failures: tuple[type[Exception], ...] = (*USER_ERRORS, OSError, MemoryError)
    try:
        found = check_atlases(store, [atlas_id], memory=memory, client=client).findings
    except failures as error:
        notices.warn(f"{atlas_id} is in the store, but could not be checked: {error}")
        return
    for finding in found:
        # A scan that is there twice is warned of when it is added.
        if finding.kind != "duplicate":
            notices.warn(str(finding))
