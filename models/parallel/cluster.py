"""The place of a process among others, as Slurm, Open MPI and TPU machines give it.

JAX reads the same inside `jax.distributed.initialize`, but gives it to no one, and the roll call
needs it before: so it is read here, from what those programs document.
"""

import glob
import importlib.util
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from ...configs.errors import UserError

# Ports that JAX takes, too: high ones by the number of a job, so that two jobs of a host differ.
_TPU_PORT = 8482
_JOB_PORTS = range(61440, 65536)
_METADATA_SECONDS = 10


class Place(NamedTuple):
    """HOST:PORT of the first process, how many there are, and which of them this is, from 0."""

    coordinator: str
    num_processes: int
    process_id: int


def find(environ: Mapping[str, str] | None = None) -> Place | None:
    """The place of this process in a cluster's job; None where it is in none.

    JAX_COORDINATOR_PORT in the environment chooses another port. On a TPU machine outside of
    Kubernetes, its metadata server is asked.

    Raises:
      UserError: there are other processes, and no way to find the first.
    """
    env = os.environ if environ is None else environ
    found = _open_mpi(env) or _slurm(env) or _tpu(env)
    if found is None:
        return None
    host, port, num_processes, process_id = found
    host = f"[{host}]" if ":" in host else host
    return Place(f"{host}:{env.get('JAX_COORDINATOR_PORT') or port}", num_processes, process_id)


def _open_mpi(env):
    try:
        size, rank = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
    except (KeyError, ValueError):
        return None
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", or tcp6://[ADDRESS,...]:PORT
    uri = re.match(
        r"(\d+).*?;(?:tcp://([^,:]+)|tcp6://\[([^],]+))", env.get("OMPI_MCA_orte_hnp_uri", "")
    )
    if uri:
        job = int(uri[1]) // 2**12  # its lower bits count inside of the job
        return uri[2] or uri[3], _port_of(job), size, rank
    if size == 1:
        return None
    raise UserError(
        "Open MPI 5 does not say on which host the first process is; give --coordinator=HOST:PORT "
        '--num_processes="$OMPI_COMM_WORLD_SIZE" --process_id="$OMPI_COMM_WORLD_RANK"'
    )


def _slurm(env):
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
    if not all(env.get(name) for name in names):
        return None
    nodes, job, size, rank = (env[name] for name in names)
    # The first of "node[001-015,020],other3": of each range its first number.
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
    return host, _port_of(int(job)), int(size), int(rank)


def _port_of(job: int) -> int:
    return _JOB_PORTS[job % len(_JOB_PORTS)]


def _tpu(env):
    if not _has_tpu(env):
        return None
    if hosts := env.get("TPU_WORKER_HOSTNAMES"):  # Kubernetes
        worker, slices = env.get("TPU_WORKER_ID") or 0, env
    # Set by the user, and by JAX where it finds no chip.
    elif "TPU_SKIP_MDS_QUERY" in env or (worker := _attribute(env, "agent-worker-number")) is None:
        return None
    else:
        hosts = _attribute(env, "worker-network-endpoints") or "localhost"
        # Lines such as MEGASCALE_NUM_SLICES: '2'.
        lines = re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", _attribute(env, "tpu-env") or "", re.M)
        slices = dict(lines) | dict(env)
    # Names of hosts, or "name:id:address"; those of a slice are in the order of their numbers.
    hosts = [(parts := host.split(":"))[2 if len(parts) == 3 else 0] for host in hosts.split(",")]
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    number = int(slices.get("MEGASCALE_SLICE_ID") or 0)
    count = int(slices.get("MEGASCALE_NUM_SLICES") or 1)
    return first, _TPU_PORT, count * len(hosts), number * len(hosts) + int(worker)


def _has_tpu(env) -> bool:
    """Whether JAX will run on a TPU: its library and its devices are there."""
    library = env.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")
    return bool(library and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")))


def _attribute(env, name: str) -> str | None:
    """What the metadata server of Google's cloud says; None where there is none of the name."""
    server = env.get("GCE_METADATA_IP") or "metadata.google.internal"
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    for attempt in range(6):
        try:
            with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            problem = e
        except OSError as e:
            problem = e
        time.sleep(0.5 * attempt)
    raise UserError(
        f"{server} does not say {name} of this TPU machine: {problem}; give --coordinator, "
        "--num_processes and --process_id, or --num_processes=1"
    )
