"""The index finds what a plain search finds, however it grew and whoever asks."""

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import AtlasNotFoundError, AtlasStore, AtlasStoreError, Snapshot
from atlas_store.index import graph, search, segments
from atlas_store.index.graph import Graph
from atlas_store.index.nearest import Candidates, Query
from atlas_store.index.search import LISTED_ATLASES, REPRESENTED_BY, AtlasIndex, Neighbours
from atlas_store.index.segments import Segment, merges
from atlas_store.storage.cache import cache_folder, index_folder, recall


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_keypoints(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Keypoints with few different descriptors, so that there are ties."""
    kinds = rng.permuted(np.tile(np.arange(64, dtype=np.uint8), (6, 1)), axis=1)
    descriptor = kinds[rng.integers(0, 6, n)]
    swapped = np.flatnonzero(rng.random(n) < 0.5)
    descriptor[np.ix_(swapped, [3, 9])] = descriptor[np.ix_(swapped, [9, 3])]
    return {
        "position": rng.normal(size=(n, 3)).astype(np.float32),
        "scale": rng.choice(np.float32([1.5, 3, 4.2, 6, 12, 12.1]), n),
        "sign": rng.choice(np.int8([-1, 1]), n),
        "descriptor": descriptor,
        "label": rng.choice(np.uint16([0, 1, 7]), n),
    }


def segment_of(atlases: dict[tuple[str, str], dict[str, Any]]) -> Segment:
    return Segment.join([search.represent(name, [True], atlas) for name, atlas in atlases.items()])


def asked(keypoints: dict[str, Any]) -> tuple[Any, ...]:
    return keypoints["descriptor"], keypoints["scale"], keypoints["sign"]


def naive(
    test: dict[str, Any], atlases: list[dict[str, Any]], i: int, k: int = LISTED_ATLASES
) -> list[tuple[float, int, int, float]]:
    """First distance, atlas, keypoint and second distance, nearest first, for keypoint i."""
    found = []
    for a, atlas in enumerate(atlases):
        fitting = sorted(
            (int(((test["descriptor"][i].astype(int) - d.astype(int)) ** 2).sum()), j)
            for j, d in enumerate(atlas["descriptor"])
            if atlas["sign"][j] == test["sign"][i]
            and test["scale"][i] / 2 <= atlas["scale"][j] <= test["scale"][i] * 2
        )
        if fitting:
            second = fitting[1][0] if len(fitting) > 1 else np.inf
            found.append((fitting[0][0], a, fitting[0][1], second))
    return sorted(found)[:k]


def rows(found: Neighbours, i: int) -> list[tuple[float, int, int, float]]:
    here = found.atlas[i] >= 0
    columns = found.first[i], found.atlas[i], found.keypoint[i], found.second[i]
    return [tuple(x.item() for x in row) for row in zip(*(c[here] for c in columns), strict=True)]


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_query_finds_what_the_definition_says(seed: int, n: int, a: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    test = random_keypoints(rng, n)
    atlases = [random_keypoints(rng, int(rng.integers(0, 9))) for _ in range(a)]
    names = [(f"a{i}", f"{i:032x}") for i in range(a)]
    cut = np.sort(rng.integers(0, a + 1, parts - 1)).tolist()
    runs = [range(x, y) for x, y in zip([0, *cut], [*cut, a], strict=True) if x < y]
    made = [segment_of({names[i]: atlases[i] for i in run}) for run in runs]
    opened = AtlasIndex(made, dict(names), "exact", Path("nowhere"))
    chosen = rng.permutation(a)[: int(rng.integers(1, a + 1))].tolist()
    found = opened.query(*asked(test), [names[i][0] for i in chosen])
    wanted = [atlases[i] for i in chosen]
    for i in range(n):
        assert rows(found, i) == naive(test, wanted, i)
        for k in np.flatnonzero(found.atlas[i] >= 0):
            atlas = wanted[found.atlas[i, k]]
            assert (found.position[i, k] == atlas["position"][found.keypoint[i, k]]).all()
            assert found.label[i, k] == atlas["label"][found.keypoint[i, k]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_listed_atlases_are_searched_exactly(seed: int, a: int) -> None:
    """Whatever of an atlas is listed, its nearest and second nearest are the true ones."""
    rng = np.random.default_rng(seed)
    test = random_keypoints(rng, 8)
    atlases = {(f"a{i}", f"{i:032x}"): random_keypoints(rng, 20) for i in range(a)}
    made = segment_of(atlases)
    chosen = [f"a{i}" for i in range(a) if rng.random() < 0.7]
    exact = AtlasIndex([made], dict(atlases.keys()), "exact", Path("nowhere"))
    expected = exact.query(*asked(test), chosen)

    def listed(_: Graph, query: Query, candidates: Candidates, wanted: np.ndarray) -> np.ndarray:
        columns = np.arange(-1, len(wanted), dtype=np.int32)
        return rng.permuted(np.tile(columns, (len(query.low), 1)), axis=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "nearest_in_graph", listed)
        patch.setattr(Segment, "graph", lambda *_: Graph(*[np.zeros(0)] * 4))
        graph = AtlasIndex([made], dict(atlases.keys()), "pynndescent", Path("nowhere"))
        assert same(graph.query(*asked(test), chosen), expected)
        # A list that ends early: atlases may be missing, but none is told wrongly.
        patch.setattr(segments, "nearest_in_graph", lambda *args: listed(*args)[:, :4])
        found = graph.query(*asked(test), chosen)
    for i in range(8):
        true = {
            row[1]: row
            for row in naive(test, [atlases[n, f"{int(n[1:]):032x}"] for n in chosen], i, a)
        }
        assert all(true[row[1]] == row for row in rows(found, i))


def test_an_atlas_is_represented_by_its_organ_keypoints_and_its_largest_others() -> None:
    rng = np.random.default_rng(0)
    many, few = random_keypoints(rng, 900), random_keypoints(rng, 900)
    few["label"][20:] = 0
    for arrays in (many, few):
        segment = search.represent(("a", "b"), [True, False], arrays)
        assert segment.annotated.tolist() == [[True, False]]
        rows = np.concatenate([side.keypoint for side in segment.by_sign])
        organ = np.flatnonzero(arrays["label"])
        assert set(organ) <= set(rows)
        assert len(set(rows)) == len(rows) == max(len(organ), REPRESENTED_BY)
        others = np.setdiff1d(np.flatnonzero(arrays["label"] == 0), rows)
        taken = np.setdiff1d(rows, organ)
        if taken.size:
            assert arrays["scale"][taken].min() >= arrays["scale"][others].max()
        for sign, side in zip((-1, 1), segment.by_sign, strict=True):
            assert (arrays["sign"][side.keypoint] == sign).all()
            for name in ("label", "position", "scale", "descriptor"):
                np.testing.assert_array_equal(getattr(side, name), arrays[name][side.keypoint])


@given(st.lists(st.integers(0, 10**6), max_size=60))
@settings(max_examples=60, deadline=None)
def test_segments_are_joined_until_they_are_few(sizes: list[int]) -> None:
    plan = merges(sizes)
    moved = [i for group in plan for i in group]
    assert len(set(moved)) == len(moved)
    assert all(len(group) > 1 for group in plan)
    after = [size for i, size in enumerate(sizes) if i not in moved]
    after += [sum(sizes[i] for i in group) for group in plan]
    assert merges(after) == []
    assert len(after) <= 3 * (2 + np.log(sum(sizes) + 1) / np.log(4))


def test_growing_one_by_one_moves_a_descriptor_a_few_times() -> None:
    sizes: list[int] = []
    moved = 0
    for _ in range(3000):
        sizes.append(110)
        plan = merges(sizes)
        moved += sum(sizes[i] for group in plan for i in group)
        joined = {i for group in plan for i in group}
        sizes = [s for i, s in enumerate(sizes) if i not in joined] + [
            sum(sizes[i] for i in group) for group in plan
        ]
    assert moved <= 20 * 110 * 3000


def query_all(store: AtlasStore, ids: list[str], seed: int = 9) -> Neighbours:
    opened = AtlasIndex.open(store)
    return opened.query(*asked(random_keypoints(np.random.default_rng(seed), 20)), ids)


def same(one: Neighbours, other: Neighbours) -> bool:
    return all(np.array_equal(v, getattr(other, k)) for k, v in vars(one).items())


def test_the_index_follows_the_store_and_reads_only_what_is_new(
    store: AtlasStore, synthetic: SimpleNamespace, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        synthetic.add(store, f"a{i}", seed=i)
    assert cache_folder() == own_cache / "kpt-dask"
    before = query_all(store, store.ids())
    read: list[str] = []
    original = search.read_atlas
    monkeypatch.setattr(search, "read_atlas", lambda s, i: (read.append(i), original(s, i))[1])
    assert same(query_all(store, store.ids()), before)
    assert read == []
    synthetic.add(store, "a1", seed=11, replace=True)
    store.remove("a2")
    synthetic.add(store, "a3", seed=3)
    grown = query_all(store, store.ids())
    assert sorted(read) == ["a1", "a3"]
    with pytest.raises(AtlasNotFoundError, match="the index has no atlas 'a2'"):
        query_all(store, ["a2"])
    for path in index_folder(store.uuid).iterdir():
        path.unlink()
    assert same(query_all(store, store.ids()), grown)
    assert not same(grown, before)


def test_an_atlas_removed_before_the_index_reads_it_is_told(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    for i in range(3):
        synthetic.add(store, f"a{i}", seed=i)
    snapshot = Snapshot(store)
    store.remove("a1")
    with pytest.raises(AtlasNotFoundError, match="the index has no atlas 'a1'"):
        query_all(snapshot, snapshot.ids())
    assert same(query_all(snapshot, ["a0", "a2"]), query_all(store, store.ids()))


def test_a_segment_is_loaded_once_by_a_process(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.add(store, "a0")
    expected = query_all(store, ["a0"])
    AtlasIndex.open(store)
    with monkeypatch.context() as patch:
        patch.setattr(search, "recall", None)
        assert same(query_all(store, ["a0"]), expected)
    [path] = index_folder(store.uuid).iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert same(query_all(store, ["a0"]), expected)
    [after] = index_folder(store.uuid).iterdir()
    assert recall(after) is not None


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_or_outdated_cache_is_made_anew(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    damage: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synthetic.add(store, "a0")
    expected = query_all(store, ["a0"])
    [path] = index_folder(store.uuid).iterdir()
    if damage is None:
        with monkeypatch.context() as patch:
            patch.setattr(segments, "ENCODING", segments.ENCODING | {"encoding-version": "0"})
            path.unlink()
            query_all(store, ["a0"])
    else:
        path.write_bytes(damage)
        [problem] = store.verify()
        assert problem.what == f"{path}, a part of the index in your cache, is damaged"
    assert same(query_all(store, ["a0"]), expected)
    [after] = index_folder(store.uuid).iterdir()
    assert after.name.partition("-")[0] == path.name.partition("-")[0]
    assert recall(after) is not None
    assert store.verify() == []
    after.write_bytes(b"")
    assert [problem.repaired for problem in store.verify(repair=True)] == [True]
    assert store.verify() == []


def test_a_cache_that_cannot_be_written_is_done_without(
    store: AtlasStore, synthetic: SimpleNamespace, own_cache: Path
) -> None:
    synthetic.add(store, "a0")
    expected = query_all(store, ["a0"])
    for path in index_folder(store.uuid).iterdir():
        path.unlink()
    index_folder(store.uuid).rmdir()
    index_folder(store.uuid).write_text("in the way")
    assert same(query_all(store, ["a0"]), expected)


def naive_neighbours(
    k: int, *, linked: bool
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Lead from each row to its k nearest and, if linked, to one other, so that all are reached."""

    def neighbours(descriptor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(descriptor)
        one = descriptor.astype(np.float32)
        squared = (one**2).sum(axis=1)[:, None] + (one**2).sum(axis=1) - 2 * one @ one.T
        near = np.argsort(squared, axis=1, kind="stable")[:, : k + 1]
        if linked:
            near = np.concatenate([near, (np.arange(n)[:, None] + 1) % n], axis=1)
        return np.repeat(np.arange(n), near.shape[1]), near.ravel()

    return neighbours


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_graph_search_lists_the_nearest_that_constraints_allow(seed: int, m: int, n: int) -> None:
    """In a graph that leads everywhere, with a slack that lets nothing be missed."""
    rng = np.random.default_rng(seed)
    known, test = random_keypoints(rng, m), random_keypoints(rng, n)
    candidates = Candidates(known["descriptor"], known["scale"], np.array([0, m]))
    query = Query(test["descriptor"], test["scale"] / 2, test["scale"] * 2)
    wanted = rng.random(m) < 0.7
    fewest = int(rng.choice([40, graph.FEWEST]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "FEWEST", fewest)
        made = graph.layered_graph(known["descriptor"], naive_neighbours(3, linked=True))
    assert (made.layers.size == 1) == (m < fewest)
    listed = graph.nearest_in_graph(made, query, candidates, wanted)
    in_threads = segments.nearest_in_threads(made, query, candidates, wanted)
    assert in_threads.tolist() == listed.tolist()
    for i in range(n):
        apart = known["descriptor"].astype(int) - test["descriptor"][i].astype(int)
        squared = (apart**2).sum(axis=1)
        ratio = known["scale"] / test["scale"][i]
        fitting = wanted & (ratio >= 0.5) & (ratio <= 2)
        expected = np.sort(squared[fitting])[: graph.LISTED]
        rows = listed[i][listed[i] >= 0]
        assert fitting[rows].all()
        assert len(set(rows.tolist())) == len(rows) == min(len(expected), graph.LISTED)
        if m < fewest:  # all are compared
            assert np.sort(squared[rows]).tolist() == expected.tolist()


def test_layers_lead_from_one_cluster_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of more keypoints than have each other as neighbours: many atlases of few bodies."""
    rng = np.random.default_rng(0)
    clusters, each = 80, 56
    middles = rng.permuted(np.tile(np.arange(64), (clusters, 1)), axis=1)

    def jittered(n: int) -> np.ndarray:
        values = np.repeat(middles, n, axis=0) + rng.normal(0, 4, (n * clusters, 64))
        return values.argsort(axis=1).argsort(axis=1).astype(np.uint8)

    known, test = jittered(each), jittered(1)
    m, same_scale = len(known), np.ones(len(known), np.float32)
    candidates = Candidates(known, same_scale, np.array([0, m]))
    query = Query(test, same_scale[:clusters], same_scale[:clusters])
    made = graph.layered_graph(known, naive_neighbours(8, linked=False))

    def found(searched: Graph) -> float:
        """Fraction of each cluster that is listed for its keypoint."""
        listed = graph.nearest_in_graph(searched, query, candidates, np.ones(m, np.bool_))
        return float((listed // each == np.arange(clusters)[:, None]).sum() / m)

    monkeypatch.setattr(graph, "THINNING", m // 8)
    assert found(graph.layered_graph(known, naive_neighbours(8, linked=False))) < 0.5
    assert found(made) > 0.9


def test_graphs_that_a_query_needs_are_counted_and_built(
    patients: AtlasStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = segment_of(atlases := real_atlases(patients))
    names = dict(atlases.keys())
    few = list(names)[: len(names) // 3]

    def built(wanted: Mapping[str, np.ndarray], _: Path) -> Iterator[tuple[str, Graph]]:
        for stem, descriptor in wanted.items():
            yield stem, graph.layered_graph(descriptor, naive_neighbours(3, linked=True))

    monkeypatch.setattr(segments, "build_graphs", built)
    monkeypatch.setattr(segments, "_graphs", {})
    sizes = [len(side.scale) for side in segment.by_sign]
    monkeypatch.setattr(segments, "PAYS_FROM", max(sizes))
    needed = {"exact": [], "auto": [max(sizes)], "pynndescent": [min(sizes)]}
    for mode, expected in needed.items():
        opened = AtlasIndex([segment], names, mode, tmp_path)
        assert opened.n_needed(few) == 0  # most that a graph lists would be others
        assert opened.n_needed(list(names)) == len(expected)
        assert list(opened.build_needed(list(names))) == expected
        assert opened.n_needed(list(names)) == 0


def real_atlases(store: AtlasStore) -> dict[tuple[str, str], dict[str, Any]]:
    """Real CT keypoints in many small atlases of sixteen neighbours each."""
    atlases = {}
    for name in store.ids()[1:]:
        arrays = store[name].keypoint_arrays()
        order = np.lexsort(arrays["position"].T)
        for k in range(0, order.size, 16):
            part = {key: values[order[k : k + 16]] for key, values in arrays.items()}
            atlases[f"{name}_{k}", f"{len(atlases):032x}"] = part
    return atlases


def accepted(of: Mapping[str, np.ndarray]) -> set[tuple[int, ...]]:
    """Keypoint, atlas and keypoint of the atlas, of those that pass the ratio test."""
    i, k = np.nonzero((of["atlas"] >= 0) & (of["first"] <= np.float32(0.81) * of["second"]))
    found = i, of["atlas"][i, k], of["keypoint"][i, k]
    return set(zip(*(column.tolist() for column in found), strict=True))


def test_a_graph_of_pynndescent_agrees_with_exact_search_on_real_ct(
    patients: AtlasStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlases = real_atlases(patients)
    segment, names = segment_of(atlases), dict(atlases.keys())
    arrays = patients[patients.ids()[0]].keypoint_arrays()
    scan = {name: arrays[name][::4] for name in ("descriptor", "scale", "sign")}
    # Nearly all of the time goes into compiling; what hardly runs need not be optimized, and
    # must not be mistaken later for what was.
    for name, value in {"NUMBA_OPT": "0", "NUMBA_CACHE_DIR": str(tmp_path / "numba")}.items():
        monkeypatch.setenv(name, value)

    def ask(mode: str) -> Neighbours:
        return AtlasIndex([segment], names, mode, tmp_path).query(*asked(scan), list(names))

    exact, found = ask("exact"), ask("pynndescent")
    assert len(list(tmp_path.glob("*.graph"))) == 2
    expected, accepted_too = accepted(vars(exact)), accepted(vars(found))
    assert len(expected & accepted_too) >= 0.99 * max(len(expected), len(accepted_too)) > 0
    with monkeypatch.context() as patch:
        patch.setattr(segments, "_graphs", {})
        patch.setattr(segments, "build_graphs", None)
        with ThreadPoolExecutor(3) as threads:
            # `auto` takes the graph that is there, whatever its size.
            for other in threads.map(ask, ["pynndescent", "auto", "auto"]):
                assert same(other, found)
    assert "pynndescent" not in sys.modules


def test_a_graph_that_cannot_be_built_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "PROGRAM", "raise MemoryError('no room')")
    few = np.zeros((7, 64), np.uint8)
    with pytest.raises(AtlasStoreError, match=r"of 7 keypoints \(MemoryError: no room\).* exact"):
        list(graph.build_graphs({"few": few}, tmp_path))
    assert list(tmp_path.iterdir()) == []
