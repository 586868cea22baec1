"""The launcher of this process, and how to join the other processes: Cloud TPU, GKE, SLURM, Open MPI, Kubernetes.

JAX finds the coordinator on these platforms. This module decides, from environment variables alone, whether there is a
group to join, and which GPUs of the host belong to this process.
"""

import glob
import importlib.util
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddgan_jax.errors import UserError

JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
BY_HAND = "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process"


class Group(NamedTuple):
    """The processes that one launcher started."""

    launcher: str
    processes: int
    rank: int
    local_processes: int = 1  # on this host
    local_rank: int = 0
    known_to_jax: bool = True  # whether JAX finds the coordinator


def _number(env: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables that is set, as a number."""
    return next((int(env[name]) for name in names if env.get(name, "").isdigit()), None)


def _tasks_per_node(env: Mapping[str, str]) -> int:
    """The number of tasks on this node, from SLURM's list, such as 2(x3),1."""
    counts: list[int] = []
    for part in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(part[0])] * int(part[1] or 1)
    node = _number(env, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else 1


def launched(env: Mapping[str, str]) -> Group | None:
    """The group that SLURM's `srun`, `mpirun` or an indexed Kubernetes job started this process in, or None."""
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:  # else `srun` did not start it
        tasks = _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 1
        local = _tasks_per_node(env), _number(env, "SLURM_LOCALID") or 0
        return Group("SLURM", tasks, int(env["SLURM_PROCID"]), *local)
    if count := _number(env, "OMPI_COMM_WORLD_SIZE"):
        rank = _number(env, "OMPI_COMM_WORLD_RANK") or 0
        local = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1, _number(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0
        return Group("Open MPI", count, rank, *local, known_to_jax="OMPI_MCA_orte_hnp_uri" in env)  # not since 5.0
    if count := _number(env, "PMI_SIZE"):
        local = _number(env, "MPI_LOCALNRANKS") or 1, _number(env, "MPI_LOCALRANKID") or 0
        return Group("MPI", count, _number(env, "PMI_RANK") or 0, *local, known_to_jax=False)
    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        return Group("Kubernetes", _number(env, "JAX_NUM_PROCESSES") or 0, int(env["JOB_COMPLETION_INDEX"]))
    return None


def unused_tasks(env: Mapping[str, str]) -> int:
    """The number of tasks of a SLURM job with several tasks, if this process is not one of them; else 0."""
    tasks = _number(env, "SLURM_NTASKS") or 0
    return tasks if tasks > 1 and launched(env) is None else 0


def local_gpus(group: Group, env: Mapping[str, str], gpus: int) -> list[int] | None:
    """The indices of this process's GPUs among the `gpus` that it sees; None without GPUs or with JAX_LOCAL_DEVICE_IDS.

    A launcher that binds GPUs to tasks shows each task its own. Otherwise the tasks of a host divide them evenly.
    Raises UserError if they cannot.
    """
    if not gpus or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    on_node = _number(env, "SLURM_GPUS_ON_NODE") or gpus
    if group.local_processes == 1 or gpus * group.local_processes <= on_node or env.get("SLURM_GPUS_PER_TASK"):
        return list(range(gpus))
    share, rest = divmod(gpus, group.local_processes)
    if rest or not share:
        raise UserError(
            f"{group.launcher} started {group.local_processes} processes on a host with {gpus} GPUs, "
            "which they cannot share evenly: start one process per host, or one per GPU"
        )
    return list(range(group.local_rank * share, (group.local_rank + 1) * share))


def visible_gpus(env: Mapping[str, str]) -> int:
    """The number of NVIDIA GPUs that this process sees."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return len([name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def on_tpu() -> bool:
    """Whether this host has TPUs that JAX will use."""
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # what JAX itself checks; it has no public name
    except ImportError:
        devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
        return bool(devices) and importlib.util.find_spec("libtpu") is not None
    return running_in_cloud_tpu_vm


def _tpu_arguments(env: Mapping[str, str]) -> dict[str, Any] | None:
    """`arguments` on a Cloud TPU VM or a GKE pod with TPUs: {} where JAX finds the rest, None for a single host."""
    bounds = env.get("TPU_PROCESS_BOUNDS") or env.get("TPU_HOST_BOUNDS")
    if bounds and set(bounds.split(",")) == {"1"}:  # how one host of a pod is used alone
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    slices = _number(env, "MEGASCALE_NUM_SLICES") or 1
    if hosts and len(hosts.split(",")) * slices == 1:  # such as Colab's
        return None
    return {}


def arguments(env: Mapping[str, str], on_tpu: bool, gpus: int) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` in this environment, or None without a group to join.

    `on_tpu` is whether this host has TPUs, `gpus` the number of GPUs that this process sees. Raises UserError if
    several processes were started that cannot find each other.
    """
    group = launched(env)
    given = {name: env[name] for name in JAX_VARIABLES if env.get(name)}
    if given == {"JAX_NUM_PROCESSES": "1"}:
        return None
    if given:
        if group and "JAX_COORDINATOR_ADDRESS" in given:  # the launcher knows the other two
            known = {"JAX_NUM_PROCESSES": group.processes, "JAX_PROCESS_ID": group.rank}
            given = {name: str(value) for name, value in known.items()} | given
        missing = [name for name in JAX_VARIABLES if name not in given]
        if missing:
            raise UserError(f"several processes need {', '.join(JAX_VARIABLES)}, but {', '.join(missing)} is not set")
        address, count, index = (given[name] for name in JAX_VARIABLES)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={count}")
        if ":" not in address:
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT, of process 0")
        found = dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
        ids = local_gpus(group or Group("JAX_*", int(count), int(index)), env, gpus)
        return found | {"local_device_ids": ids}
    if on_tpu:
        return _tpu_arguments(env)
    if group is None or group.processes == 1:
        return None
    if group.launcher == "Kubernetes":
        if env.get("JAX_NUM_PROCESSES") is None and not importlib.util.find_spec("kubernetes"):
            raise UserError(
                "this is a pod of an indexed Kubernetes job: set JAX_COORDINATOR_ADDRESS=HOST:PORT, of the pod with "
                "index 0, and JAX_NUM_PROCESSES in each (1 for a single pod), or `pip install kubernetes`"
            )
        return {"local_device_ids": local_gpus(group, env, gpus)}
    if not group.known_to_jax:
        raise UserError(
            f"{group.launcher} started {group.processes} processes, and JAX cannot find the first of them: "
            "set JAX_COORDINATOR_ADDRESS=HOST:PORT, of the host of rank 0"
        )
    return {"local_device_ids": local_gpus(group, env, gpus)}
