"""Second judges of measures: NumPy and SimpleITK."""

from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

sitk: Any = SimpleITK

Mask = NDArray[np.bool_]


def numpy_dice(a: Mask, b: Mask) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum())) if (a | b).any() else 1.0


def simpleitk_measures(
    one: Mask, other: Mask, spacing: float, tolerance: float = 3.0
) -> dict[str, float]:
    """Measures of two masks of isotropic voxels, neither of them empty."""
    # Outside of the image is nothing, of which SimpleITK's contours know nothing.
    masks = [np.pad(mask, 1).astype(np.uint8) for mask in (one, other)]
    images = [sitk.GetImageFromArray(mask) for mask in masks]
    for image in images:
        image.SetSpacing([spacing] * 3)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    contours = [sitk.LabelContour(image, fullyConnected=False) for image in images]
    distances = [
        np.abs(
            sitk.GetArrayFromImage(
                sitk.SignedMaurerDistanceMap(contour, squaredDistance=False, useImageSpacing=True)
            )
        )
        for contour in contours
    ]
    there, back = (distances[i][sitk.GetArrayFromImage(contours[1 - i]) > 0] for i in (0, 1))
    both = np.concatenate([there, back])
    return {
        "dice": overlap.GetDiceCoefficient(),
        "mean_distance_mm": float(both.mean()),
        "distance_95_mm": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "surface_dice": float((both <= tolerance).mean()),
    }
