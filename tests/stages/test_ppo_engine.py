"""PPO with an engine from outside: weights are handed over before each sampling, log-probs are computed anew.

The server alone is played: a model of transformers', which is made from the folder that vLLM is given, and which knows
no other weights than those that it is handed. Sampling, mapping and hand-over are those of VLLMEngine."""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.models import critic_on_policy, packed_hidden, policy_from_config
from lit_rlhf.models.policy import predicting_positions
from lit_rlhf.rollouts import Sampling, TransformersEngine, VLLMEngine, generate
from lit_rlhf.stages import PreferenceModule


class PlayedLLM:
    """What VLLMEngine calls of ``vllm.LLM``; its log-probs are off by 0.3, as those of other kernels are by less."""

    made: ClassVar = []

    def __init__(self, model, **settings):
        assert settings["load_format"] == "dummy" and settings["logprobs_mode"] == "processed_logprobs"
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.calls, self.handed = [], []
        self.made.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        weights = {name: weight.clone() for name, weight in kwargs["weights_iterator"]}
        self.model.load_state_dict(weights)
        self.calls.append("weights")
        self.handed.append(weights)

    def reset_prefix_cache(self):
        self.calls.append("forget")

    def generate(self, prompts, params, use_tqdm):
        self.calls.append("generate")
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, params)]

    def _one(self, prompt, params):
        sampling = Sampling(params.max_tokens, params.temperature)
        eos_id = self.model.config.eos_token_id
        drawn = generate(self.model, [prompt], sampling, eos_id=eos_id, pad_id=1, seeds=[params.seed])
        tokens, logprobs = drawn.token_lists()[0], drawn.logprobs[0].tolist()
        positions = [{t: SimpleNamespace(logprob=x - 0.3)} for t, x in zip(tokens, logprobs)]
        reason = "stop" if drawn.finished[0] else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=positions, finish_reason=reason)])


@pytest.fixture
def engine(monkeypatch):
    played = ModuleType("vllm")
    played.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    played.LLM, played.SamplingParams = PlayedLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", played)
    monkeypatch.setattr(PlayedLLM, "made", [])
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    return VLLMEngine()


def test_each_rollout_is_sampled_from_the_weights_of_the_last_update(ppo, train, engine):
    module = ppo(engine=engine)
    begun = {name: x.clone() for name, x in module.policy.state_dict().items()}
    train(module, iterations=3)
    [llm] = PlayedLLM.made  # one for all rollouts
    assert llm.calls == ["weights", "forget", "generate"] * 3
    for handed, weights in zip(llm.handed, [begun, *module.policies]):
        assert all(torch.equal(handed[name], weights[name]) for name in weights)
    assert not torch.equal(llm.handed[0]["lm_head.weight"], llm.handed[2]["lm_head.weight"])


def test_log_probs_and_entropy_are_those_of_a_training_pass(ppo, train, engine, logprobs_of):
    module = train(ppo(engine=engine))
    assert module.off[0] < 1e-4  # the first ratio is 1, though the engine's log-probs are off by 0.3
    [entropy], [rollout] = module.logged["ppo/entropy"], module.rollouts
    assert 0 < entropy < 7
    own = train(ppo())
    assert own.logged["ppo/entropy"][0] == pytest.approx(entropy, rel=0.1)  # other answers, the same policy
    assert rollout.old_logprobs[rollout.mask].isfinite().all()


def test_the_reference_engine_keeps_no_states_for_a_critic_on_the_policy(ppo, alone):
    module, batch = alone(ppo(engine=TransformersEngine(), critic=critic_on_policy))
    torch.nn.init.normal_(module.critic.head.weight)
    rollout, statistics = module.collect(batch)
    losses = module.objective.losses(rollout)
    assert losses[2]["ratio"] == pytest.approx(1, abs=1e-4) and statistics["entropy"] > 0
    packed = module.batching.packed(rollout.sequences, rollout.response_mask)
    before, mask = predicting_positions(packed)
    values = module.critic.head(packed_hidden(module.policy, packed)[before[mask]]).squeeze(-1)
    assert_close(rollout.values[mask], values, atol=1e-5, rtol=1e-4)


def test_preferences_are_collected_from_it(policy, tokenizer, world, engine, prompts, fit):
    module = PreferenceModule(policy, tokenizer, None, engine=engine, sampling=Sampling(6), answers_per_prompt=2)
    batch = next(iter(prompts().train_dataloader()))
    rows = module.predict_step(batch, 0)
    assert len(rows) == len(batch.messages)
    assert all(len(set(row["responses"])) == len(row["responses"]) for row in rows)
    [llm] = PlayedLLM.made
    assert llm.calls[:3] == ["weights", "forget", "generate"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_ppo_with_vllm_itself(tokenizer, reward_model_of, ppo, train):
    width = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 128, "initializer_range": 0.1, **width}
    policy = policy_from_config(config, tokenizer)  # its kernels want wide heads
    module = ppo(policy=policy, reward_model=reward_model_of(policy), engine=VLLMEngine(eager=True))
    train(module, iterations=2)
    assert module.off[0] < 1e-4
    assert all(len(rollout) == 8 for rollout in module.rollouts)
