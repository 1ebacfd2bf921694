"""Markers: the description of an atlas that can be read without opening it.

A marker is a small JSON document, written last. Every value is checked on reading, as the store
may come from somebody else.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

from atlas_store.arrays.boxes import Box
from atlas_store.errors import AtlasIdError, StoreFormatError
from atlas_store.organs import OrganTable
from atlas_store.storage.digests import Json, canonical, digest

ENCODING_TYPE = "kpt-atlas"
ENCODING_VERSION = "1"

MAX_VOXELS = 1 << 34
"""Limit of the elements of an array; a whole body at 0.5 mm has a quarter of it."""

FARTHEST = 1e7
"""Limit of distances from the world's origin, mm: ten kilometres."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEXADECIMAL = frozenset("0123456789abcdef")

T = TypeVar("T")

_CHECKSUM = b'{"checksum":"%s",'
"""First bytes of a marker: the SHA-256 of the rest, which begins with ``{`` when hashed."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class OrganInfo:
    """One organ of one atlas.

    Attributes
    ----------
    voxels : int
        Voxels with its label.
    bounding_box : tuple
        (start, stop) along z, y and x, half-open, in voxels.
    centroid : tuple of float
        (z, y, x) in mm.
    keypoints : int
        Keypoints with its label; `Draft.commit` counts them.

    Examples
    --------
    >>> from atlas_store import OrganInfo
    >>> OrganInfo(6, ((0, 2), (3, 5), (4, 6)), (1.0, 8.0, 10.0)).slices
    (slice(0, 2, None), slice(3, 5, None), slice(4, 6, None))
    """

    voxels: int
    bounding_box: Box
    centroid: tuple[float, float, float]
    keypoints: int = 0

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The bounding box as an index of the label map."""
        z, y, x = self.bounding_box
        return slice(*z), slice(*y), slice(*x)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickle fast: tasks carry many, and the default looks up the fields each time."""
        return type(self), (self.voxels, self.bounding_box, self.centroid, self.keypoints)


@dataclass(frozen=True, slots=True)
class AtlasInfo:
    """Content of the marker of an atlas.

    Attributes
    ----------
    id : str
        Its name in the store.
    uuid : str
        Part of the name of its data's folder; new each time an atlas is added or replaced.
    annotated : tuple of str
        Names of the organs that the annotator looked for.
    organs : mapping of str to OrganInfo
        The organs that its label map shows.
    keypoints : int
        Number of keypoints, those outside of organs included; in several frames they count
        once.
    shape, spacing, origin : tuple
        The working grid, (z, y, x): voxels, mm, centre of voxel (0, 0, 0) in mm.
    source : tuple of str
        Names of the files it was made from, without their folders.
    added : str
        Time of the commit, ISO 8601 in UTC.
    software : str
        Version of the program that added it.
    parameters : mapping
        Parameters it was made with: those of the store.
    organ_table : str
        SHA-256 of the organ table it was made with.
    digest : str
        SHA-256 of the group that holds the SHA-256 of every other object of its data.
    scan_digest : str or None
        SHA-256 of the scan's voxels on the working grid, which identifies the scan; None for
        atlases of earlier versions.
    source_digests : tuple of (str or None)
        SHA-256 of each of `source`; None of folders, and of what is no local file. Empty for
        atlases of earlier versions.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> info = store["body_1"].info
    >>> info.shape, info.source
    ((110, 65, 80), ('body_1_ct.nii.gz', 'body_1_seg.nii.gz'))
    """

    id: str
    uuid: str
    annotated: tuple[str, ...]
    organs: Mapping[str, OrganInfo]
    keypoints: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    source: tuple[str, ...]
    added: str
    software: str
    parameters: Mapping[str, Json]
    organ_table: str
    digest: str
    scan_digest: str | None = None
    source_digests: tuple[str | None, ...] = ()

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickle, as `OrganInfo` does."""
        return type(self), tuple(getattr(self, name) for name in self.__slots__)

    def dump(self) -> bytes:
        """Write the marker; it carries a checksum of itself."""
        content = {"encoding-type": ENCODING_TYPE, "encoding-version": ENCODING_VERSION}
        body = canonical(content | asdict(self))
        return _CHECKSUM % digest(body).encode() + body[1:]

    @classmethod
    def load(cls, data: bytes, atlas_id: str, where: str) -> Self:
        """Read the marker of `atlas_id`; `StoreFormatError` if it is malformed or newer."""
        content = parse_json(data, where)
        check_encoding(content, ENCODING_TYPE, ENCODING_VERSION, where)
        try:
            body = b"{" + data[len(_CHECKSUM % bytes(64)) :]
            if content["checksum"] != digest(body):
                raise ValueError("its checksum does not fit")
            if content["id"] != atlas_id:
                raise ValueError(f"it belongs to the atlas {content['id']!r}")
            return cls._decode(content)
        except KeyError as error:
            raise _damaged(where, f"it lacks the field {error}") from error
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _damaged(where, str(error)) from error

    @classmethod
    def _decode(cls, content: Mapping[str, Json]) -> Self:
        shape = _triple(content["shape"], _whole)
        if not 0 < math.prod(shape) <= MAX_VOXELS:
            raise ValueError(f"{shape} is no shape of a scan")
        spacing = _triple(content["spacing"], _number)
        made_with = _mapping(content["parameters"])
        common = made_with.get("spacing")
        if min(spacing) <= 0 or ("spacing" in made_with and not _agree(spacing, common)):
            raise ValueError(f"{spacing} mm is not the spacing of its store, {common!r} mm")
        origin = _triple(content["origin"], _number)
        if max(map(abs, origin)) > FARTHEST:
            raise ValueError(f"{origin} mm is no place of a patient")
        return cls(
            id=_text(content["id"]),
            uuid=_hexadecimal(content["uuid"], 32),
            annotated=_texts(content["annotated"]),
            organs={
                name: _decode_organ(_mapping(entry), shape)
                for name, entry in _mapping(content["organs"]).items()
            },
            keypoints=_whole(content["keypoints"]),
            shape=shape,
            spacing=spacing,
            origin=origin,
            source=_texts(content["source"]),
            added=_text(content["added"]),
            software=_text(content["software"]),
            parameters=made_with,
            organ_table=_hexadecimal(content["organ_table"], 64),
            digest=_hexadecimal(content["digest"], 64),
            scan_digest=_digest_or_none(content.get("scan_digest")),
            source_digests=tuple(map(_digest_or_none, content.get("source_digests", ()))),
        )


