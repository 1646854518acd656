"""Every option composes, and every mistake is one line that says what to do."""

from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import (
    check_settings,
    check_top_level,
    command_of,
    compose_settings,
    conf_dir,
    name_loaders,
    stages_of,
    sweep_jobs,
    without_sweeps,
)
from lit_rlhf.stages.stage import all_stages

register_resolvers()
CONF = conf_dir()
FILL = [  # what a user must give
    "pretrain.data.path=a.txt", "sft.data.path=a.jsonl", "preference.data.path=a.jsonl", "ppo.data.path=a.jsonl",
    "evaluate.data.path=a.jsonl", "tokenizer.path=folder", "model.path=folder", "reward.data.path=a.jsonl",
    "dpo.data.path=a.jsonl", "preference.annotator.model=m", "preference.annotator.function=os.getcwd",
    "classify.data.path=a.jsonl", "few_shot.data.path=a.jsonl", "evaluate.annotator.model=m",
    "evaluate.benchmark.tasks=[a]", "reward_bench.data.path=a.jsonl",
    "ppo.reward_model.model=m", "evaluate.reward_model.model=m", "ppo.reward_model.url=http://x/s",
    "reward_bench.reward_model.model=m", "reward_bench.reward_model.url=http://x/s",
    "evaluate.reward_model.url=http://x/s", "preference.annotator.reward_model.url=http://x/s",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A folder in which no run is remembered: someone may have made one where the tests are started."""
    monkeypatch.chdir(tmp_path)


def checked(*overrides):
    return check(compose_settings(list(overrides)))


def check(cfg):
    check_top_level(cfg)
    remember_world(cfg)
    check_settings(cfg)
    return cfg


def options():
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.relative_to(CONF).parent
        if str(group) not in (".", "shared", "recipe/experiment", "recipe/reward_head"):  # chosen by others' names
            yield f"{group}={file.stem}"


@pytest.mark.parametrize("option", list(options()))
def test_every_option_composes_and_passes_the_check(option):
    stage = option.partition("/")[0]
    options = [option, *([f"stage={stage}"] if stage in all_stages() else [])]  # others do not see it
    cfg = compose_settings(options)
    OmegaConf.set_struct(cfg, True)
    if option == "pretrain/init=checkpoint":  # what starts from a checkpoint takes another recipe: it is composed anew
        cfg = compose_settings([*options, "model.path=folder"])
    for address, _, value in (f.partition("=") for f in FILL):
        if _is_open(cfg, address):
            OmegaConf.update(cfg, address, value.strip("[]").split(",") if value.startswith("[") else value)
    check(cfg)


def _is_open(cfg, address):
    above, _, key = address.rpartition(".")
    node = OmegaConf.select(cfg, above)
    return node is not None and OmegaConf.is_missing(node, key)


def test_every_target_can_be_imported():
    text = "".join(file.read_text() for file in CONF.rglob("*.yaml"))
    targets = {
        line.split("_target_:")[1].split(",")[0].strip(" }") for line in text.splitlines() if "_target_:" in line
    }
    assert len(targets) > 20
    for target in targets:
        get_object(target.split()[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.optimizer.lrr=1", "sft.optimizer.lrr: there is no such setting. Did you mean sft.optimizer.lr"),
        ("sft.optimizer.lr=fast", "sft.optimizer.lr=fast: it should be a valid number"),
        ("sft.optimizer.lr=-1", "sft.optimizer.lr=-1: it should be greater than or equal to 0"),
        ("model.config={num_experts:4}", "config.num_experts: there is no such setting, and model.config={...}"),
        ("sft.trainer.gradient_clip_val=2", "there is no such setting; it is sft.module.max_grad_norm now"),
        ("ppo.trainer.onednn=128", "there is no such setting; it is ppo.trainer.kernels (fast or plain) now"),
        ("trainer.row_multiple=1", "there is no such setting; it is trainer.kernels (fast or plain) now"),
        ("keep_freed_memory=false", "there is no such setting; it is trainer.kernels (fast or plain) now"),
        ("engine.lean=false", "there is no such setting; it is trainer.kernels (fast or plain) now"),
        ("ppo.policy.fused=false", "there is no such setting; it is trainer.kernels (fast or plain) now"),
        (
            "preference.module.journal=x",
            "there is no such setting; it is preference.module.progress_file now",
        ),
        ("sft.optimizer.fused=false", "there is no such setting; it is automatic now"),
        ("ckpt_path=last.ckpt", r"ckpt_path: there is no such setting; it is automatic (a stage goes on from its own"),
        ("ppo.trainer.kernels=slow", "ppo.trainer.kernels=slow: it should be 'fast' or 'plain'"),
        ("ppo.advantage.lam=1.5", "ppo.advantage.lam=1.5: it should be less than or equal to 1"),
        ("ppo.module.ppo_epochs=2.5", "ppo.module.ppo_epochs=2.5: it should be a valid integer"),
        ("ppo.module.minibatch_size=true", "a number was expected, not true or false"),
        ("preference.module.answers_per_prompt=1", "answers_per_prompt=1: it should be greater than or equal to 2"),
        ("sft.trainer.max_steps=-7", "max_steps=-7: it should be greater than or equal to 1, or it should be -1"),
        ("trainer.precision=half", "trainer.precision=half: it should be"),
        ("trainer.matmul_precision=low", "trainer.matmul_precision=low: it should be"),
        ("engine.rows=0", "engine.rows=0: it should be greater than or equal to 1"),
        ("+sft.data.colour=red", "sft.data.colour: lit_rlhf.stages.WorldSFTDataModule has no such setting; it takes"),
        ("seed=-1", "seed=-1: it should be greater than or equal to 0"),
        ("seed=x", "seed=x: it should be a valid integer"),
        ("run=../elsewhere", "run=../elsewhere:"),
        ("stage=sfft", "there is no stage 'sfft'. Did you mean sft?"),
        ("stage=[]", "an empty list"),
        ("model=nanoo", "Could not find 'model/nanoo' Available options in 'model': gpt2"),
        (
            "sft.data.path=x.jsonl",
            "this setting comes with sft/data=jsonl or sft/data=stream; give that, too",
        ),
        ("callbacks.early_stopping.patience=3", "this setting comes with callbacks=early_stopping; give that, too"),
        ("sft.data=jsonl", "sft.data=jsonl: an option of a group of settings is chosen with slashes: sft/data=jsonl"),
        ("logger=[csv,nope]", "logger: there is no option nope; there are csv, mlflow, tens"),
        ("run=a+b", "run=a+b: letters, digits, '.', '-' and '_' were expected"),
        ("sft.optimizer.lr", "sft.optimizer.lr"),
        ("ppo.sampling.temperature=-1", "temperature=-1: it should be greater than or equal to 0"),
        ("world.seed=red", "world.seed=red: it should be a valid integer"),
        ("stage=null", "stage=null: it should be a valid string"),
        ("~seed", "~seed: this setting is needed"),
        ("~paths.runs", "~paths.runs: this setting is needed"),
        ("~world", "~world: this setting is needed"),
        ("~trainer", "trainer: this setting is needed"),
        ("~sft", "sft.seed: this setting is needed"),
        ("~sft.data", "~sft.data: this setting is needed"),
        ("~sft.module._target_", "~sft.module._target_: this setting is needed"),
        ("~evaluate.policies", "~evaluate.policies: this setting is needed"),
        ("ppo=null", "ppo=null: this is a group of settings; name one of its options (default)"),
        (
            "logger=inf",
            "logger=inf: this is a group of settings; name one of its options (csv, mlflow, tens",
        ),
        ("stage=3", "stage=3: it should be a valid string"),
        ("stage=sft world=null", "world=null: it should be a valid dictionary"),
        ("logger.wandb=inf", "logger.wandb=inf: it should be a valid dictionary"),
        ("split=3", "split=3: it should be a valid dictionary"),
        ("sft.data=null", "sft.data=null: it should be a valid dictionary"),
        ("sft.module.sampling=null", "sft.module.sampling=null: it should be an instance of Sampling"),
        ("sft.module._target_=os", "sft.module._target_"),
        ("evaluate.policies=null", "evaluate.policies: several models by name were expected"),
        ("run=${nope}", "run: Interpolation key 'nope' not found"),
        ("seed=${seed}", "seed: Recursive interpolation"),
        ("sft.optimizer.lr=${nope}", "sft.optimizer.lr: Interpolation key 'nope' not found"),
        ("paths.runs=null", "paths.runs=null: it should be a valid string"),
        ("threads=100000000", "threads=100000000: it should be less than or equal to 1024"),
        ("special_tokens=foo", "special_tokens=foo: it should be 'plain', 'refuse' or 'rendered'"),
        ("sft.optimizer.lr=inf", "sft.optimizer.lr=inf: it should be a finite number"),
        ("ppo.sampling.temperature=inf", "ppo.sampling.temperature=inf: it should be a finite number"),
        ("ppo.sampling.temperature=1e-30", "temperature=1e-30: it should be greater than or equal to 0.01"),
        ("ppo.sampling.stop=['']", "ppo.sampling.stop=['']: String should have at least 1 character"),
        ("preference.sampling.min_new_tokens=900", "sampling: min_new_tokens=900 is more than max_new_tokens"),
        ("sft.trainer.max_steps=0", "max_steps=0: it should be greater than or equal to 1, or it should be -1"),
        ("sft.trainer.max_epochs=null", "sft.trainer: neither max_epochs nor max_steps says how long to train"),
        ("+foo=1", "+foo=1: nothing reads a setting of this name"),
        ("++foo=1", "++foo=1: nothing reads a setting of this name"),
        ("+ckpt_path=/nonexistent", "+ckpt_path=/nonexistent: nothing reads a setting of this name"),
        ("++sft.optimiser.lr=1", "Did you mean sft.optimizer.lr (without +)?"),
        ("+trainer.profiler=simple", "+trainer.profiler=simple: nothing reads a setting of this name"),
        ("+sft.foo=1", "+sft.foo=1: nothing reads a setting of this name"),
        ("+lengths.foo=1", "+lengths.foo=1: nothing reads a setting of this name"),
        ("+sft.trainer.foo=1", "sft.trainer.foo: lit_rlhf.training.make_trainer has no such setting; it takes"),
        ("+sft.trainer.callbacks=[]", "sft.trainer.callbacks: lit_rlhf.training.make_trainer has no such setting"),
        ("+sft.optimizer.foo=1", "sft.optimizer.foo: lit_rlhf.training.adamw has no such setting"),
        ("+nope/data=x", "+nope/data=x: nothing reads"),
    ],
)
def test_mistakes_are_one_line_that_names_the_setting(override, message):
    with pytest.raises(UserError) as error:
        checked(*override.split(" "))
    assert message in str(error.value)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("override", ["seed=" + "9" * 5_000, "seed=" + "[" * 5_000, "seed=[", "seed=\udcff"])
def test_what_cannot_be_parsed_is_named(override):
    with pytest.raises(UserError, match=r"^seed=") as error:
        without_sweeps([override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_letters_beyond_ascii_want_quotes():
    with pytest.raises(UserError, match="letters beyond ASCII stand in quotes: 'name=\"value\"'"):
        without_sweeps(["run=ünï"])
    assert without_sweeps(['run="ünï"']) == ['run="ünï"']


@pytest.mark.parametrize(
    "overrides",
    [
        "+sft.trainer.profiler=simple +sft.trainer.gradient_clip_algorithm=norm",
        "+foo=1e-3 sft.optimizer.lr=${foo}",
        "+mine.lr=1e-3 sft.optimizer.lr=${mine.lr}",
        "+model.config.attention_bias=true ~model.config.rope_parameters",
        "~model.config +model.config={model_type:gpt2}",
        "++seed=1 ++sft.optimizer.lr=1e-3 ++callbacks.progress_bar=false",
        "++evaluate.policies.mine=folder ~evaluate.policies.ppo",
        "~sft.optimizer.betas ~sft.samples_every ~ppo.health",
        "+sft.models.mine=folder",
    ],
)
def test_what_something_takes_may_be_added_and_what_has_a_default_taken_away(overrides):
    cfg = compose_settings(overrides.split())
    name_loaders(cfg)
    check(cfg)


def test_groups_of_the_users_own_may_be_added(tmp_path):
    for name in ("mine/a.yaml", "sft/mine/b.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("lr: 1.0e-3\n")
    own = f"hydra.searchpath=[file://{tmp_path}]"
    assert checked(own, "+mine=a", "+sft/mine=b", "sft.optimizer.lr=${mine.lr}").sft.mine.lr == 1e-3
    with pytest.raises(UserError, match=r"\+mine.rate=1: nothing reads"):
        checked(own, "+mine=a", "+mine.rate=1")


@pytest.mark.parametrize(("stage", "init"), [("pretrain", "checkpoint"), ("sft", "upstream"), ("reward", "upstream")])
def test_a_checkpoint_has_no_config_for_a_fresh_model(stage, init):
    says = rf"{stage}/init=scratch makes a model from model.config, .* set {stage}/init={init} to go on from the"
    with pytest.raises(UserError, match=says):
        checked(f"stage={stage}", f"{stage}/init=scratch", "model=hf", "model.path=x")


def test_what_must_be_given_is_named_with_where_it_comes_from():
    with pytest.raises(UserError, match=r"pretrain.data.path is not given \(input.txt .*char-rnn\)"):
        checked("experiment=shakespeare")
    with pytest.raises(UserError, match=r"model\.path is not given"):
        checked("model=hf", "stage=sft")


def test_stages_run_in_their_order_and_a_checkpoint_replaces_pretraining():
    pipeline = ["pretrain", "sft", "preference", "reward", "ppo", "evaluate"]
    assert stages_of(compose_settings([])) == pipeline
    assert stages_of(compose_settings(["stage=[ppo,sft]"])) == ["sft", "ppo"]
    assert stages_of(compose_settings(["stage=[evaluate,dpo]"])) == ["dpo", "evaluate"]
    assert stages_of(compose_settings(["model=hf", "model.path=x"])) == pipeline[1:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=label", "label.mode=sort"], "label.mode=sort: it should be 'rank', 'rate' or 'write'"),
        (["stage=label", "label.repeat=1.5"], "label.repeat=1.5: it should be less than or equal to 1"),
        (["stage=label", "+label.colour=red"], "label.colour: lit_rlhf.apps.label.LabellingPage has no such setting"),
        (["stage=[label,reward]"], "label is a page, which runs by itself; give stage=label alone"),
        (["stage=lable"], "There are: pipeline, pretrain"),
    ],
)
def test_a_command_is_checked_like_a_stage_and_runs_alone(overrides, message):
    assert command_of(checked("stage=label")) == "label" and stages_of(checked("stage=label")) == []
    assert command_of(checked("stage=reward")) is None
    with pytest.raises(UserError) as error:
        checked(*overrides)
    assert message in str(error.value)


def test_a_setting_has_one_address_alone_in_the_pipeline_and_in_a_sweep():
    for more in ([], ["stage=ppo"], ["stage=[ppo,evaluate]"]):
        assert checked("ppo.module.kl_coef=0.3", *more).ppo.module.kl_coef == 0.3
    assert sweep_jobs(["ppo.module.kl_coef=0.1,0.2", "seed=1,2"]) == [
        [f"ppo.module.kl_coef={kl}", f"seed={seed}"] for kl in (0.1, 0.2) for seed in (1, 2)
    ]


def test_an_interval_is_nothing_for_the_basic_sweeper():
    with pytest.raises(UserError, match=r"hydra/sweeper=optuna draws from intervals"):
        sweep_jobs(["ppo.module.kl_coef=interval(0.02,0.2)"])


def test_trainer_settings_reach_every_stage_and_one_stage_alone():
    cfg = checked("trainer.precision=bf16-mixed", "sft.trainer.precision=32-true")
    assert cfg.ppo.trainer.precision == "bf16-mixed"
    assert cfg.sft.trainer.precision == "32-true"


def test_every_constructor_setting_is_visible_in_the_yaml():
    """No `+` is needed: what a data module or module takes stands in conf/, but for objects handed to it."""
    import inspect

    handed = {"self", "policy", "reward_model", "tokenizer", "policies", "critic", "settings", "annotator", "others"}
    handed |= {"gold_judge", "sample_prompts", "note", "documents", "labels", "task", "calibration", "rankings"}
    for stage in all_stages():
        for data in sorted((CONF / stage / "data").glob("*.yaml")):
            cfg = compose_settings([f"{stage}/data={data.stem}"])
            for node in (cfg[stage].data, cfg[stage].module):
                takes = set(inspect.signature(get_object(node._target_)).parameters) - handed
                takes -= {"special_tokens"} if node is cfg[stage].module else set()  # those of the data
                assert takes <= set(node.keys()), (stage, data.stem, takes - set(node.keys()))
    page = compose_settings([]).label
    assert set(inspect.signature(get_object(page._target_)).parameters) == set(page.keys()) - {"_target_"}


def test_conf_dir_is_the_checkouts():
    assert conf_dir() == Path(__file__).parents[2] / "conf"


def test_a_trainer_has_the_settings_that_do_something_in_its_stage():
    cfg = compose_settings([])
    fitting = {"max_steps", "compile", "activation_checkpointing", "limit_train_batches", "kept_gib"}
    assert fitting | {"accumulate_grad_batches"} <= cfg.sft.trainer.keys()
    assert fitting <= cfg.ppo.trainer.keys() and "accumulate_grad_batches" not in cfg.ppo.trainer
    for stage in ("preference", "evaluate", "few_shot"):
        assert not fitting & cfg[stage].trainer.keys() and cfg[stage].trainer.devices == 1
    with pytest.raises(UserError, match=r"no such setting; it is ppo\.module\.minibatch_size now"):
        compose_settings(["ppo.trainer.accumulate_grad_batches=2"])
    with pytest.raises(UserError, match=r"no such setting; it is evaluate\.data\.limit_held_out now"):
        compose_settings(["evaluate.data.limit=1"])
