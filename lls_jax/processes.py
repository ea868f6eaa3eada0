"""Several processes that train one network together, each with devices of its own.

All of them run the same program on the same arguments. What they all hold is an array over every
device (:func:`replicate`), what each has a part of is sharded (:func:`shard_batch`), and whatever
decides what is done next must be the same number in each (:func:`make_agreement`).
"""

import collections
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lls_jax.errors import ProcessesError

# Seconds without a sign of life after which a process counts as dead.
_HEARTBEAT_TIMEOUT = 20
# Seconds that a process which has ended waits for the others to end.
_SHUTDOWN_TIMEOUT = 20


@contextlib.contextmanager
def initialize(
    coordinator: str,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> Iterator[None]:
    """Connect to the other processes; meanwhile ``jax.devices()`` are those of all of them.

    To be entered before anything touches a device, once. At its end the processes wait for each
    other, but not after an error: then the others are left to notice. A process whose peers are
    lost ends too, by :func:`peer_loss_as_error` or, where it is process 0 that was lost, aborted by
    JAX.

    Args:
        coordinator: ``"host:port"`` of process 0, where it listens; or ``"auto"``, to ask the
            cluster that started the processes: Slurm, Open MPI, Kubernetes, Cloud TPU.
        num_processes: how many there are; may be left out with ``"auto"``.
        process_id: which one this is, from 0; may be left out with ``"auto"``.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: an argument is missing or out of range.
        ProcessesError: no cluster was found, the port is taken, or the others did not come.
    """
    found = coordinator == "auto"
    if not found:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"coordinator is {coordinator!r}; expected HOST:PORT of process 0, like "
                "10.0.0.1:12345, or auto."
            )
        if num_processes is None or process_id is None:
            raise ValueError(
                f"coordinator {coordinator} needs the number of processes and the id of this one; "
                "give both, or the coordinator auto on a cluster."
            )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"the number of processes is {num_processes}; it must be at least 1.")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(
            f"the process's id is {process_id}; expected 0 to {(num_processes or 1) - 1}."
        )
    if not found and process_id == 0:
        _check_free(int(port))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, and have the run stop without a word.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if found else coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except ValueError as error:
        raise ProcessesError(
            f"no cluster was found that tells where the other processes are ({error}); start this "
            "with srun, mpirun or on Kubernetes, or give the coordinator's HOST:PORT, the number "
            "of processes and the id of this one."
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ProcessesError(
            f"the processes did not connect at {coordinator} ({reason}); check that process 0 runs "
            "there, and that nothing has touched a device before, and start all of them again."
        ) from error
    yield
    jax.distributed.shutdown()


def _check_free(port: int) -> None:
    """Raise ProcessesError if another program listens at a port, on which jaxlib would crash."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ProcessesError(
            f"process 0 cannot listen at port {port} ({error.strerror}); give all processes a "
            "coordinator with another port."
        ) from error


@contextlib.contextmanager
def peer_loss_as_error() -> Iterator[None]:
    """Turn a failure of what all processes compute together into an error that says so.

    Raises:
        ProcessesError: another process, or the way to it, was lost.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        # XLA wraps it once for each computation that was waiting.
        reason = str(error).strip().splitlines()[0].rpartition("computation: ")[2][:200]
        raise ProcessesError(
            f"process {jax.process_index()} of {jax.process_count()} has lost another one "
            f"({reason}); see what that one says. Start the same run again, with any number of "
            "processes, to resume it from its newest checkpoint."
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes for all; true where there is one only."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def everywhere() -> jax.sharding.NamedSharding:
    """The sharding of an array that is whole on every device of every process."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def replicate(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """Copy arrays that every process holds alike to all devices of a sharding.

    Args:
        tree: a pytree of arrays, the same in every process; keys too.
        sharding: one that shards nothing, like :func:`everywhere`.
    """

    # In the sharding's order, which its set of addressable devices has not.
    ours = [d for d in sharding.mesh.devices.flat if d in sharding.addressable_devices]

    def copied(leaf: Any) -> jax.Array:
        # Copies, because what is trained gives its buffers away.
        parts = [jax.device_put(jnp.copy(leaf), device) for device in ours]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(copied, tree)


def local_copy(tree: Any) -> Any:
    """This process's copy of arrays that are whole on every device; on its first device."""
    device = jax.local_devices()[0]
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.copy(leaf.addressable_data(0)), device), tree
    )


def local_rows(sharding: jax.sharding.NamedSharding, batch_size: int) -> slice:
    """The examples of a batch that this process reads.

    Args:
        sharding: of the batch, along its first axis.
        batch_size: examples of the whole batch, a multiple of the devices.

    Returns:
        All, with one process.
    """
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    spans = [part[0].indices(batch_size)[:2] for part in parts if part is not None]
    return slice(min(span[0] for span in spans), max(span[1] for span in spans))


def shard_batch(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """Arrays of a batch, each process's rows in one, sharded along their first axis.

    Args:
        tree: a pytree of arrays, in each process its rows, as :func:`local_rows` tells them; arrays
            that are so sharded already stay as they are.
        sharding: of the whole batch.

    Raises:
        ValueError: the rows do not divide over this process's devices.
    """
    devices = len(sharding.addressable_devices)

    def shared(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if leaf.shape[0] % devices:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide over {devices} devices.")
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(shared, tree)


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
    return jnp.max(numbers)


def make_agreement(lag: int = 0) -> Callable[[int], int]:
    """A function that makes one number of those that the processes have.

    Args:
        lag: calls by which the answer is late, so that nobody waits for it.

    Returns:
        ``agree(number) -> largest``: the largest of all processes' numbers, which are at least 0,
        of `lag` calls ago; 0 before. Every process must call it equally often. With one process it
        returns the number itself, at once.
    """
    if jax.process_count() == 1:
        return lambda number: number
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    under_way: collections.deque[jax.Array] = collections.deque()

    def agree(number: int) -> int:
        mine = np.full(jax.local_device_count(), number, np.int32)
        under_way.append(_largest(jax.make_array_from_process_local_data(sharded, mine)))
        return int(np.asarray(under_way.popleft())) if len(under_way) > lag else 0

    return agree
