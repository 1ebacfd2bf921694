"""Prediction of an atlas's labels from the other atlases of its store.

The program's own transfer in mode `across`, with the keypoints that the store holds: a second for
each atlas. Mode `local`, which takes five times as long, finds nothing more but shifts by a
centimetre.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from distributed import Client

from atlas_store import Atlas, AtlasStore
from atlas_store.keypoints import first_frames
from kpt_dask.annotation_check.duplicates import same_patient
from kpt_dask.segmentation import StationResults, segment_volume, temporary_image
from kpt_dask.volumes.volume import Volume, open_volume

MODE = "across"


@dataclass(frozen=True, eq=False)
class Predictor:
    """Prediction of atlases of a store, each from the others.

    Attributes
    ----------
    store : AtlasStore
        A snapshot: it must not change meanwhile.
    select : int
        Atlases that each is predicted from: those that agree best.
    memory : int, optional
        Bytes that each station may take in each process.
    client : distributed.Client
        Client whose workers compute.
    """

    store: AtlasStore
    select: int
    memory: int | None
    client: Client

    @contextmanager
    def predicted(self, atlas: Atlas, leave_out: Collection[str]) -> Iterator["Prediction | None"]:
        """Predict an atlas; the arrays exist inside the `with`.

        Parameters
        ----------
        atlas : Atlas
        leave_out : collection of str
            Ids that it must not be predicted from, besides its own.

        Yields
        ------
        Prediction or None
            None if no atlas is left.
        """
        volume = open_volume(atlas.image)
        keypoints = atlas.keypoints().drop_vars("label")
        twins: dict[str, float] = {}
        while True:
            out = {atlas.id, *leave_out, *twins}
            others = tuple(name for name in self.store.ids() if name not in out)
            if not others:
                yield None
                return
            with temporary_image(self.store, self.client, atlas.image) as group:
                found = segment_volume(
                    volume,
                    group,
                    self.store,
                    others,
                    mode=MODE,
                    select=self.select,
                    keypoints=keypoints,
                    memory=self.memory,
                    client=self.client,
                )
                # A second copy of the scan would confirm its labels, right or wrong.
                if more := self._twins(found):
                    twins |= more
                    continue
                yield Prediction(volume, found, twins)
                return

    def _twins(self, found: StationResults) -> dict[str, float]:
        """Shares of common keypoints with the atlases that show the same patient."""
        position, scale = found.keypoints.position.values, found.keypoints.scale.values
        shared = same_patient(
            found.matches,
            first_frames(position, scale).size,
            np.array([one.info.keypoints for one in self.store.atlases(found.atlases)]),
            float(self.store.parameters["spacing"]),
        )
        return {
            name: share
            for name, share in zip(found.atlases, shared.tolist(), strict=True)
            if share > 0
        }


@dataclass(frozen=True, eq=False)
class Prediction:
    """A predicted atlas.

    Attributes
    ----------
    volume : Volume
        Its scan.
    found : StationResults
        What the other atlases say of it.
    twins : mapping of str to float
        Atlases that show the same patient, which were left out, and the share of keypoints that
        they have in common with it.
    """

    volume: Volume
    found: StationResults
    twins: Mapping[str, float]
