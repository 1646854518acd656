"""Several rounds of preference, reward and PPO."""

import json
import shutil

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.rounds import changed, round_settings
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings

register_resolvers()
LOOP = "stage=[preference,reward,ppo,evaluate]"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """(number, overrides) -> the settings of that round."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart/sft/model").mkdir(parents=True)

    def make(number, *overrides):
        cfg = compose_settings([LOOP, "rounds=3", *overrides])
        remember_world(cfg)
        check_settings(cfg)
        return changed(cfg, {"stage": ["ppo"], "rounds": 1, **round_settings(cfg, number)})

    return make


def test_what_sets_rounds_apart(settings):
    one, three = settings(1), settings(3)
    assert one.paths.run_dir == "runs/quickstart/rounds/1" and three.paths.run_dir == "runs/quickstart/rounds/3"
    assert one.preference.policy.path == one.ppo.policy.path == "runs/quickstart/sft/model"
    assert three.preference.policy.path == three.ppo.policy.path == "runs/quickstart/rounds/2/ppo/model"
    assert three.reward.reward_model.path == "runs/quickstart/sft/model"
    assert [one.preference.module.round, three.preference.module.round] == [1, 3]
    assert list(three.reward.data.path) == [f"runs/quickstart/rounds/{n}/data/rankings-{n}.jsonl" for n in (1, 2, 3)]
    later = {name: three[name].seed - one[name].seed for name in ("preference", "reward", "ppo", "evaluate")}
    assert later == {"preference": 2, "reward": 2, "ppo": 2, "evaluate": 0}
    assert list(three.evaluate.policies) == ["base", "sft", "dpo", "round_1", "round_2", "ppo"]
    assert three.evaluate.policies.round_2.path == "runs/quickstart/rounds/2/ppo/model"
    assert one.world.seed == three.world.seed and one.split.seed == three.split.seed


def test_ppo_may_begin_at_sft_again_and_rankings_may_grow_old(settings):
    cfg = settings(3, "between_rounds.policy=sft", "between_rounds.rankings=2")
    assert cfg.ppo.policy.path == "runs/quickstart/sft/model"
    assert cfg.preference.policy.path == "runs/quickstart/rounds/2/ppo/model"
    assert [path[-7] for path in cfg.reward.data.path] == ["2", "3"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0: it should be greater than or equal to 1"),
        ("between_rounds.policy=first", "between_rounds.policy=first: it should be 'last' or 'sft'"),
        ("between_rounds.rankings=0", "between_rounds.rankings=0: it should be greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(settings, override, message):
    with pytest.raises(UserError, match=message):
        settings(1, override)


def test_a_round_without_one_of_its_stages_is_refused(lit_rlhf):
    done = lit_rlhf("stage=[reward,ppo]", "rounds=2", check=False)
    assert done.returncode == 2 and "stage= leaves out preference; name them all, or set rounds=1" in done.stderr


@pytest.mark.slow
def test_two_rounds_and_then_a_third(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    command = (LOOP, "from_run=quickstart", "run=loop")
    lit_rlhf(*command, "rounds=2")
    run = tmp_path / "runs" / "loop"
    before = (run / "rounds/2/ppo/done.json").read_text()
    said = lit_rlhf(*command, "rounds=3").stdout
    assert said.count("finished already") == 8 and (run / "rounds/2/ppo/done.json").read_text() == before
    files = {n: (run / f"rounds/{n}/data/rankings-{n}.jsonl").read_text(encoding="utf-8") for n in (1, 2, 3)}
    rows = {n: [json.loads(line) for line in text.splitlines()] for n, text in files.items()}
    assert all(row["round"] == n for n, found in rows.items() for row in found)
    assert rows[1] != rows[2] != rows[3]
    trained = [json.loads((run / f"rounds/{n}/reward/done.json").read_text())["data"]["train_set"] for n in (1, 2, 3)]
    assert trained[1] == 2 * trained[0] and trained[2] == 3 * trained[0]
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["rounds"]) == 3 and summary["ppo"] == summary["rounds"][2]["ppo"]
    assert summary["seconds"]["ppo"] == pytest.approx(sum(r["seconds"]["ppo"] for r in summary["rounds"]))
    assert {"ppo_vs_sft", "ppo_vs_round_2", "round_2_vs_round_1"} <= set(summary["evaluate"]["win_rate"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Round by round" in page and 'href="rounds/3/report.html"' in page


def test_what_starts_from_a_run_of_rounds_starts_from_its_last_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("sft", "rounds/2/ppo", "rounds/9/reward", "rounds/10/reward"):
        (tmp_path / "runs/loop" / folder / "model").mkdir(parents=True)
    (tmp_path / "runs/loop/rounds/2/ppo/config.yaml").write_text("world: {seed: 7}\nsplit: {seed: 8}\n")
    cfg = compose_settings(["stage=ppo", "from_run=loop", "run=after"])
    remember_world(cfg)
    assert (cfg.world.seed, cfg.split.seed) == (7, 8)
    assert cfg.ppo.policy.path == "runs/loop/sft/model"
    assert cfg.ppo.reward_model.path == "runs/loop/rounds/10/reward/model"
    cfg = compose_settings(["stage=evaluate", "from_run=loop", "run=after"])
    assert cfg.evaluate.policies.ppo.path == "runs/loop/rounds/2/ppo/model"


def test_what_people_say_belongs_to_the_last_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/answers-0", "data/tasks-77", "rounds/9/data/rankings-9", "rounds/10/data/answers-10"):
        (tmp_path / f"runs/loop/{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"runs/loop/{name}.jsonl").touch()
    (tmp_path / "runs/loop/rounds/10/ppo/model").mkdir(parents=True)

    def found(*overrides):
        cfg = compose_settings(["stage=chat", *overrides])
        kept = cfg.chat.judgements
        return [kept.round, kept.folder, cfg.label.round, cfg.label.folder, cfg.label.path, cfg.chat.models.ppo]

    last, ppo = "runs/loop/rounds/10/data", "runs/loop/rounds/10/ppo/model"
    assert found("run=loop") == [10, last, 10, last, f"{last}/answers-10.jsonl", ppo]
    assert found("run=own", "from_run=loop") == [
        10, "runs/own/data", 10, "runs/own/data", f"{last}/answers-10.jsonl", ppo,
    ]  # fmt: skip
    data = "runs/loop/data"
    given = found("run=loop", "label.round=0", "chat.judgements.round=0")
    assert given == [0, data, 0, data, f"{data}/answers-0.jsonl", ppo]
    assert found("run=new")[:4] == [0, "runs/new/data", 0, "runs/new/data"]


def test_a_run_that_went_without_rounds_is_not_hidden_behind_them(lit_rlhf, tmp_path):
    (tmp_path / "runs/quickstart/ppo").mkdir(parents=True)
    done = lit_rlhf(LOOP, "rounds=2", check=False)
    assert done.returncode == 2 and "ppo was made without rounds" in done.stderr
    assert "choose another run=, with from_run=quickstart" in done.stderr
