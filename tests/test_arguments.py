"""A notebook hears of a value out of its range when it makes an object."""

from functools import partial
from typing import Annotated

import pytest
import torch
from pydantic import Field

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import (
    PPOModule,
    PreferenceModule,
    RewardModule,
    SFTDataModule,
    SFTModule,
    WorldPretrainDataModule,
    WorldRewardDataModule,
)
from lit_rlhf.stages.ppo import GAE, KLPenaltyLoss, MonteCarlo, Scoring

ppo = partial(PPOModule, None, None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Sampling, temperature=-1), r"Sampling\(temperature=-1\): it should be greater than or equal to"),
        (partial(Sampling, 0), r"Sampling\(max_new_tokens=0\): it should be greater than or equal to 1"),
        (partial(Sampling, top_p=float("nan")), r"Sampling\(top_p=nan\): it should be a finite number"),
        (partial(SFTDataModule, "x.jsonl", None, batch_size=0), r"SFTDataModule\(batch_size=0\): it should be"),
        (partial(SFTDataModule, "x.jsonl", None, on_long="drop"), r"on_long='drop'\): it should be 'skip' or 'cut'"),
        (partial(SFTDataModule, "x.jsonl", None, on_bad_record="no"), "it should be 'fail' or 'skip'"),
        (partial(WorldPretrainDataModule, None, None, batch_size=0), r"WorldPretrainDataModule\(batch_size=0\)"),
        (partial(WorldRewardDataModule, "x.jsonl", None, None, batch_size=0), "WorldRewardDataModule"),
        (partial(SFTModule, "org/model", None), r"SFTModule\(policy='org/model'\): it should be an instance of PreTra"),
        (partial(RewardModule, "rm", None), r"RewardModule\(reward_model='rm'\): it should be an instance of PreTra"),
        (partial(PreferenceModule, None, None, None, answers_per_prompt=1), r"answers_per_prompt=1\): it should be gr"),
        (partial(ppo, kl_coef=-1), r"PPOModule\(kl_coef=-1\): it should be greater than or equal to 0"),
        (partial(ppo, advantage="rloo"), r"PPOModule\(advantage='rloo'\): an object was expected, as .*Estimator"),
        (partial(ppo, critic="none"), r"PPOModule\(critic='none'\): it should be callable"),
        (partial(GAE, lam=1.5), r"GAE\(lam=1.5\): it should be less than or equal to 1"),
        (partial(MonteCarlo, baseline="value"), r"MonteCarlo\(baseline='value'\): it should be 'none', 'batch'"),
        (partial(KLPenaltyLoss, beta=-1.0), r"KLPenaltyLoss\(beta=-1.0\)"),
        (partial(Scoring, clip=0), r"Scoring\(clip=0\): it should be greater than 0"),
        (partial(LoRA, r=-1), r"LoRA\(r=-1\): it should be greater than or equal to 0"),
    ],
)
def test_what_a_constructor_does_not_take_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_model_in_the_place_of_a_tokenizer_is_named():
    model = torch.nn.Linear(1, 1)
    said = r"PPOModule\(tokenizer=Linear\(...\)\): a model, where a tokenizer was expected; the arguments are "
    with pytest.raises(UserError, match=said + r"PPOModule\(policy, reward_model, tokenizer\)"):
        PPOModule(None, None, model)
    with pytest.raises(UserError, match=r"SFTModule\(tokenizer=Linear\(...\)\)"):
        SFTModule(None, tokenizer=model)


def test_a_class_of_ones_own_is_checked_by_its_annotations_and_keeps_its_signature():
    class Own(SFTModule):
        def __init__(self, share: Annotated[float, Field(gt=0, le=1)], other=None):
            self.made = share, other

    with pytest.raises(UserError, match=r"Own\(share=2\): it should be less than or equal to 1"):
        Own(2)
    assert Own(0.5, other="anything").made == (0.5, "anything")


def test_what_is_checked_twice_is_made_once():
    made = []

    @checked
    class Kind:
        def __init__(self, number: Annotated[int, Field(ge=1)]):
            made.append(number)

    with pytest.raises(UserError, match="number=0"):
        Kind(0)
    Kind(3)
    assert made == [3]
