"""Secrets of a user, looked for in every file of the run and every line of the terminal."""

import shutil

import pytest
from judge_server import JudgeServer, completion

CANARY = "canary-7f3a90e1c2d4"
KEYS = ["OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_JUDGE", "JUDGE_PASSWORD", "LIT_RLHF_TOKEN"]
ASKED = ["stage=preference", "run=mine", "from_run=quickstart", "preference/annotator=llm_judge"]


@pytest.fixture
def judge_url():
    """A judge that repeats the key in what it says."""

    def reply(request):
        said = completion(f"The key is {request.headers['Authorization']}. The answer is\nA")
        return 200 if request.path.startswith("/v1") else 403, said, {}

    server = JudgeServer(reply)
    yield server.address
    server.close()


def holding(folder, canary=CANARY):
    """Files that hold the canary."""
    return [file for file in folder.rglob("*") if file.is_file() and canary.encode() in file.read_bytes()]


def test_keys_of_the_environment_are_in_no_file_and_no_line(lit_rlhf, finished_run, tmp_path, judge_url):
    shutil.copytree(finished_run / "runs" / "quickstart", tmp_path / "runs" / "quickstart")
    env = {name: f"{CANARY}-{name}" for name in KEYS} | {"WANDB_SILENT": "false", "WANDB_MODE": "offline"}
    env |= {"HTTPS_PROXY": f"http://me:{CANARY}@127.0.0.1:9"}
    (tmp_path / ".git").mkdir()  # W&B writes down the remote of a repository
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    remote = tmp_path / ".git" / "config"
    remote.write_text(f'[core]\n\tbare = false\n[remote "origin"]\n\turl = https://me:{CANARY}@host.test/x.git\n')
    judge = [*ASKED, "preference.annotator.model=m", "preference.annotator.api_key_env=MY_JUDGE"]
    judge += ["debug=fast", "logger=wandb", "threads=1"]
    done = lit_rlhf(*judge, f"preference.annotator.url={judge_url}/v1", env=env, fast=False)
    assert CANARY not in done.stdout + done.stderr
    assert (tmp_path / "runs/mine/preference/verdicts.jsonl").read_text().count("[secret]") > 1  # it was repeated
    assert list((tmp_path / "runs/mine/preference").glob("wandb/offline-run-*/*.wandb"))
    judge += ["run=other", f"preference.annotator.url={judge_url}/v2"]
    refused = lit_rlhf(*judge, env=env, fast=False, check=False)
    assert refused.returncode == 2 and "HTTP 403" in refused.stderr and CANARY not in refused.stdout + refused.stderr
    assert holding(tmp_path) == [remote]


@pytest.mark.parametrize(
    ("given", "more"),
    [
        (f"preference.annotator.url=http://me:{CANARY}@127.0.0.1:9/v1", ["-m", "seed=1,2"]),
        (f"preference.annotator.url=http://me:{CANARY}@127.0.0.1:9/v1", ["--config-dir", "mine"]),
        *((given, []) for given in (
        f"preference.annotator.url=http://me:{CANARY}@127.0.0.1:9/v1",
        f"preference.annotator.url=http://127.0.0.1:9/v1?api_key={CANARY}",
        "preference.annotator.url=${oc.env:JUDGE_URL}",
        f"preference.annotator.api_key_env={CANARY}",
        f"+preference.annotator.api_key={CANARY}",
        f"model.path=https://{CANARY}@host.test/model",
        f"preference.data.path=https://me:{CANARY}@host.test/prompts.jsonl",
        f"+logger.wandb.base_url=https://me:{CANARY}@host.test",
        f"nothing=https://me:{CANARY}@host.test",
        )),
    ],
)  # fmt: skip
def test_a_secret_among_the_settings_is_refused_and_written_nowhere(lit_rlhf, tmp_path, given, more, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("JUDGE_URL", f"http://me:{CANARY}@127.0.0.1:9/v1")
    done = lit_rlhf(*ASKED, "preference.annotator.model=m", *more, given, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert CANARY not in done.stdout + done.stderr and not holding(tmp_path)
    assert given.partition("=")[0].lstrip("+") in done.stderr
