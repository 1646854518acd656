"""Several processes run a command together: each goes through all its stages, and they meet between them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.errors import UserError, first_line, say, users_mistake
from lit_rlhf.pipeline.failures import MISTAKE, fail, first_will_say, others_met, parent_gone, reason
from lit_rlhf.processes import by_srun, is_main_process, number_of, this_process
from lit_rlhf.training.all_processes import patient_group

Value = TypeVar("Value")

OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as start_others() sets them
TO_START = "LIT_RLHF_START_TIMEOUT"  # in the environment: seconds within which all processes must be there
SECONDS_TO_HEAR, SECONDS_TO_END = 20.0, 30.0
NOTE = ".process-{}"  # in the run's folder, by rank: why a process ended, for the first one to say
MAY_DIFFER = {"paths", "threads", "hydra"}  # settings of a node's own
GONE = re.compile("gloo|NCCL|[Cc]onnection (?:closed|reset)")  # how a process learns that another one has ended


class Processes:
    """The processes of a command, which wait for each other between its stages; ``group`` None: there is one."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def agreed(self, value: Callable[[], Value]) -> Value:
        """The first process's ``value()``, broadcast to all processes."""
        found = [value() if is_main_process() else None]
        if self.group is not None:
            dist.broadcast_object_list(found, group=self.group)
        return found[0]  # type: ignore[return-value]

    def meet(self) -> None:
        """Wait for all processes."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def check_alike(self, cfg: DictConfig) -> None:
        """Raise ``UserError``, in all processes, where one has other settings than the first: they would wait for each
        other for ever."""
        if self.group is None:
            return
        own = dict(_leaves({key: node for key, node in OmegaConf.to_container(cfg).items() if key not in MAY_DIFFER}))
        everyones: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyones, own, group=self.group)
        first = everyones[0]
        for rank, other in enumerate(everyones):
            for key in [*first, *other]:
                if (found := other.get(key)) != (expected := first.get(key)):
                    raise UserError(
                        f"{key}={found} in process {rank}, and {key}={expected} in the first; start all processes of a "
                        "run by the same command"
                    )


@contextmanager
def together(cfg: DictConfig, names: list[str]) -> Iterator[Processes]:
    """Where one of the stages ``names`` trains in several processes: all of them, whether a launcher has started them
    or they are started now."""
    nodes = max((_nodes(cfg[name].trainer) for name in names), default=1)
    devices = max((devices_of(cfg[name].trainer) for name in names), default=1)
    if is_main_process():
        for note in _notes(cfg):
            note.unlink()
    before = {name: os.environ.get(name) for name in OURS}
    others = [] if this_process().world_size > 1 else start_others(devices, nodes)
    processes = Processes()
    lost = threading.Event()
    try:
        with _watched(cfg, others, lost):
            processes = _joined(devices * nodes, nodes, others)
            if processes.group is not None:
                others_met(Path(cfg.paths.run_dir), _first_listens)
            processes.check_alike(cfg)
            yield processes
            for other in others:
                other.wait()
    except (Exception, SystemExit) as error:
        lost_one = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and GONE.search(str(error)))
        told = processes.group is not None and lost_one
        if told or lost.is_set():
            raise UserError(_who_has_gone(cfg, others)) from error
        if isinstance(error, SystemExit):
            raise
        if not is_main_process() and Path(cfg.paths.run_dir).is_dir():
            where = "" if users_mistake(error) else f" (where it happened: {cfg.paths.run_dir}/error.log)"
            why = f"{reason(error)}{where}"
            Path(cfg.paths.run_dir, NOTE.format(this_process().rank)).write_text(why, encoding="utf-8")
        raise
    finally:
        if is_main_process() and sys.exc_info()[0] is not None:
            first_will_say()
        processes.group = None  # whoever waits for this process in it hears of the end only if nothing holds it
        if dist.is_initialized():
            dist.destroy_process_group()
        _end(others)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _watched(cfg: DictConfig, others: list[subprocess.Popen[bytes]], lost: threading.Event) -> Iterator[None]:
    """Have a signal end this process, and set ``lost``, where one that it has started, or that has started it, is gone,
    and it does not hear of that: who samples by himself talks to nobody for long. Who waits for another inside of
    torch does not hear the signal either, and ends at once."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            if any(other.poll() for other in others) or (this_process().local_rank > 0 and parent_gone()):
                if not ended.wait(SECONDS_TO_HEAR):
                    lost.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                if not ended.wait(SECONDS_TO_END):
                    _end_at_once(_who_has_gone(cfg, others), others)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _leaves(node: Any, address: str = "") -> Iterator[tuple[str, Any]]:
    """(address, value) of all settings."""
    if not isinstance(node, dict):
        yield address, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{address}.{key}" if address else str(key))


