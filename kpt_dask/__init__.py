"""Keypoint transfer segmentation of CT scans, streamed with Dask and Zarr.

The stations of the data's way, in order: `open_scan`, `convert`, `extract`, `match`, `vote`,
`transfer`; `segment` walks them all, `add_atlas` makes an atlas, `evaluate` measures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpt_dask.atlases import add_atlas, add_folder, store_parameters
    from kpt_dask.evaluation import evaluate
    from kpt_dask.keypoints import extract
    from kpt_dask.matching import match
    from kpt_dask.scan import open_scan
    from kpt_dask.segmentation import open_probability, segment
    from kpt_dask.transfer import transfer
    from kpt_dask.volume import convert, open_volume
    from kpt_dask.voting import vote

__all__ = [
    "add_atlas",
    "add_folder",
    "convert",
    "evaluate",
    "extract",
    "match",
    "open_probability",
    "open_scan",
    "open_volume",
    "segment",
    "store_parameters",
    "transfer",
    "vote",
]

_HOME = {
    "add_atlas": "atlases",
    "add_folder": "atlases",
    "convert": "volume",
    "evaluate": "evaluation",
    "extract": "keypoints",
    "match": "matching",
    "open_probability": "segmentation",
    "open_scan": "scan",
    "open_volume": "volume",
    "segment": "segmentation",
    "store_parameters": "atlases",
    "transfer": "transfer",
    "vote": "voting",
}


def __getattr__(name: str) -> Any:
    """Import a station when it is first used: `kpt --help` needs none of them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
