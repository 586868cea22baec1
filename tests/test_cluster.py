"""How processes find each other on every platform, from the variables that its launcher sets; two real ones join."""

import fnmatch
import http.server
import os
import signal
import subprocess
import sys
import threading

import jax
import pytest
from commands import POINTS, ROOT, ends, free_port, start_group

from ddgan_jax.devices import cluster, processes
from ddgan_jax.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPIRUN = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPEN_MPI_5 = {name: value for name, value in MPIRUN.items() if name != "OMPI_MCA_orte_hnp_uri"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "n1:1234"}
BY_HAND = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
INDEXED_JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def joined(index, count, gpus=None, address="n1:1234"):
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "local_device_ids": gpus,
    }


@pytest.mark.parametrize(
    "env, on_tpu, gpus, expected",
    [
        ({}, False, 8, None),  # a machine by itself, with all its GPUs
        (BY_HAND, False, 0, joined(2, 4)),
        (BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "1"}, False, 2, joined(2, 4)),
        ({}, True, 0, {}),  # a Cloud TPU VM: JAX asks its metadata server
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, 0, {}),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, 0, {}),  # slices of one host
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, 0, None),  # Colab
        ({"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_WORKER_HOSTNAMES": "a,b"}, True, 0, None),  # one host of a pod by itself
        ({"TPU_HOST_BOUNDS": "1,1,1"}, True, 0, None),
        (SRUN, False, 0, {"local_device_ids": None}),
        (SRUN, False, 8, {"local_device_ids": [4, 5, 6, 7]}),  # both tasks of a node see its 8 GPUs
        (SRUN | {"SLURM_GPUS_ON_NODE": "8"}, False, 4, {"local_device_ids": [0, 1, 2, 3]}),  # each sees its own 4
        (SRUN | {"SLURM_GPUS_PER_TASK": "2"}, False, 2, {"local_device_ids": [0, 1]}),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, False, 8, {"local_device_ids": list(range(8))}),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, False, 8, None),  # srun --pty in an allocation of more
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False, 0, None),  # not started by srun
        (SRUN | ADDRESS, False, 8, joined(3, 4, [4, 5, 6, 7])),
        (MPIRUN, False, 2, {"local_device_ids": [1]}),
        (OPEN_MPI_5 | ADDRESS, False, 2, joined(1, 2, [1])),
        (INDEXED_JOB | ADDRESS | {"JAX_NUM_PROCESSES": "2"}, False, 1, joined(1, 2, [0])),
        (INDEXED_JOB | {"JAX_NUM_PROCESSES": "1"}, False, 1, None),
    ],
)
def test_what_jax_is_told(env, on_tpu, gpus, expected):
    assert cluster.arguments(env, on_tpu, gpus) == expected


