"""Write the page and the picture of a segmentation."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import AtlasStore
from atlas_store.arrays import chunk_io
from atlas_store.storage.full_disk import naming
from kpt_dask.errors import ParameterError
from kpt_dask.organ_transfer.measures import OrganMeasures
from kpt_dask.output.commit import replacing_together
from kpt_dask.output.places import check_outputs
from kpt_dask.report.display import MOST_VOXELS, display_of, hu_of_tones
from kpt_dask.report.findings import Findings, open_findings
from kpt_dask.report.viewer import Viewer, find_viewer
from kpt_dask.runtime import progress

StrPath = str | PathLike[str]


@dataclass(frozen=True)
class ReportRequest:
    """Which files of a report are wanted.

    Attributes
    ----------
    page, picture : str, optional
        The HTML file, and the PNG.
    viewer : Viewer, optional
        What the page shows the scan with; pictures without.
    """

    page: str | None = None
    picture: str | None = None
    viewer: Viewer | None = None

    @classmethod
    def parse(
        cls, page: StrPath | None, picture: StrPath | None, viewer: StrPath | None = None
    ) -> "ReportRequest":
        """Understand what was asked, and refuse what cannot be done before any work.

        Raises
        ------
        ParameterError
            If a file has another ending than its kind, or the viewer cannot be used.
        """
        request = cls(
            None if page is None else fspath(page), None if picture is None else fspath(picture)
        )
        for path, endings in ((request.page, (".html", ".htm")), (request.picture, (".png",))):
            if path is not None and not path.lower().endswith(endings):
                raise ParameterError(f"{path} must end in {' or '.join(endings)}.")
        return request if page is None else replace(request, viewer=find_viewer(viewer))

    def targets(self) -> list[str]:
        """Paths of the files, as asked for."""
        return [path for path in (self.page, self.picture) if path is not None]

    def write(self, findings: Findings, store: AtlasStore | None, paths: list[Path]) -> None:
        """Write the files to paths in the order of `targets`, usually names for the time being."""
        left = iter(paths)
        if self.page is not None:
            # Imported here: only reports need it.
            from kpt_dask.report.page import page_of

            path = next(left)
            with progress.stage("Writing report"), naming(path):
                text = page_of(findings, store, self.viewer, MOST_VOXELS)
                path.write_text(text, "utf-8")
        if self.picture is not None:
            path = next(left)
            with progress.stage("Drawing"), naming(path):
                _draw(findings, path)


def findings_of(
    path: StrPath,
    group: zarr.Group | None = None,
    organs: Mapping[str, OrganMeasures] | None = None,
    volume_grid: str = "working",
) -> Findings:
    """Read what a segmentation found; with `organs`, these measures, of `volume_grid`."""
    findings = open_findings(fspath(path), group)
    if organs is None:
        return findings
    return replace(findings, organs=organs, volume_grid=volume_grid)


def write_report(
    segmentation: StrPath,
    page: StrPath | None = None,
    *,
    picture: StrPath | None = None,
    store: AtlasStore | StrPath | None = None,
    viewer: StrPath | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page that shows a segmentation, and a picture of it.

    The page is one HTML file that needs no network: the scan and its labels in three planes and in
    3-D, a table of the organs, and for each the atlases that decided it and its matched keypoints.

    Parameters
    ----------
    segmentation : str or Path
        The OME-Zarr output of `kpt_dask.segment`, or its URL.
    page : str or Path, optional
        The HTML file.
    picture : str or Path, optional
        A PNG of a slide's size: the organs over a coronal, a sagittal and an axial slice.
    store : AtlasStore, str or Path, optional
        Store of the atlases; without it their patches are left out.
    viewer : str or Path, optional
        NiiVue's ``niivue.umd.js`` or its npm package (``.tgz``), put into the page. By default the
        file that the environment variable ``KPT_VIEWER`` names, or the one in the user's cache;
        without any, the page shows pictures.
    overwrite : bool
        Whether existing files may be replaced.

    Raises
    ------
    ParameterError
        If there is nothing to write, or the viewer cannot be used.
    ScanNotFoundError, ScanFormatError
        If there is no segmentation.
    KptError, AtlasStoreError
        If a file cannot be written, or the store cannot be opened.

    Examples
    --------
    >>> from pathlib import Path
    >>> import kpt_dask
    >>> kpt_dask.write_report("body_4.zarr", "body_4.html", store="atlases")
    >>> "liver" in Path("body_4.html").read_text("utf-8")
    True
    """
    request = ReportRequest.parse(page, picture, viewer)
    if not request.targets():
        raise ParameterError("There is nothing to write; name a page or a picture.")
    if store is not None and not isinstance(store, AtlasStore):
        store = AtlasStore.open(store)
    inputs = [segmentation, *([] if store is None else [store.url])]
    targets = check_outputs(files=request.targets(), inputs=inputs, overwrite=overwrite)
    findings = findings_of(segmentation)
    for array in (*findings.volume.levels, *findings.labels):
        chunk_io.check_complete(array)
    with ExitStack() as stack:
        partials = stack.enter_context(replacing_together(targets, overwrite=overwrite))
        request.write(findings, store, partials)


@dataclass(frozen=True, eq=False)
class _Hu:
    """HU of tones, made where they are read."""

    tones: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tones.shape

    def __getitem__(self, region: Any) -> NDArray[np.int16]:
        hu: NDArray[np.int16] = hu_of_tones()[self.tones[region]]
        return hu


def _draw(findings: Findings, path: Path) -> None:
    # Imported here: it needs matplotlib, which takes a while.
    from kpt_dask.report.overlay import draw_overlay

    organs = [organ for organ in findings.table if organ.name in findings.organs]
    volume = findings.volume
    values = [organ.value for organ in organs]
    display = display_of(
        volume.levels, findings.labels, volume.grid, values, source_grid=volume.source_grid
    )
    numbered = [replace(organ, value=number) for number, organ in enumerate(organs, 1)]
    volumes = [findings.organs[organ.name].volume_ml for organ in organs]
    draw_overlay(
        path, _Hu(display.tones), display.organs, numbered, display.grid, findings.scan, volumes
    )
