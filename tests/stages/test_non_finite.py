"""NaN and infinity, put into each kind of tensor of each stage: the work ends, tensor and step are named, and the last
good checkpoint stays."""

import math
import re
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rlhf.errors import NotFinite
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import (
    EvaluateModule,
    FewShotModule,
    PreferenceModule,
    WorldEvaluateDataModule,
    WorldFewShotDataModule,
    WorldPreferenceDataModule,
)
from lit_rlhf.stages.preference.annotators import RewardModelAnnotator
from lit_rlhf.training import StopOnNonFinite, make_trainer
from lit_rlhf.training.resuming import LastCheckpoint, RandomState

NUMBERS = [math.nan, math.inf]
STEP = 3  # at which a number comes
POLICY, REFERENCE = "the log-probs of the policy", "the log-probs of the reference"
MODELS = {  # stage -> what is said of a tensor, and the module that puts it out
    "reward": {"the scores": lambda m: m.reward_model.score},
    "dpo": {POLICY: lambda m: m.policy.base_model.norm, REFERENCE: lambda m: m.reference.start.base_model.norm},
    "ppo": {
        "the scores of the reward model": lambda m: m.scorer.reward_model.score,
        "the values of the critic": lambda m: m.critic.head,
        POLICY: lambda m: m.policy.base_model.norm,
        REFERENCE: lambda m: m.reference.start.base_model.norm,
    },
}
TENSORS = [
    (stage, tensor)
    for stage in ("pretrain", "sft", "classify", "reward", "dpo", "ppo")
    for tensor in ("weight", "gradient", "loss", *MODELS.get(stage, ()))
]


class Injected(Callback):
    """Puts a number into a tensor, in step ``at``."""

    def __init__(self, tensor, number, at, of):
        self.tensor, self.number, self.at, self.of, self.step = tensor, number, at, of, 0

    def into(self, tensor):
        """``tensor`` with the number in each row of it, in this step."""
        if self.step != self.at:
            return tensor
        mask = torch.zeros_like(tensor, dtype=torch.bool)
        mask.view(-1, tensor.shape[-1] if tensor.dim() else 1)[:, 0] = True
        return tensor.masked_fill(mask, self.number)

    def on_fit_start(self, trainer, module):
        self.name, self.parameter = next(
            (n, p) for n, p in module.named_parameters() if p.requires_grad and p.dim() == 1 and "norm" in n
        )
        if self.tensor == "gradient":
            self.parameter.register_hook(self.into)
        elif self.tensor == "loss" and hasattr(module, "losses"):
            losses = module.losses
            module.losses = lambda batch: (self.into(losses(batch)[0]), {})
        elif self.tensor == "loss":
            loss = module.loss
            module.loss = lambda *arguments: self.into(loss(*arguments))
        elif self.of is not None:
            self.of(module).register_forward_hook(lambda _, __, said: self.into(said))

    def on_train_batch_start(self, *_):
        self.step += 1

    def on_train_batch_end(self, *_):
        if self.tensor == "weight" and self.step == self.at:
            self.parameter.data = self.into(self.parameter.data)


