"""The main job on phantoms, so that anybody can see it work without a scan at hand."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from distributed import Client

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.errors import OutputExistsError
from kpt_dask.evaluation.overlap import dice
from kpt_dask.runtime import cluster, progress
from kpt_dask.scans.scan import open_scan
from kpt_dask.segmentation import Segmentation, segment

SHAPE = (300, 130, 160)
"""Voxels of a phantom (z, y, x): a whole body at 2 mm."""
SPACING = 2.0
ATLASES = 8
ORGANS = "visceral"


@dataclass(frozen=True)
class Demo:
    """Results of the demo.

    Attributes
    ----------
    segmentation : Segmentation
        Segmentation of the phantom that is in no atlas.
    dice : dict of str to float
        Dice by organ, against the phantom's true labels.
    """

    segmentation: Segmentation
    dice: Mapping[str, float]


def demo(
    out: str | Path,
    *,
    shape: tuple[int, int, int] = SHAPE,
    spacing: float = SPACING,
    memory: int | None = None,
    client: Client | None = None,
) -> Demo:
    """Build a store of eight phantoms and segment a ninth.

    Parameters
    ----------
    out : str or Path
        Folder for ``atlases``, ``scan.nii.gz``, ``scan.zarr``, ``labels.nii.gz``,
        ``report.html`` and ``overlay.png``. Atlases that are there are reused, the others are
        replaced.
    shape, spacing
        Voxels (z, y, x) and spacing in mm of each phantom; the working grid has this spacing too.
    memory, client
        As for `kpt_dask.segment`.

    Raises
    ------
    OutputExistsError
        If the folder exists, holds something, and was not made by the demo.
    KptError, AtlasStoreError
        If the store of an earlier demo cannot be used.
    """
    out = Path(out)
    if out.exists() and not (out / "atlases").exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} holds something else; give the demo another folder.")
    if (out / "atlases").exists() and not all(
        name.startswith("phantom_") for name in AtlasStore.open(out / "atlases").ids()
    ):
        raise OutputExistsError(
            f"{out / 'atlases'} holds other atlases than phantoms; give the demo another folder."
        )
    with cluster.session(client) as session, tempfile.TemporaryDirectory() as folder:
        store = _store(out / "atlases", Path(folder), shape, spacing, memory, session)
        scan, truth = out / "scan.nii.gz", Path(folder) / "truth.nii.gz"
        with progress.stage("Making the scan"):
            write_phantom(scan, truth, ATLASES + 1, shape, spacing, overwrite=True)
        found = segment(
            scan,
            store,
            out / "scan.zarr",
            labels=out / "labels.nii.gz",
            report=out / "report.html",
            picture=out / "overlay.png",
            overwrite=True,
            memory=memory,
            client=session,
        )
        expected, actual = (
            chain.from_iterable(open_scan(path).label_slabs())
            for path in (truth, out / "labels.nii.gz")
        )
        scores = dice(expected, actual, store.organs.names, store.organs)
    return Demo(found, scores)


def how_to_open(out: Path) -> Iterator[str]:
    """Lines that name the demo's files, each with a program that opens it."""
    scan, labels = out / "scan.nii.gz", out / "labels.nii.gz"
    yield f"  {out / 'report.html'}: any browser"
    yield f"  {out / 'overlay.png'}: any picture viewer"
    yield f"  {scan} with {labels} as segmentation: 3D Slicer, ITK-SNAP"
    yield f"  {out / 'scan.zarr'}: napari --plugin kpt-dask, where napari is installed beside kpt"
    yield f"  {out / 'atlases'}: kpt atlas list"


def _store(
    path: Path,
    folder: Path,
    shape: tuple[int, int, int],
    spacing: float,
    memory: int | None,
    client: Client,
) -> AtlasStore:
    """Open the demo's store, and add the phantoms that are missing."""
    if path.exists():
        store = AtlasStore.open(path)
    else:
        store = AtlasStore.create(path, load_organs(ORGANS), store_parameters(spacing))
    with progress.stage("Making atlases", total=ATLASES) as advance:
        for seed in range(1, ATLASES + 1):
            name = f"phantom_{seed}"
            if name not in store:
                scan, labels = folder / f"{name}.nii.gz", folder / f"{name}_labels.nii.gz"
                write_phantom(scan, labels, seed, shape, spacing)
                add_atlas(store, scan, labels, memory=memory, client=client)
            advance(1)
    return store