def _end_at_once(said: str, others: Sequence[subprocess.Popen[bytes]]) -> NoReturn:
    """End this process from a thread of it, and those that it has started."""
    for other in others:
        other.kill()
    with suppress(SystemExit):
        fail(said)
    sys.stdout.flush()
    os._exit(MISTAKE)


def _notes(cfg: DictConfig) -> list[Path]:
    return sorted(Path(cfg.paths.run_dir).glob(NOTE.format("*")))


def _who_has_gone(cfg: DictConfig, others: list[subprocess.Popen[bytes]]) -> str:
    for note in _notes(cfg):
        return f"process {note.name.rpartition('-')[2]}: {note.read_text(encoding='utf-8')}"
    return f"{_gone(others)}. Run the same command again to go on"


def _gone(others: list[subprocess.Popen[bytes]]) -> str:
    until = time.monotonic() + 2
    while others and all(other.poll() is None for other in others) and time.monotonic() < until:
        time.sleep(0.1)
    memory = "the kernel does that where memory runs out"
    for rank, other in zip(range(this_process().rank + len(others), 0, -1), others):
        if (code := other.poll()) is not None and code < 0:
            return f"process {rank} was ended by signal {-code}{f' ({memory})' if code == -signal.SIGKILL else ''}"
    return f"another process was killed or lost ({memory})"


def processes_of(trainer: DictConfig) -> int:
    """Number of processes of a stage's trainer, on all nodes."""
    return _nodes(trainer) * devices_of(trainer)


def _nodes(trainer: DictConfig) -> int:
    return int(trainer.get("num_nodes", 1))


def devices_of(trainer: DictConfig) -> int:
    """Number of processes of a stage's trainer on each node."""
    if trainer.devices == "auto":
        return max(1, torch.cuda.device_count()) if trainer.accelerator in ("auto", "gpu", "cuda") else 1
    return trainer.devices if isinstance(trainer.devices, int) else len(trainer.devices)


