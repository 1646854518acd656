import copy

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.models import Sampling, policy_from_config
from lit_rlhf.stages import PPOModule, WorldPPODataModule

GPT2_WITH_DROPOUT = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.2,
    "embd_pdrop": 0.2, "attn_pdrop": 0.2,
}  # fmt: skip


class Watched(PPOModule):
    """Keeps the rollouts and, of each update, the largest |ratio - 1| before it."""

    def collect(self, prompts):
        self.prompts, self.rollout = prompts, super().collect(prompts)
        self.rollouts = [*getattr(self, "rollouts", []), self.rollout]
        return self.rollout

    def update(self, minibatch):
        from lit_rlhf.stages.ppo.rollout import pack_on, response_logprobs

        packed = pack_on(minibatch.sequences, self.tokenizer.pad_token_id, self.device)
        with torch.no_grad():
            logprobs = response_logprobs(self.policy, packed, minibatch.lengths, self.sampling.temperature)
        off = ((logprobs - minibatch.old_logprobs).exp() - 1).abs()[minibatch.mask].max().item()
        self.off = [*getattr(self, "off", []), off]
        return super().update(minibatch)


def ppo(policy, reward_model, tokenizer, optimizer, kind=Watched, **settings):
    settings = {"sampling": Sampling(max_new_tokens=8), "minibatch_size": 4, **settings}
    return kind(copy.deepcopy(policy), copy.deepcopy(reward_model), tokenizer, optimizer=optimizer, **settings)


def data_module(world, tokenizer, **settings):
    return WorldPPODataModule(world, tokenizer, **{"prompts": 64, "batch_size": 8, **settings})


@pytest.fixture
def train(world, tokenizer, fit):
    def run(module, iterations=1, **settings):
        fit(module, data_module(world, tokenizer, **settings), max_epochs=1, limit_train_batches=iterations)
        return module

    return run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_has_ratio_1_and_kl_0(policy, reward_model, tokenizer, optimizer, train, temperature):
    sampling = Sampling(max_new_tokens=8, temperature=temperature)
    module = train(ppo(policy, reward_model, tokenizer, optimizer, sampling=sampling))
    prompt_lengths = {len(tokens) for tokens in module.prompts.tokens}
    assert len(prompt_lengths) > 1  # they were padded on the left
    assert module.off[0] < 1e-5
    assert module.off[1] > 1e-4  # after a step it is not 1 any more
    first = module.rollouts[0]
    assert_close(first.old_logprobs, first.ref_logprobs, atol=1e-5, rtol=0)


def test_dropout_is_off_though_the_model_has_it(tokenizer, optimizer, train):
    torch.manual_seed(0)
    policy = policy_from_config(GPT2_WITH_DROPOUT, tokenizer)
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    module = train(ppo(policy, AutoModelForSequenceClassification.from_config(config), tokenizer, optimizer))
    assert module.off[0] < 1e-5
    assert not any(m.training for m in module.modules())


def test_score_reaches_the_last_real_token_only(policy, reward_model, tokenizer, optimizer, train):
    module = train(ppo(policy, reward_model, tokenizer, optimizer, kl_coef=0.3))
    rollout = module.rollouts[0]
    shaped = rollout.rewards + 0.3 * (rollout.old_logprobs - rollout.ref_logprobs)
    for row, mask, sequence in zip(shaped, rollout.mask, rollout.sequences):
        last = int(mask.nonzero().max())
        raw = reward_model(torch.tensor([sequence])).logits.item()
        cut_off = sequence[-1] != tokenizer.eos_token_id
        expected = torch.zeros_like(row)
        expected[last] = raw - cut_off * module.missing_eos_penalty
        assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_score_is_shifted_and_scaled(policy, reward_model, tokenizer, optimizer, train):
    plain = train(ppo(policy, reward_model, tokenizer, optimizer, missing_eos_penalty=0.0))
    reward_model.config.score_shift, reward_model.config.score_std = 2.0, 4.0
    shifted = train(ppo(policy, reward_model, tokenizer, optimizer, missing_eos_penalty=0.0))
    assert_close(shifted.score_first, (plain.score_first + 2) / 4)


