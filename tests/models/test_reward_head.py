"""Heads other than the plain one, each against arithmetic on the hidden states of one sequence alone."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.models import (
    LoRA,
    RewardHead,
    critic_from_reward_model,
    load_reward_model,
    next_token_logits,
    policy_from_config,
    reward_model_from_config,
    save_model,
    score_answers,
)
from lit_rlhf.models.heads import head_parameters, kept_language_model, packed_scores
from lit_rlhf.models.policy import predicting_positions, shares_prompts
from lit_rlhf.models.reward_head import RewardEnsemble, RewardTransformer, score_scale, start_head
from lit_rlhf.text import ensure_chat_template, pack
from lit_rlhf.training import adamw
from lit_rlhf.training.optim import decay_groups

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "granite": {**SHAPE, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "tie_word_embeddings": True},
    "gemma2": {**SHAPE, "final_logit_softcapping": 5.0, "head_dim": 8, "num_key_value_heads": 2},
    "cohere": {**SHAPE, "logit_scale": 0.25},
    "phi": SHAPE,
}
PROMPTS = ["What is 42?", "I am", "Who are you? You are 12", "It"]
ANSWERS = ["I am the cat", "12", "You are  30, the cat! Who?", "is 42"]
HEADS = [RewardHead(k, p) for k, p in product(("linear", "mlp", "likelihood"), ("last", "mean", "answer", "token"))]
NOT_PLAIN = HEADS[1:]


def named(head):
    return f"{head.kind}-{head.pooling}"


def stirred(model):
    """Every weight of the head away from its beginning."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith("score.") and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def saved_policy(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def reward_model_with(saved_policy, tokenizer):
    return lambda head: stirred(load_reward_model(saved_policy, tokenizer, new_head=True, head=head))


def batch(tokenizer, padded=False, keep=slice(None)):
    prompts, answers = (tokenizer(texts)["input_ids"] for texts in (PROMPTS[keep], ANSWERS[keep]))
    answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    sequences = [p + a for p, a in zip(prompts, answers)]
    return pack(sequences, tokenizer.pad_token_id, [len(a) for a in answers], padded=padded), sequences


def read(score, x):
    if score.spec.kind != "mlp":
        return score.read.weight[0] @ x
    first, _, last = score.read
    return last.weight[0] @ gelu(first.weight @ x + first.bias)


def by_hand(model, policy, tokens, answer_length):
    """The score of one sequence, alone and without our packing."""
    spec, ids = model.score.spec, torch.tensor([tokens])
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    pooled = {"mean": hidden.mean(0), "answer": hidden[-answer_length:].mean(0)}.get(spec.pooling, hidden[-1])
    if spec.pooling == "token":
        embedded = torch.cat([model.get_input_embeddings()(ids), model.score.token[None, None]], 1)
        pooled = model.base_model(inputs_embeds=embedded).last_hidden_state[0, -1]
    score = read(model.score, pooled)
    if spec.kind == "likelihood":
        logprobs = policy(input_ids=ids).logits[0].log_softmax(-1)  # by plain transformers, normalized
        for place in range(len(tokens) - answer_length, len(tokens)):
            gate = torch.sigmoid(model.score.gate.weight[0] @ hidden[place - 1] + model.score.gate.bias[0])
            score = score + gate * (logprobs[place - 1, tokens[place]] - logprobs[place - 1].max())
    return score


@pytest.mark.parametrize("head", HEADS, ids=named)
@torch.no_grad()
def test_scores_packed_padded_and_alone_are_those_by_hand(head, reward_model_with, saved_policy, tokenizer):
    model, policy = reward_model_with(head), AutoModelForCausalLM.from_pretrained(saved_policy)
    together, sequences = batch(tokenizer)
    if head.plain:
        expected = torch.stack(
            [model.score.weight[0] @ model.base_model(torch.tensor([s])).last_hidden_state[0, -1] for s in sequences]
        )
    else:
        lengths = together.response_lengths.tolist()
        expected = torch.stack([by_hand(model, policy, s, n) for s, n in zip(sequences, lengths)])
    assert expected.std() > 0.1
    assert_close(packed_scores(model, together), expected, rtol=1e-4, atol=1e-4)
    assert_close(packed_scores(model, batch(tokenizer, padded=True)[0]), expected, rtol=1e-4, atol=1e-4)
    for i in range(len(sequences)):
        alone = packed_scores(model, batch(tokenizer, keep=slice(i, i + 1))[0])
        assert_close(alone[0], expected[i], rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["granite", "cohere", "gemma2", "phi"])
