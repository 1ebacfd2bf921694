"""Shared fixtures: where the real data is, and who computes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.runtime import cluster
from kpt_dask.scans.pairs import find_pairs
from tests.helpers import BODY, BODY_SPACING

DATA = Path(os.environ.get("KPT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def openkbp() -> Path:
    folder = DATA / "openkbp"
    if not folder.is_dir():
        pytest.skip(f"real CT is missing: {folder} does not exist (set KPT_DATA)")
    return folder


@pytest.fixture(scope="session")
def one_process() -> Iterator[Client]:
    """A client whose workers are this process's threads."""
    with cluster.session() as client:
        yield client


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Client]:
    """A client of two processes with one thread each; leave them alive."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as two,
        Client(two, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four phantoms at 4 mm, body_1_ct.nii.gz with body_1_seg.nii.gz and so on."""
    folder = tmp_path_factory.mktemp("bodies")
    for seed in range(1, 5):
        scan, labels = (folder / f"body_{seed}_{what}.nii.gz" for what in ("ct", "seg"))
        write_phantom(scan, labels, seed, BODY, BODY_SPACING)
    return folder


@pytest.fixture(scope="session")
def body_store(
    bodies: Path, tmp_path_factory: pytest.TempPathFactory, one_process: Client
) -> AtlasStore:
    """A store of the phantoms body_1, body_2 and body_3; leave it as it is."""
    url = tmp_path_factory.mktemp("stores") / "bodies"
    store = AtlasStore.create(url, load_organs("visceral"), store_parameters(BODY_SPACING))
    for name in ("body_1", "body_2", "body_3"):
        scan, labels = (bodies / f"{name}_{what}.nii.gz" for what in ("ct", "seg"))
        add_atlas(store, scan, labels, atlas_id=name, client=one_process)
    return store


@pytest.fixture(scope="session")
def patients(
    openkbp: Path, tmp_path_factory: pytest.TempPathFactory, one_process: Client
) -> AtlasStore:
    """A store of six real patients at 2 mm; leave it as it is."""
    url = tmp_path_factory.mktemp("stores") / "patients"
    store = AtlasStore.create(url, load_organs("openkbp"), store_parameters())
    for pair in find_pairs(openkbp)[:6]:
        add_atlas(store, pair.scan, pair.labels, atlas_id=pair.id, client=one_process)
    return store


_S3_SERVER = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
input()
"""


def _await_server(url: str) -> None:
    """Wait until a server accepts connections: it says its address before."""
    host, port = url.removeprefix("http://").split(":")
    for _ in range(600):
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(url)


@contextmanager
def _s3_server(**environment: str) -> Iterator[str]:
    """Start a server that speaks the protocol of S3; give its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", _S3_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            url = next(line.strip() for line in server.stdout if line.startswith("http"))
            _await_server(url)
            yield url
        finally:
            server.kill()


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URL of an empty bucket."""
    import s3fs

    with _s3_server() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("atlases")
        yield "s3://atlases"


@pytest.fixture
def forbidding_server() -> Iterator[str]:
    """URL of an S3 server that knows no user, so that all are refused."""
    with _s3_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as url:
        yield url
