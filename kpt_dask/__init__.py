"""Keypoint transfer segmentation of CT scans, streamed with Dask and Zarr.

The stations of the data's way, in order: `open_scan`, `convert`, `extract`, `match`, `vote`,
`transfer`. `segment` walks them all, `segment_batch` with many scans. `export` writes label files
of its output and `write_report` a page, `add_atlas` makes an atlas, `check_atlases` doubts
annotations, `evaluate` measures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpt_dask.annotation_check.schedule import check_atlases
    from kpt_dask.atlases.add import add_atlas, add_folder, store_parameters
    from kpt_dask.batches import segment_batch
    from kpt_dask.evaluation.run import evaluate
    from kpt_dask.exports import export, export_atlas
    from kpt_dask.keypoints.extraction import extract
    from kpt_dask.matching.first_pass import match
    from kpt_dask.matching.voting import vote
    from kpt_dask.organ_transfer.modes import transfer
    from kpt_dask.report.writing import write_report
    from kpt_dask.scans.scan import open_scan
    from kpt_dask.segmentation import open_probability, segment
    from kpt_dask.volumes.conversion import convert
    from kpt_dask.volumes.volume import open_volume

__all__ = [
    "add_atlas",
    "add_folder",
    "check_atlases",
    "convert",
    "evaluate",
    "export",
    "export_atlas",
    "extract",
    "match",
    "open_probability",
    "open_scan",
    "open_volume",
    "segment",
    "segment_batch",
    "store_parameters",
    "transfer",
    "vote",
    "write_report",
]

_HOME = {
    "add_atlas": "atlases.add",
    "add_folder": "atlases.add",
    "check_atlases": "annotation_check.schedule",
    "convert": "volumes.conversion",
    "evaluate": "evaluation.run",
    "export": "exports",
    "export_atlas": "exports",
    "extract": "keypoints.extraction",
    "match": "matching.first_pass",
    "open_probability": "segmentation",
    "open_scan": "scans.scan",
    "open_volume": "volumes.volume",
    "segment": "segmentation",
    "segment_batch": "batches",
    "store_parameters": "atlases.add",
    "transfer": "organ_transfer.modes",
    "vote": "matching.voting",
    "write_report": "report.writing",
}


def __getattr__(name: str) -> Any:
    """Import a station when it is first used: `kpt --help` needs none of them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
