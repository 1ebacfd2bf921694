"""Parameters that keypoints depend on: those of a scan and of its atlases must agree."""

from typing import Any

from kpt_dask.errors import ParameterError
from kpt_dask.keypoints.descriptors import ANISOTROPY, HALF_WIDTH, PATCH
from kpt_dask.volumes.scale_space import INPUT_SIGMA, LEVELS, SIGMA0, TRUNCATE

PARAMETERS: dict[str, Any] = {
    "detector": "difference of Gaussians",
    "sigma0": SIGMA0,
    "input_sigma": INPUT_SIGMA,
    "levels": LEVELS,
    "truncate": TRUNCATE,
    "patch": PATCH,
    "half_width": HALF_WIDTH,
    "anisotropy": ANISOTROPY,
}
"""Fixed parameters of detector and descriptor, as an atlas store records them."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "descriptor": ("upright", "invariant"),
    "finer": (False, True),
}
"""Parameters that a user chooses, and their values; the first is the default."""


def keypoint_parameters(descriptor: str = "upright", finer: bool = False) -> dict[str, Any]:
    """All parameters that keypoints depend on.

    Parameters
    ----------
    descriptor, finer
        As for `kpt_dask.extract`.

    Raises
    ------
    ParameterError
        If the descriptor is unknown.
    """
    known = CHOICES["descriptor"]
    if descriptor not in known:
        raise ParameterError(f"The descriptor {descriptor!r} is unknown; use {' or '.join(known)}.")
    return {**PARAMETERS, "descriptor": descriptor, "finer": bool(finer)}
