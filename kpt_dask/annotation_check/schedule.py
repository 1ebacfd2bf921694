"""The check of a store, atlas by atlas."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from distributed import Client

from atlas_store import Atlas, AtlasNotFoundError, AtlasStore, OrganTable, Snapshot
from atlas_store.arrays.regions import open_array
from kpt_dask.annotation_check.comparison import Comparison, Layout, compare
from kpt_dask.annotation_check.findings import CheckResult, Finding
from kpt_dask.annotation_check.page import Entry, write_page
from kpt_dask.annotation_check.pictures import Picture
from kpt_dask.annotation_check.prediction import Predictor
from kpt_dask.annotation_check.rules import Rules, unchecked
from kpt_dask.annotation_check.spread import LEAST
from kpt_dask.atlases.same_scan import KnownScans
from kpt_dask.matching.selection import check_selection
from kpt_dask.output.commit import replacing
from kpt_dask.output.places import check_outputs
from kpt_dask.runtime import cluster, progress
from kpt_dask.volumes.identity import digest_of

SELECT = 10
"""Atlases that each is predicted from: more take longer, and tell no more."""

REFERENCES = 20
"""Atlases that are predicted to know what is usual where only a few are checked."""


def check_atlases(
    store: AtlasStore | str | Path,
    atlas_ids: Sequence[str] = (),
    *,
    select: int = SELECT,
    page: str | Path | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    client: Client | None = None,
) -> CheckResult:
    """Check the annotations of atlases against what the other atlases say.

    Each atlas is predicted from the others, and its labels are compared with the prediction. An
    organ or atlas that is far outside the spread of the store, or fits the prediction of another
    organ better, an implausible volume, intensity or position, and a patient who is there twice are
    named. A finding is a doubt: a person must look. Nothing is written to the store.

    Parameters
    ----------
    store : AtlasStore, str or Path
        The atlases.
    atlas_ids : sequence of str
        Those to check; all unless given. To know what is usual, up to `REFERENCES` of the others
        are predicted too, evenly spaced over the store.
    select : int
        Atlases that each is predicted from: those that agree best.
    page : str or Path, optional
        File for an HTML page of the findings, with a picture of each.
    overwrite : bool
        Whether an earlier page may be replaced.
    memory, client
        As for `kpt_dask.segment`.

    Returns
    -------
    CheckResult

    Raises
    ------
    AtlasNotFoundError
        If there is no atlas of an id.
    KptError, AtlasStoreError
        If an option, the store or an atlas cannot be used.

    Examples
    --------
    >>> import kpt_dask
    >>> result = kpt_dask.check_atlases("atlases")
    >>> result.checked, result.findings
    (('body_1', 'body_2', 'body_3'), ())
    >>> len(result.unchecked)
    1
    """
    check_selection(select, "auto")
    store = Snapshot(AtlasStore.of(store))
    atlases = {atlas.id: atlas for atlas in store.atlases()}
    if missing := [name for name in atlas_ids if name not in atlases]:
        raise AtlasNotFoundError(
            f"{store.url} has no atlas {', '.join(missing)}: use an id that it lists."
        )
    checked = tuple(dict.fromkeys(atlas_ids or atlases))
    with ExitStack() as stack:
        partial = None
        if page is not None:
            check_outputs(files=[page], inputs=[store.url], overwrite=overwrite)
            partial = stack.enter_context(replacing(page, overwrite=overwrite))
        session = stack.enter_context(cluster.session(client))
        check = _Check(atlases, Predictor(store, select, memory, session))
        result = check.result(checked, store.organs)
        if partial is not None:
            write_page(partial, check.entries(result), result, store.url)
    return result


@dataclass(frozen=True, eq=False)
class _Check:
    """A check of a store; `misleading` becomes the atlases that are doubted as a whole."""

    atlases: Mapping[str, Atlas]
    predictor: Predictor
    misleading: set[str] = field(default_factory=set)

    @cached_property
    def known(self) -> KnownScans:
        """The scans of the store."""
        return KnownScans(self.atlases.values())

    def result(self, checked: Sequence[str], organs: OrganTable) -> CheckResult:
        """Predict, compare, and judge."""
        names = population(checked, list(self.atlases))
        spacing = float(self.predictor.store.parameters["spacing"])
        layouts = {name: layout_of(atlas) for name, atlas in self.atlases.items()}
        seen: dict[str, _Seen] = {}
        with progress.stage("Checking atlases", total=len(names)) as advance:
            for name in names:
                seen[name] = self._see(name, ())
                advance(1)
        compared = {name: one.comparison for name, one in seen.items() if one.comparison}
        rules = Rules(organs, spacing, layouts, compared)
        found = {name: rules.findings(name) for name in compared}
        # Wrong label maps mislead: what was predicted from them is doubted only without them.
        misleading = {name for name, some in found.items() if any(one.whole for one in some)}
        again = [
            name for name in checked if found.get(name) and misleading.intersection(seen[name].used)
        ]
        with progress.stage("Checking findings again", total=len(again)) as advance:
            for name in again:
                without = self._see(name, misleading)
                if without.comparison is not None:
                    seen[name] = without
                advance(1)
        compared = {name: one.comparison for name, one in seen.items() if one.comparison}
        rules = Rules(organs, spacing, layouts, compared)
        findings = [
            finding
            for name in checked
            for finding in (
                *_doubles(name, seen[name]),
                *(rules.findings(name) if name in compared else ()),
            )
        ]
        self.misleading.update(misleading)
        return CheckResult(tuple(checked), tuple(findings), tuple(self._unchecked(rules, checked)))

    def _see(self, name: str, leave_out: Collection[str]) -> "_Seen":
        """Predict an atlas, and compare."""
        atlas = self.atlases[name]
        same = self._same(atlas)
        with self.predictor.predicted(atlas, {*same, *leave_out}) as predicted:
            if predicted is None:
                return _Seen(same, {}, (), None)
            comparison = compare(
                atlas.labels,
                predicted.found.labels,
                open_array(atlas.image, "0"),
                predicted.volume.grid,
                atlas.organ_table,
            )
        atlas.ensure_present()
        return _Seen(same, predicted.twins, predicted.found.atlases, comparison)

    def entries(self, result: CheckResult) -> list[Entry]:
        """Draw the findings, beside what the atlases predict that are not doubted as a whole."""
        entries = []
        with progress.stage("Drawing findings", total=len(result.findings)) as advance:
            for name in result.checked:
                findings = [finding for finding in result.findings if finding.atlas == name]
                if not findings:
                    continue
                atlas = self.atlases[name]
                leave_out = {*self._same(atlas), *self.misleading}
                with self.predictor.predicted(atlas, leave_out) as predicted:
                    labels = predicted.found.labels if predicted is not None else None
                    scan = open_array(atlas.image, "0")
                    picture = Picture(scan, atlas.labels, labels, atlas.organ_table)
                    for finding in findings:
                        png = picture.png(finding.organs, atlas.organs)
                        entries.append(Entry(finding, png))
                        advance(1)
        return entries

    def _same(self, atlas: Atlas) -> tuple[str, ...]:
        """Ids of the other atlases of the same scan."""
        same = self.known.of(digest_of(atlas.image), atlas.info.shape)
        return tuple(name for name in same if name != atlas.id)

    def _unchecked(self, rules: Rules, checked: Sequence[str]) -> list[str]:
        url = self.predictor.store.url
        alone = [name for name in checked if name not in rules.comparisons]
        said = []
        if alone:
            said.append(
                f"{url} has no atlas of another scan to predict {', '.join(alone)} from: only"
                " duplicates were looked for"
            )
        if rules.comparisons and len(rules.comparisons) < LEAST:
            said.append(
                f"{url} has {len(self.atlases)} atlases, and it takes {LEAST} to know what is"
                " usual: only duplicates, and organs taken for others, were looked for"
            )
        elif rules.comparisons:
            said += unchecked(rules.organs, rules.comparisons)
        return [f"{sentence}." for sentence in said]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What was seen of an atlas.

    Attributes
    ----------
    same : collection of str
        Other atlases of the same scan.
    twins : mapping of str to float
        Those of the same patient, with the share of common keypoints.
    used : collection of str
        Those that it was predicted from.
    comparison : Comparison or None
        None if there were none.
    """

    same: Collection[str]
    twins: Mapping[str, float]
    used: Collection[str]
    comparison: Comparison | None