def test_sampled_tokens_are_kept(policy, reward_model, tokenizer, optimizer, train):
    module = train(ppo(policy, reward_model, tokenizer, optimizer))
    for sequence, prompt, length in zip(module.rollout.sequences, module.prompts.tokens, module.rollout.lengths):
        assert sequence[: len(prompt)] == prompt
        assert len(sequence) == len(prompt) + length


def test_old_logprobs_and_values_are_those_of_plain_transformers(policy, reward_model, tokenizer, optimizer, train):
    module = train(ppo(policy, reward_model, tokenizer, optimizer, sampling=Sampling(8, temperature=0.7)))
    rollout, policy = module.rollouts[0], policy.eval()
    for i, sequence in enumerate(rollout.sequences):
        n, tokens = int(rollout.lengths[i]), torch.tensor([sequence])
        logprobs = (policy(tokens).logits[0, -n - 1 : -1] / 0.7).log_softmax(-1)
        expected = logprobs.gather(1, tokens[0, -n:, None])[:, 0]
        assert_close(rollout.old_logprobs[i, :n], expected, atol=1e-5, rtol=1e-5)
        hidden = reward_model.model(tokens).last_hidden_state[0, -n - 1 : -1]
        assert_close(rollout.values[i, :n], reward_model.score(hidden)[:, 0], atol=1e-5, rtol=1e-5)


def test_advantages_are_whitened_over_the_whole_rollout(policy, reward_model, tokenizer, optimizer, train):
    rollout = train(ppo(policy, reward_model, tokenizer, optimizer)).rollout
    valid = rollout.advantages[rollout.mask]
    assert_close(valid.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(valid.std(unbiased=False), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert rollout.advantages[~rollout.mask].abs().sum() == 0


def test_reference_and_reward_model_do_not_move_and_are_not_in_checkpoints(
    policy, reward_model, tokenizer, optimizer, train
):
    module = train(ppo(policy, reward_model, tokenizer, optimizer), iterations=2)
    for a, b in zip(module.reference.parameters(), policy.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(module.reward_model.parameters(), reward_model.parameters()):
        assert torch.equal(a, b)
    assert any((a != b).any() for a, b in zip(module.policy.parameters(), policy.parameters()))
    assert {name.split(".")[0] for name in module.state_dict()} >= {"policy", "critic", "iteration"}
    assert not any(name.startswith(("reference", "reward_model")) for name in module.state_dict())


def test_it_learns_what_the_reward_model_likes(policy, reward_model, tokenizer, optimizer, train):
    short = Sampling(max_new_tokens=3)
    module = ppo(
        policy,
        reward_model,
        tokenizer,
        optimizer,
        kind=PPOModule,
        kl_coef=0.0,
        sampling=short,
        ppo_epochs=2,
        minibatch_size=32,
    )
    train(module, iterations=15, batch_size=128)
    assert module.score_last > module.score_first + 0.5


def test_vocabularies_that_differ_are_refused(policy, reward_model, tokenizer, optimizer):
    reward_model.resize_token_embeddings(len(tokenizer) + 5)
    with pytest.raises(UserError, match="vocabulary of"):
        ppo(policy, reward_model, tokenizer, optimizer)


def test_greedy_sampling_is_refused(policy, reward_model, tokenizer, optimizer):
    with pytest.raises(UserError, match="temperature is 0"):
        ppo(policy, reward_model, tokenizer, optimizer, sampling=Sampling(8, temperature=0.0))


def test_iterations_counted_in_the_trainer(policy, reward_model, tokenizer, optimizer, train):
    module = train(ppo(policy, reward_model, tokenizer, optimizer, ppo_epochs=2), iterations=3)
    assert (int(module.iteration), int(module.episodes)) == (3, 24)
    assert len(module.off) == 3 * 2 * 2  # iterations, epochs, minibatches
