"""Two processes of a command as launchers start them: [(what Python runs as a module first, environment), ...]."""

import socket


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def torchrun(*arguments):
    return ["torch.distributed.run", *arguments, "--master-addr=127.0.0.1", "-m"]


def by_torchrun():
    """On two nodes."""
    port = free_port()
    return [(torchrun("--nnodes=2", f"--node-rank={node}", f"--master-port={port}"), {}) for node in range(2)]


def by_srun(nodes):
    """What srun tells two tasks; the port follows from the job's number."""
    job = {"NTASKS": 2, "NTASKS_PER_NODE": 2 // nodes, "NNODES": nodes, "JOB_ID": int(free_port()) % 1000,
           "JOB_NAME": "train", "NODELIST": "127.0.0.1"}  # fmt: skip
    places = [(rank, 0) if nodes == 1 else (0, rank) for rank in range(2)]
    tasks = [{"PROCID": rank, "LOCALID": local, "NODEID": node} for rank, (local, node) in enumerate(places)]
    return [([], {f"SLURM_{name}": str(value) for name, value in {**job, **task}.items()}) for task in tasks]


def by_hand():
    """On two nodes."""
    first = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [([], {**first, "NODE_RANK": str(node)}) for node in range(2)]


def on_one_node():
    """As the command tells the processes that it starts."""
    port = free_port()
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [([], {**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
