"""What a process learns of its place from Slurm, Open MPI and TPU machines."""

import http.server
import threading

import pytest

from puna.configs.errors import UserError
from puna.models.parallel import cluster

SLURM = {
    "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.fixture
def tpu(monkeypatch):
    """A machine with a TPU: its library and its devices."""
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/vfio/0"])
    return {"TPU_LIBRARY_PATH": "libtpu.so"}


@pytest.fixture
def metadata():
    """A metadata server: what it says by name, and its address."""
    said, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.headers["Metadata-Flavor"])
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            self.send_response(200 if name in said else 404)
            self.end_headers()
            self.wfile.write(said.get(name, "").encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield said, {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        server.shutdown()
    assert set(asked) <= {"Google"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[007,009-015]", "node007"),
        ("rack2-node[3]-ib,host2", "rack2-node3-ib"),
        ("rack[1-2]node[05-06]", "rack1node05"),
    ],
)
def test_slurm(nodes, first):
    found = cluster.find(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == (f"{first}:{12345 % 4096 + 61440}", 16, 3)


def test_a_port_of_ones_own():
    env = SLURM | {"SLURM_STEP_NODELIST": "a", "JAX_COORDINATOR_PORT": "1234"}
    assert cluster.find(env) == ("a:1234", 16, 3)


def test_slurm_without_a_step_is_one_process():
    # The batch script itself, and a shell of salloc.
    assert cluster.find(SLURM) is None
    assert cluster.find({}) is None


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370",
         "[fe80::b9b:ac5d:9cf0:b858]"),
    ],
)  # fmt: skip
def test_open_mpi(uri, host):
    found = cluster.find(MPI | {"OMPI_MCA_orte_hnp_uri": uri})
    assert found == (f"{host}:{1531576320 // 4096 % 4096 + 61440}", 4, 2)


def test_open_mpi_5_does_not_run_apart_in_silence():
    with pytest.raises(UserError, match=r"give --coordinator=HOST:PORT .*OMPI_COMM_WORLD_SIZE"):
        cluster.find(MPI)
    assert cluster.find(MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_kubernetes_on_a_tpu(tpu):
    tpu |= {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1"}
    assert cluster.find(tpu) == ("job-0.svc:8482", 2, 1)
    tpu |= {
        "MEGASCALE_COORDINATOR_ADDRESS": "slice0.svc:8081", "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }  # fmt: skip
    assert cluster.find(tpu) == ("slice0.svc:8482", 6, 5)


def test_the_names_of_tpu_workers_need_a_tpu(monkeypatch):
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [])
    assert cluster.find({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_LIBRARY_PATH": "libtpu.so"}) is None


def test_a_tpu_machine_asks_its_metadata(tpu, metadata):
    said, server = metadata
    tpu |= server
    assert cluster.find(tpu) is None
    said |= {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}
    assert cluster.find(tpu) == ("10.0.0.1:8482", 2, 1)
    said["worker-network-endpoints"] = "host0,host1"
    said["tpu-env"] = "ZONE: 'us'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert cluster.find(tpu) == ("host0:8482", 4, 3)
    assert cluster.find(tpu | {"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_metadata_that_does_not_answer_is_one_line(tpu, monkeypatch):
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="127.0.0.1:9 does not say agent-worker-number"):
        cluster.find(tpu | {"GCE_METADATA_IP": "127.0.0.1:9"})