@pytest.fixture
def diverge(stages, ppo, prompts, tmp_path):
    """(stage, tensor, number, step) -> what is said, and the name of the parameter that it came into."""

    def run(stage, tensor, number, at=STEP):
        if stage == "ppo":
            module, data = ppo(sampling=Sampling(max_new_tokens=6), minibatch_size=8), prompts()
        else:
            module, data = stages[stage]()
        injected = Injected(tensor, number, at, MODELS.get(stage, {}).get(tensor))
        trainer = make_trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, max_epochs=5,
            limit_train_batches=5, limit_val_batches=0,
            callbacks=[StopOnNonFinite(stage), RandomState(), injected, LastCheckpoint(tmp_path / "run", 1)],
        )  # fmt: skip
        data.setup()
        with pytest.raises(NotFinite) as caught:
            trainer.fit(module, datamodule=data)
        return str(caught.value), injected.name

    return run


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("stage", "tensor"), TENSORS)
def test_it_ends_with_its_name_and_step_and_the_last_good_checkpoint(stage, tensor, number, diverge, tmp_path):
    said, parameter = diverge(stage, tensor, number)
    what = {
        "weight": rf"tensor {re.escape(parameter)} holds 1 of \d+ numbers that are NaN or infinite .*; stopped there",
        "gradient": rf"the gradient of 1 parameters is not finite, {re.escape(parameter)} among them; stopped before",
        "loss": rf"the loss is {number}; stopped before the weights changed",
    }.get(tensor, rf"{tensor} hold \d+ of \d+ numbers that are NaN or infinite \(as float32\); stopped before the we")
    assert re.match(rf"{stage}: at step {STEP} {what}", said), said
    last = tmp_path / "run" / "last.ckpt"
    assert said.endswith(f"The last good checkpoint is kept: {last}") and "\n" not in said
    kept = torch.load(last, weights_only=True)
    assert kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == STEP - 1
    trained = [tensor for name, tensor in kept["state_dict"].items() if "progress" not in name]
    assert all(tensor.isfinite().all() for tensor in trained)


def test_no_checkpoint_is_said_to_be_kept_where_there_is_none(diverge, tmp_path):
    for tensor in ("loss", "weight"):
        said, _ = diverge("sft", tensor, math.nan, at=1)
        assert said.endswith("There is no checkpoint yet") and "kept" not in said
    assert not list((tmp_path / "run").glob("*.ckpt"))


@pytest.fixture
def use(world, tokenizer, policy, reward_model, tmp_path):
    """(stage) -> its module, and what uses it with its data."""
    short = Sampling(max_new_tokens=5)

    def make(stage):
        if stage == "few_shot":
            data = WorldFewShotDataModule(world, tokenizer, task="choice", shots=[0], limit_held_out=4, examples=20)
            module, run = FewShotModule(policy, tokenizer), "test"
        elif stage == "evaluate":
            data = WorldEvaluateDataModule(world, tokenizer, limit_held_out=4, batch_size=4, text_documents=2)
            data.setup()
            models = {"sft": (policy, tokenizer)}
            module = EvaluateModule(models, reward_model, **data.for_module(), samples=2, best_of=0, sampling=short)
            run = "test"
        else:
            data = WorldPreferenceDataModule(world, tokenizer, prompts=4, batch_size=4, limit_held_out=2)
            data.setup()
            given = {**data.for_module(), "tokenizer": tokenizer}
            annotator = RewardModelAnnotator(reward_model, tokenizer)
            module, run = PreferenceModule(policy, annotator=annotator, sampling=short, **given), "predict"
        data.setup()
        callbacks = [StopOnNonFinite(stage)]
        trainer = make_trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, callbacks=callbacks
        )
        settings = {"return_predictions": False} if run == "predict" else {"verbose": False}
        return module, partial(getattr(trainer, run), module, datamodule=data, **settings)

    return make


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("stage", "tensor", "what"),
    [
        ("few_shot", "log-probs", "the log-probs of the policy hold"),
        ("few_shot", "weight", "tensor policy.model.norm.weight holds 1 of 32 .*, so the log-probs of the"),
        ("evaluate", "weight", "tensor policies.sft.model.norm.weight holds 1 of 32 .*, so the logits are not finite"),
        ("evaluate", "scores", "the scores of the reward model hold"),
        ("preference", "weight", "tensor policies.sft.model.norm.weight holds 1 of 32 .*, so the logits are"),
        ("preference", "scores", "the scores of the reward model hold"),
    ],
)
def test_stages_that_only_use_models_make_nothing_of_them(stage, tensor, what, number, use, policy, reward_model):
    _, run = use(stage)
    if tensor == "weight":
        policy.base_model.norm.weight.data[0] = number
    else:
        module = policy.base_model.norm if tensor == "log-probs" else reward_model.score
        module.register_forward_hook(lambda _, __, said: said.masked_fill(torch.ones_like(said).cumsum(0) == 1, number))
    with pytest.raises(NotFinite, match=rf"^{stage}: {what}.*; nothing comes of that.*it diverged$"):
        run()
