"""Pictures and volumes as data URIs: what a page holds needs no second file and no network."""

from base64 import b64encode
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUALITY = 72
"""Of JPEG, 0 to 95: CT at 2 mm shows no blocks."""


def jpeg_uri(picture: NDArray[np.uint8], quality: int = QUALITY) -> str:
    """Encode a grey picture (row, column), or one in colour (row, column, 3)."""
    return _uri(picture, "jpeg", quality=quality, optimize=True)


def png_uri(picture: NDArray[np.uint8]) -> str:
    """Encode a picture without loss."""
    return _uri(picture, "png", compress_level=9)


def data_uri(data: bytes, kind: str) -> str:
    """Encode bytes of a media type."""
    return f"data:{kind};base64,{b64encode(data).decode('ascii')}"


def number_pixels(numbers: NDArray[Any], blue: NDArray[Any] | int = 0) -> NDArray[np.uint8]:
    """Put numbers of organs into colours: low byte red, high byte green, and a blue of one's own.

    Scripts of a page read them, and show each organ in its colour, or not at all.
    """
    picture = np.empty((*numbers.shape, 3), np.uint8)
    picture[..., 0] = numbers & 0xFF
    picture[..., 1] = numbers >> 8
    picture[..., 2] = blue
    return picture


def _uri(picture: NDArray[np.uint8], kind: str, **options: Any) -> str:
    # Imported here: only pages need it.
    from PIL import Image

    out = BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, kind, **options)
    return data_uri(out.getvalue(), f"image/{kind}")
