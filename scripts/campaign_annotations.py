#!/usr/bin/env python
"""How many wrong annotations `kpt atlas check` finds, and how many sound ones it doubts.

Of a store of sound atlases each is predicted once from the others. Then the labels of atlases are
made wrong, one at a time and at random, and judged against the same prediction, in a store that is
otherwise as it was. Limits are compared on the atlases of even position; those of odd position
report what the program's own limit finds. `add` is the check of a single new atlas, whose spread is
that of a few references.

`--cache` keeps predictions, so that the next run begins with the faults.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from atlas_store import Atlas, AtlasKeypoints, AtlasStore, Snapshot, load_organs
from atlas_store.arrays.regions import open_array
from atlas_store.keypoints import first_frames
from kpt_dask.annotation_check.comparison import Comparison, compare
from kpt_dask.annotation_check.duplicates import same_patient, shared_keypoints
from kpt_dask.annotation_check.prediction import MODE, Predictor
from kpt_dask.annotation_check.rules import Rules, partner
from kpt_dask.annotation_check.schedule import SELECT, population
from kpt_dask.annotation_check.spread import LIMIT
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.exports import export_atlas
from kpt_dask.keypoints.extraction import extract
from kpt_dask.matching.first_pass import match
from kpt_dask.runtime import cluster
from kpt_dask.scans.pairs import find_pairs
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert
from kpt_dask.volumes.volume import open_volume

DATA = Path(__file__).parents[2] / "shared" / "data" / "openkbp"
LIMITS = (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0)
ALLOWED = 0.05
"""Share of sound atlases that may be doubted."""

Labels = NDArray[np.uint16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="of sound atlases; made of --data unless given")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the openkbp patients")
    parser.add_argument("--spacing", type=float, default=2.0, help="of the store, mm")
    parser.add_argument("--cache", type=Path, help="keep predictions in this folder")
    parser.add_argument("--atlases", type=int, help="only so many, the first")
    parser.add_argument("--injections", type=int, default=20, help="of each fault in each half")
    parser.add_argument("--faults", nargs="*", choices=list(FAULTS), help="only these")
    parser.add_argument("--select", type=int, default=SELECT)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, cluster.session() as client:
        folder = Path(name)
        if options.store is None:
            parameters = store_parameters(options.spacing)
            store = AtlasStore.create(folder / "store", load_organs("openkbp"), parameters)
            for pair in find_pairs(options.data)[: options.atlases]:
                add_atlas(store, pair.scan, pair.labels, atlas_id=pair.id, client=client)
        else:
            store = AtlasStore.open(options.store)
        cache = options.cache or folder / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        kept = Snapshot(store)
        predictor = Predictor(kept, options.select, None, client)
        campaign = Campaign(kept, predictor, cache, options.faults or list(FAULTS))
        campaign.run(options.atlases, options.injections, options.seed)


@dataclass(frozen=True)
class Case:
    """An atlas whose labels were made wrong."""

    fault: str
    atlas: str
    comparison: Comparison


class Campaign:
    """A store of sound atlases, and predictions of each from the others, kept in `cache`."""

    def __init__(
        self, store: AtlasStore, predictor: Predictor, cache: Path, faults: Sequence[str]
    ) -> None:
        self.store, self.predictor, self.cache, self.faults = store, predictor, cache, faults
        self.voxel_mm = float(store.parameters["spacing"])

    def run(self, atlases: int | None, injections: int, seed: int) -> None:
        """Do all of it, and print what is found."""
        rng = np.random.default_rng(seed)
        ids = self.store.ids()[:atlases]
        start = time.perf_counter()
        sound = {name: self.compared(self.store[name]) for name in ids}
        print(f"{len(ids)} atlases predicted and compared in {time.perf_counter() - start:.0f} s")
        halves = {"even": ids[0::2], "odd": ids[1::2]}
        cases = {half: list(self.cases(names, injections, rng)) for half, names in halves.items()}
        print("\nlimit, chosen on even positions: false alarms; found")
        for limit in LIMITS:
            alarms, found = self.judged(sound, halves["even"], cases["even"], limit)
            print(f"{limit:g}: {alarms} of {len(halves['even'])}; {told(found)}")
        for half, what in (("even", "check"), ("odd", "check"), ("odd", "add")):
            alarms, found = self.judged(sound, halves[half], cases[half], LIMIT, add=what == "add")
            share = alarms / len(halves[half])
            print(
                f"\n{what}, {half} positions, limit {LIMIT:g}: {alarms} false alarms in"
                f" {len(halves[half])} atlases ({100 * share:.1f} %); found:"
            )
            for fault, (number, named, total) in found.items():
                print(f"  {fault}: {number} of {total}, {named} by its name")
        twins, most = self.same_patients(halves["odd"], injections, rng)
        print(f"\nsame patient, noise and a shift: {twins} of {injections} found")
        print(f"largest share of keypoints in common with another patient: {most:.3f}")

    def judged(
        self,
        sound: Mapping[str, Comparison],
        names: Sequence[str],
        cases: Sequence[Case],
        limit: float,
        *,
        add: bool = False,
    ) -> tuple[int, dict[str, tuple[int, int, int]]]:
        """Count sound atlases that are doubted; and by fault the found, the named, and all."""

        def kinds(name: str, comparison: Comparison) -> set[str]:
            # In a store of nothing but sound atlases, this one excepted.
            among = population([name], list(sound)) if add else list(sound)
            compared = {one: sound[one] for one in among} | {name: comparison}
            layouts = {one: found.layout for one, found in {**sound, **compared}.items()}
            rules = Rules(self.store.organs, self.voxel_mm, layouts, compared, limit)
            return {finding.kind for finding in rules.findings(name)}

        alarms = sum(bool(kinds(name, sound[name])) for name in names)
        found: dict[str, tuple[int, int, int]] = {}
        for case in cases:
            told_kinds = kinds(case.atlas, case.comparison)
            number, named, total = found.get(case.fault, (0, 0, 0))
            expected = FAULTS[case.fault][0]
            found[case.fault] = (
                number + bool(told_kinds),
                named + bool(told_kinds & expected),
                total + 1,
            )
        return alarms, found

    def cases(
        self, names: Sequence[str], injections: int, rng: np.random.Generator
    ) -> Iterator[Case]:
        """Make labels wrong at random."""
        for fault in self.faults:
            _, inject = FAULTS[fault]
            made = 0
            # A small store needs each of its atlases more than once.
            for name in [one for _ in range(20) for one in rng.permutation(names).tolist()]:
                if made == injections:
                    break
                labels = self.labels(self.store[name])
                wrong = inject(labels, self, rng)
                if wrong is not None and (wrong != labels).any() and wrong.any():
                    made += 1
                    yield Case(fault, name, self.compared(self.store[name], wrong))

    def compared(self, atlas: Atlas, labels: Labels | None = None) -> Comparison:
        """Compare an atlas, or other labels of its scan, with the prediction."""
        return compare(
            self.labels(atlas) if labels is None else labels,
            self.predicted(atlas),
            open_array(atlas.image, "0"),
            open_volume(atlas.image).grid,
            self.store.organs,
        )

    def labels(self, atlas: Atlas) -> Labels:
        """Labels of an atlas."""
        return np.asarray(atlas.labels[:]).astype(np.uint16)

    def predicted(self, atlas: Atlas) -> Labels:
        """Labels that the others predict, made once."""
        # Named by all that a prediction depends on.
        path = (
            self.cache / f"{MODE}-{self.predictor.select}-{len(self.store)}-{atlas.info.uuid}.npz"
        )
        if not path.exists():
            with self.predictor.predicted(atlas, ()) as found:
                assert found is not None
                if found.twins:
                    print(f"{atlas.id} shows the same patient as {', '.join(found.twins)}")
                np.savez_compressed(path, predicted=np.asarray(found.found.labels[:]))
        with np.load(path) as kept:
            return np.asarray(kept["predicted"]).astype(np.uint16)

    def same_patients(
        self, names: Sequence[str], injections: int, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Count second copies that are recognised, with noise and shifted by parts of a voxel."""
        ids = self.store.ids()
        keypoints = AtlasKeypoints.load(self.store, ids)
        n_atlas = np.array([atlas.info.keypoints for atlas in self.store.atlases(ids)])
        recognised, most = 0, 0.0
        for name in rng.choice(names, injections, replace=injections > len(names)).tolist():
            with tempfile.TemporaryDirectory() as folder:
                scan, _ = export_atlas(self.store[name], folder)
                image: Any = nibabel.load(scan)
                moved = ndimage.shift(
                    image.get_fdata(), rng.uniform(-0.5, 0.5, 3), order=1, mode="nearest"
                )
                noisy = (moved + rng.normal(0, 15, moved.shape)).round().astype(np.int16)
                path = Path(folder) / "again.nii.gz"
                again_image: Any = image.__class__(noisy, image.affine)
                nibabel.save(again_image, path)
                volume = convert(open_scan(path), Path(folder) / "x.zarr", spacing=self.voxel_mm)
                again = extract(
                    volume,
                    descriptor=self.store.parameters["descriptor"],
                    finer=self.store.parameters["finer"],
                )
            n = first_frames(again.position.values, again.scale.values).size
            known = match(again, keypoints), n, n_atlas, self.voxel_mm
            recognised += np.flatnonzero(same_patient(*known)).tolist() == [ids.index(name)]
            most = max(most, float(np.delete(shared_keypoints(*known), ids.index(name)).max()))
        return recognised, most