def start_others(devices: int, nodes: int) -> list[subprocess.Popen[bytes]]:
    """Start the processes of this node but for this one; on each of several nodes the command is started by hand."""
    node = number_of("NODE_RANK")
    if node >= nodes:
        raise UserError(f"NODE_RANK={node}: of trainer.num_nodes={nodes}, 0 to {nodes - 1} were expected")
    if devices * nodes == 1:
        return []
    if nodes > 1 and (missing := {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} - {*os.environ}):
        raise UserError(
            f"trainer.num_nodes={nodes}: {', '.join(sorted(missing))} are not set; start the command "
            "by torchrun or srun, or on each node with NODE_RANK (0, 1, ...), MASTER_ADDR and MASTER_PORT of the first"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ["WORLD_SIZE"] = str(devices * nodes)
    started = []
    for local in reversed(range(devices)):
        os.environ |= {"RANK": str(node * devices + local), "LOCAL_RANK": str(local)}
        if local:
            started.append(subprocess.Popen([sys.executable, "-m", "lit_rlhf", *sys.argv[1:]]))
    return started


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _to_start(nodes: int) -> timedelta:
    """How long a process waits for the others: a launcher has started those of one node, and sees whether they live."""
    told = os.environ.get(TO_START, "45" if nodes > 1 else "600")
    if not told.isdecimal() or not int(told):
        raise UserError(f"{TO_START}={told}: a whole number of seconds was expected")
    return timedelta(seconds=int(told))


def _joined(expected: int, nodes: int, others: Sequence[subprocess.Popen[bytes]] = ()) -> Processes:
    rank, _, _, size = this_process()
    if size == 1:
        return Processes()
    if expected != size:
        raise UserError(
            f"{size} processes were started, and trainer.devices times trainer.num_nodes is {expected}; both must be "
            "as they were started"
        )
    host, port = _address()
    where = f"tcp://{host}:{port}" if by_srun() else "env://"  # which knows the store that torchrun has begun
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = _to_start(nodes)
    longer = f"{TO_START}={max(600, 2 * patience.seconds)}"
    if nodes > 1 or by_srun():
        some = "1 process" if size == 2 else f"{size - 1} processes"
        of = f"{nodes} nodes" if nodes > 1 else "this job"
        srun = "; srun starts them" if by_srun() and "SLURM_STEP_ID" not in os.environ else ""
        say(f"waiting for {some} of {of}, {patience.seconds} s at most ({longer}: longer){srun}")
    again = (
        f"See whether all {size} are started, by the same command, and reach the first one at {host}:{port} "
        f"(MASTER_ADDR and MASTER_PORT); {longer} waits longer"
    )
    vain = f"waited {patience.seconds} s for the other processes in vain: what is there does not answer. {again}"
    # What listens may be another program, or wait for another number of processes: torch would wait for ever.
    limit = threading.Timer(patience.seconds + 5, _end_at_once, (vain, others))
    limit.daemon = True
    limit.start()
    try:
        if rank > 0:
            _wait_for_first(host, port, patience)
        store, *_ = next(dist.rendezvous(where, rank, size, timeout=patience))
        _check_size(store, rank, size, patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, OSError) as error:  # dist.DistError is the former
        if "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT={port}: this port is in use; set another for all processes") from error
        raise UserError(
            f"waited {patience.seconds} s for the other processes in vain, or lost them: "
            f"{first_line(error).removesuffix('.')}. {again}"
        ) from error
    finally:
        limit.cancel()
    return Processes(patient_group())


def _check_size(store: Any, rank: int, size: int, patience: timedelta) -> None:
    """Raise ``UserError`` where one of the processes waits for another number of them: torch would wait for ever."""
    store.set(f"size/{rank}", str(size))
    for other in range(size):
        store.wait([f"size/{other}"], patience)
        if (found := int(store.get(f"size/{other}"))) != size:
            raise UserError(
                f"process {other} is one of {found}, and process {rank} one of {size}; trainer.devices and "
                "trainer.num_nodes must be alike in all processes of a run"
            )


def _address() -> tuple[str, int]:
    """Where the first process listens for the others."""
    if by_srun():
        if "MASTER_PORT" not in os.environ:  # of steps of one job that run at the same time, one's own
            os.environ["MASTER_PORT"] = str(SLURMEnvironment().main_port + 17 * number_of("SLURM_STEP_ID") % 10_000)
        return SLURMEnvironment().main_address, int(os.environ["MASTER_PORT"])
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_ADDR={host} and MASTER_PORT={port}: name and port of the first process were expected")
    return host, int(port)


def _first_listens() -> bool:
    """Whether the first process, or the launcher in its place, is there."""
    host, port = _address()
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def _wait_for_first(host: str, port: int, patience: timedelta) -> None:
    """Until the first process listens; torch's own attempts take twice the time, and end in a page of text."""
    until = time.monotonic() + patience.seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=patience.seconds).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    for other in others:
        if other.poll() is None:
            other.terminate()
    for other in others:
        with suppress(subprocess.TimeoutExpired):
            other.wait(SECONDS_TO_END)
        if other.poll() is None:
            other.kill()
