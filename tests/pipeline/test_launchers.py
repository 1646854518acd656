"""A chain of stages in two processes, started in every way, is what the command's own two processes make of it; by
torchrun on two nodes and by srun on one, a whole one is, in test_whole_chains.py."""

import json
import subprocess
import sys

import pytest
from launchers import by_hand, by_srun, free_port, torchrun

pytestmark = pytest.mark.slow
CHAIN = ["stage=[sft,preference]", "from_run=quickstart", "trainer=ddp", "trainer.accelerator=cpu"]
ON_ONE_NODE, ON_TWO = ["trainer.devices=2"], ["trainer.devices=1", "trainer.num_nodes=2"]


@pytest.fixture(scope="module")
def chains(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    return folder


@pytest.fixture
def start(lit_rlhf, chains):
    """start([(launcher, environment), ...], settings) -> processes of the command, in a folder with a finished run."""
    begun = []

    def run(starts, *settings):
        for launcher, env in starts:
            _, _, *command = lit_rlhf.command(*settings)
            begun.append(
                subprocess.Popen(
                    [sys.executable, "-m", *launcher, *command], cwd=chains, text=True, env={**lit_rlhf.env, **env},
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        return begun

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()


WAYS = {
    "torchrun": lambda: ([(torchrun("--nproc-per-node=2", f"--master-port={free_port()}"), {})], ON_ONE_NODE),
    "srun, two nodes": lambda: (by_srun(2), ON_TWO),
    "by hand, two nodes": lambda: (by_hand(), ON_TWO),
}


@pytest.fixture(scope="module")
def own():
    """The summary of the chain in two processes that the command starts itself."""
    return {}


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_in_one_start(way, start, chains, own, same_weights):
    if not own:
        done = start([([], {})], *CHAIN, *ON_ONE_NODE, "run=own")[-1]
        assert done.wait(300) == 0, done.stderr.read()
        own.update(json.loads((chains / "runs" / "own" / "summary.json").read_text()))
    starts, settings = WAYS[way]()
    name = way.replace(",", "").replace(" ", "_")
    processes = start(starts, *CHAIN, *settings, f"run={name}")[-len(starts) :]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert "".join(out for out, _ in said).count("report:") == 1  # one process speaks
    summary = json.loads((chains / "runs" / name / "summary.json").read_text())
    assert summary["sft"] == own["sft"] and summary["preference"] == own["preference"]
    assert same_weights(chains / "runs" / name / "sft", chains / "runs" / "own" / "sft")


def test_what_one_process_alone_has_against_it_is_said_by_the_first(start, chains):
    settings = [*CHAIN, *ON_TWO, "run=apart", "stage=sft"]
    first, second = by_hand()
    processes = start([first, second], *settings, f"sft.data.path={chains}/none.jsonl", "sft/data=jsonl")[-2:]
    said = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 2 for process in processes)
    assert "".join(error for _, error in said).count("lit-rlhf: ") == 1
    assert not (chains / "runs" / "apart" / "error.log").exists()


def test_other_numbers_than_were_started_are_refused(start, chains):
    settings = [*CHAIN, "trainer.devices=3", "run=numbers", "stage=sft"]
    done = start([(torchrun("--nproc-per-node=2", f"--master-port={free_port()}"), {})], *settings)[-1]
    _, said = done.communicate(timeout=120)
    assert done.returncode != 0
    assert said.count("lit-rlhf: 2 processes were started, and trainer.devices times trainer.num_nodes is 3") == 1


@pytest.mark.parametrize(("local_rank", "says"), [("0", True), ("1", False)])
def test_what_ends_a_process_before_all_have_met_is_said_on_each_node(local_rank, says, lit_rlhf):
    env = {"RANK": "2", "LOCAL_RANK": local_rank, "GROUP_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    done = lit_rlhf("sft.nothing=1", check=False, env={**env, "MASTER_PORT": "29999"})
    assert done.returncode == 2 and done.stderr.startswith("lit-rlhf: process 2: sft.nothing:") == says
    assert done.stderr.count("\n") == says