Inject = Callable[[Labels, Campaign, np.random.Generator], Labels | None]


def swapped(labels: Labels, campaign: Campaign, rng: np.random.Generator) -> Labels | None:
    organs = campaign.store.organs
    table = np.arange(1 << 16).astype(np.uint16)
    for organ in organs:
        other = partner(organ.name)
        if other in organs.names:
            table[organ.value] = organs.by_name(other).value
    wrong = table[labels]
    # Both sides must be there, or it is one organ that changes its name.
    shown = set(np.unique(labels).tolist())
    pairs = [o.value for o in organs if partner(o.name) in organs.names]
    return wrong if sum(value in shown for value in pairs) >= 2 else None


def mirrored(labels: Labels, campaign: Campaign, rng: np.random.Generator) -> Labels:
    return np.flip(labels, int(rng.integers(3)))


def another_patient(labels: Labels, campaign: Campaign, rng: np.random.Generator) -> Labels:
    """Put another patient's label map in the middle of the volume."""
    atlas = campaign.store[str(rng.choice(campaign.store.ids()))]
    other = campaign.labels(atlas)
    there, here = [], []
    for n, m in zip(labels.shape, other.shape, strict=True):
        k = min(n, m)
        there.append(slice((n - k) // 2, (n - k) // 2 + k))
        here.append(slice((m - k) // 2, (m - k) // 2 + k))
    wrong = np.zeros_like(labels)
    wrong[tuple(there)] = other[tuple(here)]
    return wrong


def another_table(labels: Labels, campaign: Campaign, rng: np.random.Generator) -> Labels | None:
    """Give the organs each other's numbers."""
    values = np.array(campaign.store.organs.values)
    table = np.arange(1 << 16).astype(np.uint16)
    table[values] = rng.permutation(values)
    shown = np.unique(labels[labels > 0])
    return table[labels] if np.count_nonzero(table[shown] != shown) >= 2 else None


def shifted(mm: float) -> Inject:
    def inject(labels: Labels, campaign: Campaign, rng: np.random.Generator) -> Labels:
        by = int(rng.choice((-1, 1))) * round(mm / campaign.voxel_mm)
        return np.roll(labels, by, int(rng.integers(3)))

    return inject


def slices_missing(first: float, last: float) -> Inject:
    """Delete a range of the slices of one organ: from and to, as fractions of its height."""

    def inject(labels: Labels, campaign: Campaign, rng: np.random.Generator) -> Labels:
        value = rng.choice(np.unique(labels[labels > 0]))
        shown = np.flatnonzero((labels == value).any(axis=(1, 2)))
        if rng.random() < 0.5:
            shown = shown[::-1]
        gone = shown[round(first * len(shown)) : round(last * len(shown))]
        wrong = labels.copy()
        wrong[gone] = np.where(labels[gone] == value, 0, labels[gone])
        return wrong

    return inject


WHOLE = {"misfit", "shifted", "mirrored"}
FAULTS: dict[str, tuple[set[str], Inject]] = {
    "left and right swapped": ({"swapped"}, swapped),
    "map mirrored": ({"mirrored"}, mirrored),
    "another patient's labels": (WHOLE, another_patient),
    "another table's numbers": ({"relabelled", "swapped"}, another_table),
    "shifted by 30 mm": (WHOLE, shifted(30.0)),
    "shifted by 20 mm": (WHOLE, shifted(20.0)),
    "shifted by 10 mm": (WHOLE, shifted(10.0)),
    "middle third of an organ missing": ({"organ"}, slices_missing(1 / 3, 2 / 3)),
    "half of an organ missing": ({"organ"}, slices_missing(0.0, 0.5)),
}
"""The faults: kinds of findings that name them, and how labels are made wrong."""


def told(found: Mapping[str, tuple[int, int, int]]) -> str:
    return ", ".join(f"{fault} {number}/{total}" for fault, (number, _, total) in found.items())


if __name__ == "__main__":
    main()