@pytest.mark.parametrize(
    "env, gpus, message",
    [
        (ADDRESS, 0, "but JAX_NUM_PROCESSES, JAX_PROCESS_ID is not set"),
        (BY_HAND | {"JAX_PROCESS_ID": "4"}, 0, "JAX_PROCESS_ID=4 must be a number below JAX_NUM_PROCESSES=4"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "n1"}, 0, "JAX_COORDINATOR_ADDRESS=n1 must be HOST:PORT"),
        (
            OPEN_MPI_5,
            0,
            "Open MPI started 2 processes, and JAX cannot find the first of them: set JAX_COORD",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 0, "MPI started 2 processes"),
        (INDEXED_JOB, 0, "an indexed Kubernetes job: set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (SRUN, 3, "SLURM started 2 processes on a host with 3 GPUs, which they cannot share evenly"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(env, gpus, message, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)  # of kubernetes
    with pytest.raises(UserError, match=message):
        cluster.arguments(env, False, gpus)


def test_a_process_that_srun_did_not_start_says_so():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    assert cluster.unused_tasks(batch) == 2
    assert not cluster.unused_tasks(SRUN) and not cluster.unused_tasks({"SLURM_NTASKS": "1"})


def test_visible_gpus():
    assert cluster.visible_gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert cluster.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert cluster.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0


@pytest.mark.parametrize("env, gpus", [(SRUN, 8), (MPIRUN, 2), (BY_HAND, 0), ({}, 8)])
def test_initialize_is_called_with_that(env, gpus, monkeypatch):
    called = []
    monkeypatch.setattr(cluster, "visible_gpus", lambda env: gpus)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: called.append(arguments))
    monkeypatch.setattr(processes, "barrier", lambda: None)
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "JAX_", "PMI"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    processes.initialize()
    signal.signal(signal.SIGTERM, before)
    expected = cluster.arguments(env, False, gpus)
    if expected and "coordinator_address" in expected:
        expected["cluster_detection_method"] = "deactivate"
    assert called == ([expected] if expected is not None else [])


JOIN = """
import os
import jax
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it finds no chip, also if it is made to believe in one
from ddgan_jax.devices import processes
processes.initialize()
print(jax.process_index(), jax.process_count(), processes.exchange(jax.process_index() * 10), flush=True)
processes.barrier()
"""


def join(*environments):
    """What processes print that join in these environments on this machine."""
    started = []
    for env in environments:
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
        command = [sys.executable, "-c", JOIN]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), outputs
    return [[line for line in output.splitlines() if "Gloo" not in line][-1] for output in outputs]


def test_tasks_of_slurm_join():
    """As `srun --ntasks=2` starts them on one node."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    tasks = [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    assert join(*tasks) == ["0 2 [0, 10]", "1 2 [0, 10]"]


HIDE = """
import sys
import ddgan_jax.devices.processes
sys.modules["jax._src.{name}"] = None
delattr(sys.modules["jax._src"], "{name}")
"""


def test_a_command_needs_no_private_name_of_jax(tmp_path):
    """One process runs where JAX has moved what says that this is a Cloud TPU VM."""
    arguments = POINTS, f"--workdir={tmp_path}", "--config.log.tensorboard=False", "--config.train.num_steps=2"
    ((code, output),) = ends(start_group(1, *arguments, script=HIDE.format(name="cloud_tpu_init")))
    assert code == 0 and "finished 2 steps" in output, output


def test_several_processes_say_what_they_miss_of_jax(tmp_path):
    script = HIDE.format(name="distributed")
    for code, output in ends(start_group(2, POINTS, f"--workdir={tmp_path}", script=script)):
        assert code == 2 and "has no coordination service that this version of ddgan_jax knows" in output, output
        assert "Traceback" not in output


@pytest.mark.parametrize(
    "devices, libtpu, expected", [(["/dev/vfio/0"], True, True), ([], True, False), (["/dev/accel0"], False, False)]
)
def test_tpus_are_found_without_jax(devices, libtpu, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.cloud_tpu_init", None)
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [d for d in devices if fnmatch.fnmatch(d, pattern)])
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: libtpu or None)
    assert cluster.on_tpu() is expected


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of one worker of a Cloud TPU VM pod."""

    def do_GET(self):
        values = {"agent-worker-number": self.server.worker, "worker-network-endpoints": "127.0.0.1,127.0.0.1"}
        value = values.get(self.path.rpartition("/")[2], "")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(value).encode())

    def log_message(self, *arguments):
        pass


def test_workers_of_a_cloud_tpu_vm_pod_join():
    """JAX is made to believe in TPUs, and asks a metadata server of each worker; the devices are CPUs."""
    servers = []
    for worker in range(2):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
        server.worker = worker
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    workers = [{"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": f"127.0.0.1:{s.server_port}"} for s in servers]
    workers = [worker | {"JAX_COORDINATOR_PORT": str(free_port())} for worker in workers]
    workers[1]["JAX_COORDINATOR_PORT"] = workers[0]["JAX_COORDINATOR_PORT"]
    try:
        assert join(*workers) == ["0 2 [0, 10]", "1 2 [0, 10]"]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
