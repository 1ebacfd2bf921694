"""Layout of a store: keys of its objects.

::

    zarr.json                     the store: encoding, uuid, organ table, parameters
    markers/<id>.json             one per atlas, written last: names the uuid of its data
    removed/<id>.<uuid>.json      one per removed or replaced atlas that can be restored: its
                                  marker, and when; also of one that took another's place
    notes/<id>.<uuid>.json        what somebody noted about an atlas
    atlases/<id>.<uuid>/          the data of an atlas, a Zarr group; its attributes hold the
                                  SHA-256 of every other object in it
        image/                    OME-Zarr image; image/labels/organs its label map
        keypoints/                one array per variable
        surroundings/             HU and labels around the organs, `atlas_store.crop`
        strips/                   each organ's voxels, `atlas_store.organ_strips`

Every object read from an atlas is compared with its SHA-256 (`atlas_store.storage.sealed`), and
its marker with the organ table and the parameters of the store.

An atlas exists if, and only if, its marker does. Data that neither a marker nor a removed atlas
names belongs to a running or an interrupted add. If it has digests, which are written when it is
complete and deleted first, its marker may be lost: it is kept, unless a marker names other data.
Every add makes a new folder, so that replacing an atlas never mixes two, and no lock is needed.
"""

import re

ROOT = "zarr.json"
MARKERS = "markers"
ATLASES = "atlases"
REMOVED = "removed"
NOTES = "notes"
IMAGE = "image"
LABELS = "image/labels/organs/0"
KEYPOINTS = "keypoints"

_FOLDER = re.compile(r"(?P<id>.+)\.(?P<uuid>[0-9a-f]{32})", re.DOTALL)


def marker_key(atlas_id: str) -> str:
    """Key of the marker of an atlas."""
    return f"{MARKERS}/{atlas_id}.json"


def removed_key(atlas_id: str, uuid: str) -> str:
    """Key of what describes a removed atlas."""
    return f"{REMOVED}/{atlas_id}.{uuid}.json"


def note_key(atlas_id: str, uuid: str) -> str:
    """Key of the note on an atlas."""
    return f"{NOTES}/{atlas_id}.{uuid}.json"


def data_folder(atlas_id: str, uuid: str) -> str:
    """Folder of the data of an atlas."""
    return f"{ATLASES}/{atlas_id}.{uuid}"


def parse_folder(name: str) -> tuple[str, str] | None:
    """Id and uuid of a folder below `ATLASES`; None if it is no such folder."""
    match = _FOLDER.fullmatch(name)
    return (match["id"], match["uuid"]) if match else None