def other_logits(request, tokenizer, tmp_path):
    """A family whose logits are more than a matrix times hidden states, in a folder; and the model as it was saved."""
    torch.manual_seed(0)
    model = policy_from_config({"model_type": request.param, **FAMILIES[request.param]}, tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    save_model(model, tokenizer, tmp_path / "lm")
    return tmp_path / "lm", AutoModelForCausalLM.from_pretrained(tmp_path / "lm")


@torch.no_grad()
def test_likelihoods_are_by_the_models_own_logits(other_logits, tokenizer, tmp_path):
    folder, policy = other_logits
    model = stirred(load_reward_model(folder, tokenizer, new_head=True, head=RewardHead("likelihood")))
    together, sequences = batch(tokenizer)
    expected = [by_hand(model, policy, s, n) for s, n in zip(sequences, together.response_lengths.tolist())]
    assert_close(packed_scores(model, together), torch.stack(expected), rtol=1e-4, atol=1e-4)
    save_model(model, tokenizer, tmp_path / "model")
    again = load_reward_model(tmp_path / "model", tokenizer).eval()
    assert_close(packed_scores(again, together), torch.stack(expected), rtol=1e-4, atol=1e-4)
    critic = critic_from_reward_model(policy, model).eval()
    assert_close(critic(together, together.ends, None), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_reward_model_keeps_the_models_own_logits(other_logits, tokenizer):
    folder, policy = other_logits
    model = load_reward_model(folder, tokenizer, new_head=True, head=RewardHead("mlp")).eval()
    ids = torch.tensor(batch(tokenizer)[1][:1])
    if policy.config.model_type == "phi":  # its output embedding is one of its own, and has a bias
        with pytest.raises(UserError, match="its output embedding is not its input embedding"):
            kept_language_model(model)
        model.config.tie_word_embeddings = True
        with pytest.raises(UserError, match=r"PhiForCausalLM: its logits cannot be had.*lacks their bias"):
            kept_language_model(model)
        return
    language = kept_language_model(model)
    assert_close(language(input_ids=ids).logits, policy(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    found = next_token_logits(language, model.base_model(input_ids=ids).last_hidden_state)
    assert_close(found, policy(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    found[0, -1].logsumexp(0).backward()
    policy(input_ids=ids).logits[0, -1].logsumexp(0).backward()
    slopes = model.get_input_embeddings().weight.grad, policy.get_input_embeddings().weight.grad
    assert_close(*slopes, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.score.parameters())


@pytest.mark.parametrize("head", NOT_PLAIN, ids=named)
@torch.no_grad()
def test_what_is_saved_loads_here_and_not_as_a_classifier(head, reward_model_with, tokenizer, tmp_path):
    model, together = reward_model_with(head), batch(tokenizer)[0]
    model.config.score_shift, model.config.score_std = -1.25, 0.5
    save_model(model, tokenizer, tmp_path / "model")
    loaded = load_reward_model(tmp_path / "model", tokenizer).eval()
    assert_close(packed_scores(loaded, together), packed_scores(model, together))
    assert score_scale(loaded)[::2] == (-1.25, 0.5)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["head"] == {"kind": head.kind, "pooling": head.pooling} and settings["score_shift"] == -1.25
    with pytest.raises(ValueError, match="lit_rlhf_reward"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    with pytest.raises(UserError, match=r"reward\.head asks for linear"):
        load_reward_model(tmp_path / "model", tokenizer, new_head=True)
    again = load_reward_model(tmp_path / "model", tokenizer, new_head=True, head=head)
    assert_close(packed_scores(again.eval(), together), packed_scores(model, together))


def test_a_model_of_an_older_version_is_read(policy, tmp_path):
    model = RewardTransformer.from_policy(policy, RewardHead("likelihood"))
    model.save_pretrained(tmp_path)
    settings, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    settings["trunk"] = settings.pop("backbone")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({n.replace("backbone.", "trunk."): t for n, t in weights.items()}, tmp_path / "model.safetensors")
    read = RewardTransformer.from_pretrained(tmp_path).state_dict()
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("head", [h for h in NOT_PLAIN if h.pooling != "token"], ids=named)
@torch.no_grad()
def test_a_critic_values_each_beginning_as_the_reward_model_scores_it(head, reward_model_with, policy, tokenizer):
    model, (together, sequences) = reward_model_with(head), batch(tokenizer)
    values = critic_from_reward_model(policy, model)(together, torch.arange(len(together.tokens)), None)
    assert values.shape == (together.tokens.numel(),)
    for start, tokens, n in zip(together.starts.tolist(), sequences, together.response_lengths.tolist()):
        for end in range(len(tokens) - n + 1, len(tokens) + 1):  # answers cut off after each of their tokens
            cut = pack([tokens[:end]], 0, response_lengths=[end - (len(tokens) - n)])
            assert_close(values[start + end - 1], packed_scores(model, cut)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", NOT_PLAIN, ids=named)
def test_every_part_of_a_head_learns(head, reward_model_with, tokenizer):
    model = reward_model_with(head)
    packed_scores(model, batch(tokenizer)[0]).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@torch.no_grad()
def test_a_fresh_likelihood_head_scores_what_the_model_would_have_said_0(saved_policy, tokenizer):
    model = load_reward_model(saved_policy, tokenizer, new_head=True, head=RewardHead("likelihood")).eval()
    policy, tokens = AutoModelForCausalLM.from_pretrained(saved_policy), tokenizer(PROMPTS[0])["input_ids"]
    greedy = list(tokens)
    for _ in range(4):
        greedy.append(int(policy(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    other = [*greedy[:-1], (greedy[-1] + 1) % len(tokenizer)]
    scores = packed_scores(model, pack([greedy, other], tokenizer.pad_token_id, response_lengths=[4, 4]))
    assert scores[0] == 0 and scores[1] < 0


@pytest.mark.parametrize("head", [RewardHead("likelihood"), RewardHead("linear", "answer")], ids=named)
def test_a_head_that_reads_answers_wants_to_know_them(head, reward_model_with, tokenizer):
    with pytest.raises(ValueError, match="pack with response_lengths"):
        packed_scores(reward_model_with(head), pack([[5, 6, 7]], tokenizer.pad_token_id))


@torch.no_grad()
def test_a_sequence_that_fills_the_context_makes_room_for_the_reward_token(reward_model_with, tokenizer):
    model = reward_model_with(RewardHead("linear", "token"))
    full = [5 + i % 40 for i in range(64)]  # of 64 positions
    long, cut = (packed_scores(model, pack([tokens], tokenizer.pad_token_id)) for tokens in (full, full[1:]))
    assert_close(long, cut)


@pytest.mark.parametrize("head", [RewardHead("mlp", "mean"), RewardHead("likelihood")], ids=named)
def test_adapters_are_trained_and_merged(head, saved_policy, tokenizer, tmp_path):
    model = load_reward_model(saved_policy, tokenizer, new_head=True, head=head, lora=LoRA(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or name.startswith("score.") for name in trained)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    stirred(model)
    with torch.no_grad():
        expected = packed_scores(model, batch(tokenizer)[0])
        save_model(model, tokenizer, tmp_path / "model")
        loaded = load_reward_model(tmp_path / "model", tokenizer).eval()
        scale = expected.abs().max().item()
        assert_close(packed_scores(loaded, batch(tokenizer)[0]), expected, rtol=0, atol=1e-5 * scale)


def test_a_model_from_a_config_gets_any_head(model_config, tokenizer):
    for head in NOT_PLAIN:
        scores = packed_scores(reward_model_from_config(model_config, tokenizer, head).eval(), batch(tokenizer)[0])
        assert (scores <= 0).all() and (head.kind == "likelihood") == bool(scores.any())  # fresh heads score 0


@pytest.mark.parametrize(("combine", "expected"), [("mean", [0.25, 1.0]), ("worst", [-1.0, 0.0])])
def test_an_ensemble_by_hand(combine, expected, reward_model_with, tokenizer):
    # (raw + shift) / std: [0.5, 1] + 1 over 1 is [1.5, 2]; [-2, 0] over 2 is [-1, 0]
    members = [reward_model_with(RewardHead("mlp")) for _ in range(2)]
    for member, (shift, std) in zip(members, [(1.0, 1.0), (0.0, 2.0)]):
        member.config.score_shift, member.config.score_std = shift, std
    members[0].scores_and_hidden = lambda batch: (torch.tensor([0.5, 1.0]), torch.zeros(0, 1))
    members[1].scores_and_hidden = lambda batch: (torch.tensor([-2.0, 0.0]), torch.zeros(0, 1))
    ensemble = RewardEnsemble(members, combine)
    assert_close(packed_scores(ensemble, batch(tokenizer)[0]), torch.tensor(expected))
    assert score_scale(ensemble)[::2] == (0.0, 1.0)


@torch.no_grad()
def test_an_ensemble_of_folders_scores_by_its_worst_member(reward_model_with, policy, tokenizer, tmp_path):
    folders, together = [tmp_path / "a", tmp_path / "b"], batch(tokenizer)[0]
    for folder, head in zip(folders, (RewardHead(), RewardHead("mlp", "mean"))):
        save_model(reward_model_with(head), tokenizer, folder)
    single = torch.stack([packed_scores(load_reward_model(f, tokenizer).eval(), together) for f in folders])
    ensemble = load_reward_model([str(f) for f in folders], tokenizer, combine="worst").eval()
    assert_close(packed_scores(ensemble, together), single.min(0).values)
    critic = critic_from_reward_model(policy, ensemble)
    assert_close(critic(together, together.ends, None), single[0])  # its first member


@torch.no_grad()
def test_texts_are_scored_as_the_data_module_lays_them_out(reward_model_with, tokenizer):
    ensure_chat_template(tokenizer)
    model = reward_model_with(RewardHead("likelihood", "mean"))
    model.config.score_shift = 2.0
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    with pytest.raises(ValueError, match=f"1 prompts and {len(ANSWERS)} responses: one for each was expected"):
        score_answers(model, tokenizer, prompts[:1], ANSWERS)
    scores = score_answers(model, tokenizer, prompts, ANSWERS, batch_size=3)
    for prompt, answer, score in zip(prompts, ANSWERS, scores):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], return_dict=False)
        packed = pack([whole], tokenizer.pad_token_id, response_lengths=[len(whole) - len(before)])
        assert_close(score, packed_scores(model, packed)[0] + 2.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("head", HEADS, ids=named)
def test_a_shared_prompt_changes_neither_scores_nor_gradients(head, kind, reward_model_with, policy, tokenizer):
    model = reward_model_with(head).double()
    model.base_model.set_attn_implementation(kind)
    prompts = [tokenizer(PROMPTS[i])["input_ids"] for i in (0, 0, 2, 0, 2, 3)]
    answers = [tokenizer(text)["input_ids"] for text in (*ANSWERS, "cat? 42", "You")]
    sequences, lengths = [p + a for p, a in zip(prompts, answers)], [len(a) for a in answers]
    weights = torch.linspace(-1, 1, len(sequences), dtype=torch.float64)
    found = []
    for share in (False, True):
        rows = pack(sequences, tokenizer.pad_token_id, lengths, share_prompts=share)
        scores = packed_scores(model, rows)
        critic = critic_from_reward_model(policy.double(), model)
        at = predicting_positions(rows, rows.response_lengths)[0]
        before = critic(rows, at.flatten(), None).view(at.shape)
        model.zero_grad()
        (weights @ scores).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((rows.tokens.numel(), scores.detach(), before[response_mask(rows)].detach(), gradients))
    apart, shared = found
    assert shared[0] < apart[0]
    exact = 1e-9 if model.config.model_type == "gpt2" else 1e-5  # transformers' RMSNorm is float32 throughout
    for one, other in zip(apart[1:3], shared[1:3]):
        assert_close(other, one, rtol=0, atol=exact)
    for one, other in zip(apart[3], shared[3], strict=True):
        assert_close(other, one, rtol=0, atol=100 * exact)


def response_mask(rows):
    return predicting_positions(rows, rows.response_lengths)[1]


def test_attention_that_takes_no_mask_reads_prompts_anew_and_says_so(reward_model_with, tokenizer, capsys):
    model = reward_model_with(RewardHead())
    rows = pack([[7, 8, 9], [7, 8, 6, 5]], 1, [1, 2], share_prompts=True)
    expected = packed_scores(model, rows)
    model.base_model.set_attn_implementation("eager")
    assert not shares_prompts(model)
    assert "share_prompts is off" in capsys.readouterr().out
    assert_close(packed_scores(model, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp", "likelihood"])
def test_a_fresh_head_starts_at_zero_or_normal(kind, policy, tokenizer, tmp_path):
    """Normal: standard deviation 1 / sqrt(width + 1) (arXiv:2009.01325); its start is no part of what a head is."""
    save_model(policy, tokenizer, tmp_path / "model")
    for start in ("zero", "normal"):
        head = RewardHead(kind, start=start)
        loaded = load_reward_model(tmp_path / "model", tokenizer, new_head=True, head=head)
        last = getattr(loaded.score, "read", loaded.score)
        assert (last[-1] if kind == "mlp" else last).weight.any() == (start == "normal")
    wide = torch.nn.Linear(9999, 1, bias=False)
    start_head(wide, "normal")
    assert wide.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert RewardHead(kind, start="normal") == RewardHead(kind)


@pytest.mark.parametrize("head", [RewardHead(), RewardHead("mlp", "token"), RewardHead("likelihood")], ids=named)
def test_the_head_has_a_rate_of_its_own_and_all_else_that_of_the_backbone(head, policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path / "model")
    model = load_reward_model(tmp_path / "model", tokenizer, new_head=True, head=head)
    optimizer = adamw(decay_groups(model, head_parameters(model), 1e-2), lr=1e-4, weight_decay=0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        fresh = name.startswith("score.") and "lm_head" not in name
        decayed = 0.1 if parameter.dim() >= 2 else 0.0
        assert rates[id(parameter)] == ((1e-2, 0.0) if fresh else (1e-4, decayed)), name
    assert len(decay_groups(model, head_parameters(model))) == len(decay_groups(model)) == 2
