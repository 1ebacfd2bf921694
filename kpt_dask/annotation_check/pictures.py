"""Pictures of a finding: labels of an atlas beside those that were predicted, over the scan."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from atlas_store import OrganInfo, OrganTable
from atlas_store.organs import Organ
from kpt_dask.atlases.profiles import Voxels
from kpt_dask.volumes.omezarr import WINDOW

INCHES, DPI = (8.0, 7.0), 100
MARGIN = 20
"""Voxels around the organs that are shown."""


@dataclass(frozen=True, eq=False)
class Picture:
    """What pictures of an atlas are drawn of, on one grid whose axes are z, y and x.

    Attributes
    ----------
    scan, labels : array-like (z, y, x)
        HU, and label values.
    predicted : array-like (z, y, x) or None
        Predicted label values.
    organs : OrganTable
        Names and colours.
    """

    scan: Voxels
    labels: Voxels
    predicted: Voxels | None
    organs: OrganTable

    def png(self, names: Sequence[str], shown: Mapping[str, OrganInfo]) -> bytes:
        """Draw an axial and a coronal slice through organs as PNG.

        Parameters
        ----------
        names : sequence of str
            The organs in question; all if there are none.
        shown : mapping of str to OrganInfo
            The organs that the label map shows.
        """
        wanted = [name for name in names if name in shown] or list(shown)
        middle = [
            int(np.mean([sum(shown[name].bounding_box[axis]) / 2 for name in wanted]))
            for axis in (0, 1)
        ]
        boxes = np.array([one.bounding_box for one in shown.values()])
        low = np.maximum(boxes[:, :, 0].min(axis=0) - MARGIN, 0)
        high = boxes[:, :, 1].max(axis=0) + MARGIN
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        figure = Figure(figsize=INCHES, dpi=DPI, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, squeeze=False)
        views: list[tuple[Any, ...]] = [(middle[0], y, x), (z, middle[1], x)]
        columns = (("in the store", self.labels), ("predicted by the others", self.predicted))
        for row, region in enumerate(views):
            values = np.asarray(self.scan[region])
            for column, (title, labels) in enumerate(columns):
                plane = np.zeros(values.shape, np.uint16)
                if labels is not None:
                    plane = np.asarray(labels[region])
                # Rows of an axial slice run from front to back, of a coronal one from foot to head.
                self._draw(axes[row, column], values, plane, "upper" if row == 0 else "lower")
                if row == 0:
                    axes[row, column].set_title(title)
        lines = [
            Line2D([], [], color=_colour(organ), label=organ.name)
            for organ in self.organs
            if organ.name in shown
        ]
        figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            "axial, seen from the feet, and coronal: the patient's right is on the left"
        )
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()

    def _draw(self, axes: Axes, values: NDArray[Any], labels: NDArray[Any], origin: Any) -> None:
        axes.imshow(values, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], origin=origin)
        for organ in self.organs:
            mask = labels == organ.value
            if mask.any():
                outline = [_colour(organ)]
                axes.contour(mask.astype(float), levels=[0.5], colors=outline, linewidths=1.2)
        axes.set_axis_off()


def _colour(organ: Organ) -> tuple[float, float, float]:
    red, green, blue = organ.colour
    return red / 255, green / 255, blue / 255
