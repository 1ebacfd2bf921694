"""A store of annotated atlases: add one by one, read lazily, lose none."""

from atlas_store.atlas import Atlas
from atlas_store.atlas_keypoints import AtlasKeypoints
from atlas_store.draft import Draft
from atlas_store.errors import (
    AtlasExistsError,
    AtlasIdError,
    AtlasNotFoundError,
    AtlasStoreError,
    EmptyStoreError,
    KeypointsFormatError,
    OrganTableError,
    ParameterMismatchError,
    StoreExistsError,
    StoreFormatError,
    StoreNotFoundError,
    StoreUnreachableError,
)
from atlas_store.keypoints import read_keypoints, write_keypoints
from atlas_store.marker import AtlasInfo, OrganInfo
from atlas_store.organs import Organ, OrganTable, load_organs
from atlas_store.snapshot import Snapshot
from atlas_store.store import AtlasStore
from atlas_store.trash import RemovedAtlas
from atlas_store.verify import Problem

__all__ = [
    "Atlas",
    "AtlasExistsError",
    "AtlasIdError",
    "AtlasInfo",
    "AtlasKeypoints",
    "AtlasNotFoundError",
    "AtlasStore",
    "AtlasStoreError",
    "Draft",
    "EmptyStoreError",
    "KeypointsFormatError",
    "Organ",
    "OrganInfo",
    "OrganTable",
    "OrganTableError",
    "ParameterMismatchError",
    "Problem",
    "RemovedAtlas",
    "Snapshot",
    "StoreExistsError",
    "StoreFormatError",
    "StoreNotFoundError",
    "StoreUnreachableError",
    "load_organs",
    "read_keypoints",
    "write_keypoints",
]