def population(checked: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Choose the atlases to predict: those to check, and others to know what is usual."""
    others = [name for name in ids if name not in set(checked)]
    wanted = min(max(REFERENCES + 1 - len(checked), 0), len(others))
    at = np.linspace(0, len(others) - 1, wanted).round().astype(int)
    return [*checked, *(others[i] for i in at.tolist())]


def layout_of(atlas: Atlas) -> Layout:
    """Sizes and positions of an atlas's organs, as its marker says."""
    info = atlas.info
    voxel = float(np.prod(info.spacing)) / 1000
    organs = [info.organs.get(name) for name in atlas.organ_table.names]
    nowhere = (np.nan, np.nan, np.nan)
    return Layout(
        np.array([voxel * one.voxels if one is not None else 0.0 for one in organs]),
        np.array([one.centroid if one is not None else nowhere for one in organs]),
    )


def _doubles(name: str, seen: _Seen) -> list[Finding]:
    """Name the atlases that show the same scan or patient."""
    return [
        *([_same_scan(name, sorted(seen.same))] if seen.same else ()),
        *([_same_patient(name, seen.twins)] if seen.twins else ()),
    ]


def _same_scan(name: str, same: Sequence[str]) -> Finding:
    return Finding(
        name,
        "duplicate",
        (),
        f"its scan is that of {', '.join(same)} too, so its labels vote twice",
        "remove all but one with kpt atlas remove",
    )


def _same_patient(name: str, twins: Mapping[str, float]) -> Finding:
    most = max(twins.values())
    return Finding(
        name,
        "same_patient",
        (),
        f"it shows the same patient as {', '.join(twins)}, with which it has"
        f" {100 * most:.0f} % of its keypoints in common",
        "remove all but one with kpt atlas remove, unless they are scans of different days",
    )