def check_id(atlas_id: str) -> str:
    """Return an id that can name an atlas; raise `AtlasIdError` for any other."""
    if not is_id(atlas_id):
        raise AtlasIdError(
            f"{atlas_id!r} cannot be the id of an atlas: use up to 128 letters, digits, dots, "
            "underscores and hyphens, a letter or digit first."
        )
    return atlas_id


def is_id(atlas_id: object) -> bool:
    """Whether this can be the id of an atlas."""
    return isinstance(atlas_id, str) and _ID.fullmatch(atlas_id) is not None


def natural_order(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorting key that puts pt_3 before pt_13."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)], name


def table_digest(organs: OrganTable) -> str:
    """SHA-256 of an organ table."""
    return digest(canonical(organs.to_json()))


def parse_json(data: bytes, where: str) -> dict[str, Json]:
    """Read a JSON object; `StoreFormatError` if it is none."""
    try:
        content = _DECODER.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(
            f"{where} is damaged, it is no JSON ({error}): restore it from a copy or remove it."
        ) from error
    if not isinstance(content, dict):
        raise StoreFormatError(f"{where} is damaged, it is no JSON object: remove it.")
    return content


def check_encoding(content: Mapping[str, Json], kind: str, version: str, where: str) -> None:
    """Refuse, by name, what is of another kind or a newer version."""
    if content.get("encoding-type") != kind:
        raise StoreFormatError(
            f"{where} has the encoding-type {content.get('encoding-type')!r}, not {kind!r}: "
            "use the path of an atlas store, or create one."
        )
    if content.get("encoding-version") != version:
        raise StoreFormatError(
            f"{where} has the encoding-version {content.get('encoding-version')!r}, but this "
            f"program reads {version!r}: update the program."
        )


def differences(store: Json, here: Json, name: str = "") -> list[str]:
    """Describe the differences of two JSON values, one phrase for each key."""
    if isinstance(store, dict) and isinstance(here, dict):
        return [
            phrase
            for key in sorted(store.keys() | here.keys())
            for phrase in differences(
                store.get(key, _ABSENT), here.get(key, _ABSENT), f"{name}.{key}" if name else key
            )
        ]
    if store == here:
        return []
    return [f"{name} is {_show(store)} in the store and {_show(here)} here"]


def _show(value: Json) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _damaged(where: str, what: str) -> StoreFormatError:
    return StoreFormatError(
        f"{where} is damaged ({what}): restore it from a copy or remove the atlas."
    )


def _decode_organ(entry: Mapping[str, Json], shape: tuple[int, int, int]) -> OrganInfo:
    # Listing a large store spends most of its time here, so calls are kept to a minimum.
    (z0, z1), (y0, y1), (x0, x1) = box = entry["bounding_box"]
    whole = z0, z1, y0, y1, x0, x1, entry["voxels"], entry["keypoints"]
    if set(map(type, whole)) != {int} or min(whole) < 0:
        raise ValueError(f"{whole!r} are no counts")
    if not (z0 < z1 <= shape[0] and y0 < y1 <= shape[1] and x0 < x1 <= shape[2]):
        raise ValueError(f"the bounding box {box} is empty or leaves the shape {shape}")
    voxels = entry["voxels"]
    if not 0 < voxels <= (z1 - z0) * (y1 - y0) * (x1 - x0):
        raise ValueError(f"{voxels} voxels do not fit the bounding box {box}")
    z, y, x = centroid = entry["centroid"]
    if not {int, float}.issuperset(map(type, centroid)) or not math.isfinite(z + y + x):
        raise ValueError(f"{centroid!r} is no point")
    return OrganInfo(
        entry["voxels"],
        ((z0, z1), (y0, y1), (x0, x1)),
        (float(z), float(y), float(x)),
        entry["keypoints"],
    )


def _agree(spacing: tuple[float, float, float], common: Json) -> bool:
    return all(math.isclose(mm, _number(common), rel_tol=1e-6) for mm in spacing)


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _hexadecimal(value: Json, length: int) -> str:
    if len(_text(value)) != length or not _HEXADECIMAL.issuperset(value):
        raise ValueError(f"{value!r} is no hexadecimal of length {length}")
    return _text(value)


def _digest_or_none(value: Json) -> str | None:
    return None if value is None else _hexadecimal(value, 64)


def _whole(value: Json) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _number(value: Json) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _mapping(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no object")
    return value


def _texts(value: Json) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return tuple(_text(item) for item in value)


def _triple(value: Json, of: Callable[[Json], T]) -> tuple[T, T, T]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{value!r} has not three members")
    z, y, x = (of(item) for item in value)
    return z, y, x
