"""``kpt report``: the page and the picture of a segmentation."""

from pathlib import Path

import click

from kpt_dask.cli.common import (
    json_option,
    overwrite_option,
    picture_option,
    print_json,
    say,
    working,
)


@click.command()
@click.argument("segmentation", metavar="OUT.zarr", type=click.Path())
@click.option(
    "--out",
    "page",
    type=click.Path(),
    metavar="FILE.html",
    help="The page.  [default: OUT.html, or none with --picture]",
)
@picture_option
@click.option(
    "--store",
    metavar="STORE",
    help="Store of the atlases, whose patches are shown beside those of the scan.",
)
@click.option(
    "--viewer",
    type=click.Path(),
    metavar="FILE",
    help="NiiVue's niivue.umd.js, or its npm package (.tgz), which is put into the page and shows "
    "the scan in 3-D.  [default: $KPT_VIEWER, else what npm pack @niivue/niivue left in "
    "~/.cache/kpt-dask, else pictures]",
)
@overwrite_option
@json_option
def report(
    segmentation: str,
    page: str | None,
    picture: str | None,
    store: str | None,
    viewer: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show OUT.zarr, which kpt segment made: one page that needs no network.

    The page shows the scan with its labels in three planes and in 3-D, a table of the organs, the
    least sure first, and why: the atlases that decided each organ, and its matched keypoints.
    It opens from disk in any browser. OUT.zarr is a folder or a URL (s3://…).

    \b
    Examples:
      kpt report scan.zarr --store atlases
      kpt report scan.zarr --out page.html --store atlases --viewer niivue.umd.js
      kpt report scan.zarr --picture slide.png
    """
    from kpt_dask.remote import Remote, scheme_of
    from kpt_dask.report.viewer import find_viewer, how_to_install
    from kpt_dask.report.writing import write_report
    from kpt_dask.runtime import notices

    if page is None and picture is None:
        if scheme_of(segmentation) is None:
            place = Path(segmentation).resolve()
        else:
            place = Path(Remote(segmentation).name).absolute()
        page = str(place.with_name(f"{place.name.removesuffix('.zarr')}.html"))
    with notices.recorded() as doubts, working(None):
        write_report(
            segmentation, page, picture=picture, store=store, viewer=viewer, overwrite=overwrite
        )
    if as_json:
        print_json({"page": page, "picture": picture, "warnings": doubts})
        return
    say(f"Written: {', '.join(filter(None, (page, picture)))}.")
    if page is not None and find_viewer(viewer) is None:
        say(how_to_install())
