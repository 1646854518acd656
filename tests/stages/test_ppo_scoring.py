"""What an answer scores: reward model, functions, and the shape of the sum."""

import itertools
import math
import re
import statistics
import zlib

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.functional import whiten
from lit_rlhf.stages import PPODataModule
from lit_rlhf.stages.ppo import GAE, MonteCarlo, Scoring
from lit_rlhf.stages.ppo.reward_functions import sentiment
from lit_rlhf.stages.ppo.scoring import Scorer
from lit_rlhf.text import pack
from lit_rlhf.text.records import write_jsonl

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "Who?", "What is a mog?")]
RESPONSES = ["the cat", "me", "e e e"]
RECORD = {"answer": ["cat", "me", None], "kind": ["", "", "x"], "finished": [True, False, True]}
FREE = {"missing_eos_penalty": 0.0}


def letters(prompts, responses, **_):
    return [len(r) for r in responses]


def spaces(prompts, responses, **_):
    return [r.count(" ") for r in responses]


@pytest.fixture
def packed(tokenizer):
    sequences = [tokenizer(text)["input_ids"] for text in RESPONSES]
    return pack(sequences, tokenizer.pad_token_id), sequences


@pytest.fixture
def raw(reward_model, packed):
    def score(scoring, model=reward_model):
        return Scorer(model, scoring).raw([packed[0]], PROMPTS, RESPONSES, RECORD).detach()

    return score


@pytest.fixture
def logits(reward_model, packed):
    return torch.cat([reward_model(tensor([s])).logits[:, 0] for s in packed[1]]).detach()


def shaped(scorer, scores, finished=(True, True, True), lengths=(2, 1, 3)):
    return scorer.shape(tensor(scores), tensor(lengths), tensor(finished))


# --------------------------------------------------------------------- who says what


def test_the_reference_scale_divides_and_does_not_move_the_mean(reward_model, raw, logits):
    config = reward_model.config
    config.score_shift, config.score_std, config.score_mean = 2.0, 4.0, 1.5
    # Demonstrations, whose logits average -2, average 0 in either scale.
    assert_close(raw(Scoring()), (logits + 2) / 4)
    assert_close(raw(Scoring(center=True)), (logits + 2 - 1.5) / 4)
    assert_close(raw(Scoring(scale="none")), logits + 2)
    assert_close(raw(Scoring(scale="running")), logits + 2)  # divided later, by what is known then


def test_functions_stand_next_to_the_reward_model_or_in_its_place(raw, logits):
    said, counted = tensor([7.0, 2.0, 5.0]), tensor([1.0, 0.0, 2.0])
    assert_close(raw(Scoring(functions=[letters])), logits + said)
    both = {"functions": [letters, spaces], "weights": [0.5, -2.0]}
    assert_close(raw(Scoring(**both)), logits + 0.5 * said - 2 * counted)
    assert_close(raw(Scoring(**both, reward_model_weight=0.25)), 0.25 * logits + 0.5 * said - 2 * counted)
    assert_close(raw(Scoring(**both, reward_model_weight=0.0)), 0.5 * said - 2 * counted)
    assert_close(raw(Scoring(**both), model=None), 0.5 * said - 2 * counted)


def test_the_scorer_says_who_it_is_and_in_what_it_scores(reward_model):
    def named(model, **settings):
        scorer = Scorer(model, Scoring(**settings))
        return scorer.name, scorer.unit

    assert named(reward_model) == ("reward model", "SFT std")
    assert named(reward_model, scale="none") == ("reward model", "reward units")
    assert named(reward_model, functions=[letters]) == ("reward model and reward function letters", "reward units")
    both = "reward function letters and reward function spaces"
    assert named(None, functions=[letters, spaces]) == (both, "reward units")
    assert named(reward_model, functions=letters, reward_model_weight=0) == ("reward function letters", "reward units")
    assert named(None, functions=letters, scale="running")[1] == "std of all scores"


def test_a_reward_model_without_weight_is_not_asked(reward_model, raw, monkeypatch):
    monkeypatch.setattr(reward_model.model, "forward", lambda **_: pytest.fail("asked"))
    raw(Scoring(functions=[letters], reward_model_weight=0.0))


def test_a_module_of_the_users_own_is_found(tmp_path, monkeypatch, raw, logits):
    (tmp_path / "my_rewards.py").write_text("def brief(prompts, responses, **_):\n    return [1 for _ in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert_close(raw(Scoring(functions=["my_rewards.brief"], weights=[3])), logits + 3)
    assert_close(raw(Scoring(functions="my_rewards.brief", weights=[3])), logits + 3)


def test_functions_get_prompts_answers_and_the_columns_of_their_records(raw):
    seen = {}

    def fn(prompts, responses, answer, finished, **rest):
        seen.update(prompts=prompts, responses=responses, answer=answer, finished=finished, rest=rest)
        return np.array([0.5, 1.5, 2.5])  # any numbers will do

    assert raw(Scoring(functions=[fn], reward_model_weight=0.0)).tolist() == [0.5, 1.5, 2.5]
    assert (seen["prompts"], seen["responses"]) == (PROMPTS, RESPONSES)
    assert {"answer": seen["answer"], "finished": seen["finished"], **seen["rest"]} == RECORD


def test_extra_fields_of_a_file_reach_the_function(tmp_path, ppo, tokenizer, fit):
    rows = [{"prompt": f"Question {i}?", "answer": str(i), "kind": f"k{i % 2}"} for i in range(20)]
    for i in range(0, 20, 4):
        rows[i]["only_here"] = True
    write_jsonl(tmp_path / "p.jsonl", rows)
    calls = []

    def fn(prompts, responses, **record):
        calls.append((prompts, responses, record))
        return [0.0] * len(responses)

    data = PPODataModule(tmp_path / "p.jsonl", tokenizer, batch_size=16, held_out=0.2)
    advantage = {"advantage": MonteCarlo(baseline="others"), "answers_per_prompt": 2}
    fit(ppo(scoring=Scoring(functions=[fn]), **advantage), data, max_epochs=1, limit_train_batches=1)
    prompts, responses, record = calls[0]
    assert set(record) == {"answer", "kind", "finished", "only_here"}
    assert len(prompts) == len(responses) == 32 and {len(column) for column in record.values()} == {32}
    for i, (prompt, answer, kind) in enumerate(zip(prompts, record["answer"], record["kind"])):
        assert prompt[0]["content"] == f"Question {answer}?" and kind == f"k{int(answer) % 2}"
        assert prompt == prompts[i // 2 * 2]  # copies stand next to each other
        assert record["only_here"][i] is (None if int(answer) % 4 else True)
    assert all(isinstance(f, bool) for f in record["finished"])


def test_fields_that_are_called_as_what_the_policy_wrote(tmp_path, ppo, tokenizer, fit):
    said = {"responses": ["a", "b"], "finished": "no", "prompts": 1}
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Question {i}?", **said, "x": i} for i in range(20)])
    calls = []

    def fn(prompts, responses, **record):
        calls.append((responses, record))
        return [0.0] * len(responses)

    for fields in (None, {"given": "responses"}):
        data = PPODataModule(tmp_path / "p.jsonl", tokenizer, batch_size=4, held_out=0.2, fields=fields)
        fit(ppo(scoring=Scoring(functions=[fn])), data, max_epochs=1, limit_train_batches=1)
        nobody, functions = data.notes[:2]
        assert f"nobody reads the fields {'responses, ' * (not fields)}finished, prompts, for reward" in nobody
        assert functions.endswith(f"only reward functions read the field{'s x, responses' if fields else ' x'}")
        responses, record = calls[-1]
        assert all(isinstance(text, str) for text in responses) and {*record["finished"]} <= {True, False}
        assert record.keys() == {"x", "kind", "finished", *(fields or ())}
    assert record["given"] == [["a", "b"]] * len(responses)


@pytest.fixture
def talker(policy, tokenizer):
    """A policy that comes to an end now and then."""
    with torch.no_grad():
        policy.get_output_embeddings().weight[tokenizer.eos_token_id].mul_(4)
    return policy


def test_functions_see_whether_an_answer_ended(talker, ppo, train, tokenizer):
    seen = []

    def fn(prompts, responses, finished, kind, **_):
        seen.extend(finished)
        assert all(kind)  # the world says what sort of question each is
        return [0.0] * len(responses)

    rollout = train(ppo(talker, scoring=Scoring(functions=[fn])), batch_size=16).rollouts[0]
    assert seen == [s[-1] == tokenizer.eos_token_id for s in rollout.sequences]
    assert len(set(seen)) == 2


# ----------------------------------------------------------------- what becomes of it


def test_clip_comes_before_penalties():
    scorer = Scorer(None, Scoring(functions=[letters], clip=2.0, missing_eos_penalty=0.5, length_penalty=0.1))
    scores = shaped(scorer, [5.0, -7.0, 1.0], finished=[True, False, False])
    assert_close(scores, tensor([2 - 0.2, -2 - 0.5 - 0.1, 1 - 0.5 - 0.3]))


def test_without_settings_only_the_cut_off_pay():
    scorer = Scorer(None, Scoring(functions=[letters]))
    assert_close(shaped(scorer, [5.0, -7.0, 1.0], finished=[True, False, True]), tensor([5.0, -8.0, 1.0]))


@pytest.mark.parametrize("center", [False, True])
def test_the_running_scale_is_that_of_all_scores_so_far(center):
    scorer = Scorer(None, Scoring(functions=[letters], scale="running", center=center, **FREE))
    drawn, known = np.random.default_rng(0), []
    for rollout in range(4):
        raw = drawn.normal(3 + rollout, 2.5, size=3)
        known += raw.tolist()
        scorer.observe(tensor(raw, dtype=torch.float32))
        expected = (raw - np.mean(known) * center) / np.std(known)
        assert_close(shaped(scorer, raw.tolist()), tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("same", [0.0, 1.0, 0.1, -123.456])
def test_scores_that_do_not_vary_stay_as_they_are(same):
    """A first rollout in which every answer gets the same: 1 / 0 would be a reward of millions."""
    scorer = Scorer(None, Scoring(functions=[letters], scale="running", **FREE))
    scorer.observe(torch.full((64,), same))
    assert_close(shaped(scorer, [same] * 3), torch.full((3,), same))


def test_the_running_scale_is_resumed():
    settings = Scoring(functions=[letters], scale="running", **FREE)
    one, two = Scorer(None, settings), Scorer(None, settings)
    one.observe(torch.randn(8) * 3 + 1)
    two.load_state_dict(one.state_dict())
    for scorer in (one, two):
        scorer.observe(tensor([4.0, 9.0]))
    assert torch.equal(shaped(one, [1.0, 2.0, 3.0]), shaped(two, [1.0, 2.0, 3.0]))


def test_a_run_of_rollouts_by_numpy(ppo, train):
    kept = []

    def fn(prompts, responses, **_):
        kept.append([len(r) / 3 + (r[:1] == "e") for r in responses])
        return kept[-1]

    scoring = Scoring(functions=[fn], reward_model_weight=0.0, scale="running", center=True, clip=1.5, **FREE)
    module = train(ppo(scoring=scoring, kl_coef=0.0), iterations=3)
    for i, rollout in enumerate(module.rollouts):
        known = np.concatenate(kept[: i + 1])
        expected = np.clip((np.array(kept[i]) - known.mean()) / known.std(), -1.5, 1.5)
        assert_close(rollout.rewards.sum(-1), tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-4)
        assert module.logged["ppo/score"][i] == pytest.approx(expected.mean(), abs=1e-5)
        assert module.logged["ppo/score_std"][i] == pytest.approx(expected.std(), abs=1e-5)
    assert module.state_dict()["scorer.count"] == 24


def test_length_and_missing_end_cost_in_a_rollout(talker, ppo, train, tokenizer):
    scoring = Scoring(functions=[letters], weights=[0.0], reward_model_weight=0.0, length_penalty=0.1)
    rollout = train(ppo(talker, scoring=scoring, kl_coef=0.0), batch_size=16).rollouts[0]
    for row, sequence, n in zip(rollout.rewards, rollout.sequences, rollout.lengths.tolist()):
        expected = -0.1 * n - (sequence[-1] != tokenizer.eos_token_id)
        assert_close(row.sum(), tensor(expected))
    assert len(set(rollout.lengths.tolist())) > 1


@pytest.mark.parametrize("scale", ["reference", "running"])
def test_validation_scores_policy_and_sft_model_alike_though_the_scale_runs(scale, ppo, prompts, fit):
    """Without a judge the score decides; what the SFT model got in an earlier validation had another scale."""
    scoring = Scoring(functions=[letters], weights=[3.0], scale=scale)
    module, data = ppo(scoring=scoring, val_samples=2), prompts()
    fit(module, data, max_epochs=1, limit_train_batches=4, val_check_interval=1)
    with torch.no_grad():  # back to the start: what it writes is what the SFT model wrote
        for mine, start in zip(module.policy.parameters(), module.reference.start.parameters()):
            mine.copy_(start)
    module.trainer.validate(module, datamodule=data, verbose=False)
    assert module.figures()["win_rate"]["mean"] == pytest.approx(0.5)
    assert module.figures()["win_rate"]["judge"] == "reward model and reward function letters (proxy)"


# --------------------------------------------------------------- nothing to say


def every(n, said=1.0):
    """A function that says something of every ``n``-th answer."""

    def function(prompts, responses, **_):
        return [said * (len(r) + i) if i % n == 0 else None for i, r in enumerate(responses)]

    return function


def test_none_is_no_score(raw, logits):
    known, nan = tensor([7.0, math.nan, 7.0]), math.nan
    assert_close(raw(Scoring(functions=[every(2)]), model=None), known, equal_nan=True)
    assert_close(raw(Scoring(functions=[every(2), spaces]), model=None), tensor([7.0 + 1, 0.0, 7.0 + 2]))
    assert_close(raw(Scoring(functions=[every(2)], weights=[2.0])), logits + tensor([14.0, 0.0, 14.0]))
    scorer = Scorer(None, Scoring(functions=[letters], scale="running", center=True, clip=9.0, length_penalty=0.5))
    scorer.observe(tensor([1.0, nan, 3.0]))
    assert scorer.count == 2 and scorer.total == 4
    said = scorer.shape(tensor([1.0, nan, 3.0]), tensor([2, 2, 2]), tensor([True, False, False]))
    assert_close(said, tensor([-1.0 - 1, nan, 1.0 - 1 - 1]), equal_nan=True)


@pytest.mark.parametrize(
    "advantage",
    [GAE(), MonteCarlo(), MonteCarlo(baseline="batch"), MonteCarlo(baseline="others"),
     MonteCarlo(baseline="prompt", divide_by_std=True)],
    ids=["gae", "reinforce", "batch", "rloo", "grpo"],
)  # fmt: skip
@pytest.mark.parametrize("action", ["token", "answer"])
def test_an_unscored_answer_is_as_if_it_had_not_been_drawn(advantage, action, ppo, alone):
    """Advantages, losses and gradients are those of a batch without it, whatever it says."""

    def two_of_three(prompts, responses, **_):
        return [None if i % 3 == 1 else float(len(r) % 7) for i, r in enumerate(responses)]

    scoring = Scoring(functions=[two_of_three], reward_model_weight=0.0, **FREE)
    module, batch = alone(ppo(advantage=advantage, action=action, scoring=scoring, answers_per_prompt=3))
    rollout, _ = module.collect(batch)
    kept = torch.arange(len(rollout)) % 3 != 1
    assert torch.equal(rollout.mask.any(-1), kept) and (rollout.advantages[~kept] == 0).all()
    rest = rollout.select(kept.nonzero()[:, 0])
    again, _ = advantage(rest.rewards, rest.values, rest.mask, 2)
    assert_close(rest.advantages, whiten(again, rest.mask))
    losses = [module.objective.losses(r)[:2] for r in (rollout, rest)]
    assert_close(losses[0], losses[1])
    gradients = [
        torch.autograd.grad(sum(pair), module.policy.parameters(), allow_unused=True, materialize_grads=True)
        for pair in losses
    ]
    assert_close(gradients[0], gradients[1])


def test_an_answer_without_another_scored_one_is_not_compared(ppo, alone):
    scoring = Scoring(functions=[lambda p, r, **_: [1.0, *[None] * (len(r) - 3), 2.0, 3.0]], reward_model_weight=0.0)
    module, batch = alone(ppo(advantage=MonteCarlo(baseline="others"), scoring=scoring, answers_per_prompt=2))
    assert module.collect(batch)[0].mask.any(-1).nonzero()[:, 0].tolist() == [14, 15]  # 8 prompts


def test_rollouts_without_a_score_take_no_step_and_say_so(ppo, train, capsys):
    calls = itertools.count()

    def sometimes(prompts, responses, **_):
        silent = next(calls) == 0
        return [None if silent or i == 0 else float(len(r)) for i, r in enumerate(responses)]

    scoring = Scoring(functions=[sometimes], reward_model_weight=0.0, **FREE)
    module = train(ppo(scoring=scoring), iterations=2)
    assert module.trainer.global_step == 2  # 8 answers in minibatches of 4, of the second iteration alone
    assert "iteration 1 has no scored answer to learn from, so no step was taken" in capsys.readouterr().out
    assert module.logged["ppo/unscored"] == [1.0, 1 / 8]
    assert math.isnan(module.logged["ppo/score"][0]) and math.isfinite(module.logged["ppo/score"][1])
    lengths = module.rollouts[1].rewards
    assert module.progress.unscored == 9 and math.isfinite(lengths.sum())
    progress = module.progress
    assert progress.score_first.item() == progress.score_last.item() == module.logged["ppo/score"][1]
    silent = Scoring(functions=[lambda p, r, **_: [None] * len(r)], reward_model_weight=0.0)
    module = ppo(scoring=silent)
    with pytest.raises(UserError, match="no answer of any rollout has a score, so nothing was learned"):
        train(module)
    progress = module.progress
    assert progress.unscored == 8 and progress.score_first.isnan() and progress.score_last.isnan()


def test_the_held_out_scores_of_the_sft_model_are_the_policys_before_its_first_step(ppo, prompts, fit):
    scores = []

    def length(prompts, responses, **record):
        scores.extend(float(len(response)) for response in responses)
        return scores[-len(responses) :]

    scoring = Scoring(functions=[length], reward_model_weight=0.0, scale="none", **FREE)
    module, data = ppo(scoring=scoring, val_samples=2), prompts()
    fit(module, data, max_epochs=1, limit_train_batches=1)
    module.policy.load_state_dict(module.reference.start.state_dict())
    scores.clear(), module.held_out._reference.clear()
    module.trainer.validate(module, datamodule=data, verbose=False)
    figures, half = module.figures(), len(scores) // 2
    assert scores[:half] == scores[half:]
    assert figures["val_score"] == figures["val_sft_score"] == pytest.approx(statistics.fmean(scores[:half]))
    assert figures["val_sft_score_std"] == pytest.approx(statistics.pstdev(scores[:half]))


def test_validation_leaves_out_what_nobody_scored(ppo, prompts, fit):
    def half(prompts, responses, **_):
        return [float(len(r)) if i % 2 else None for i, r in enumerate(responses)]

    module, data = ppo(scoring=Scoring(functions=[half], reward_model_weight=0.0), val_samples=2), prompts()
    fit(module, data, max_epochs=1, limit_train_batches=1)
    module.trainer.validate(module, datamodule=data, verbose=False)
    figures = module.figures()
    assert figures["win_rate"]["n"] == 6 and figures["unscored"] == 4 and math.isfinite(figures["val_score"])
    assert math.isfinite(figures["val_sft_score"]) and figures["val_sft_score_std"] >= 0
    module.scorer.scoring = Scoring(functions=[lambda p, r, **_: [None] * len(r)], reward_model_weight=0.0)
    module.held_out._reference.clear()
    module.trainer.validate(module, datamodule=data, verbose=False)
    nothing = module.figures()
    assert nothing["win_rate"] is None and nothing["val_score"] is None and nothing["val_sft_score"] is None


# ------------------------------------------------------------------------- mistakes


def failing(prompts, responses, **_):
    return [1 / (len(r) - 2) for r in responses]  # fails on "me"


FAULTS = {
    "raises": (failing, "function failing raised ZeroDivisionError: .* on the prompt 'Who.*' and the answer 'me' "),
    "too few": (lambda p, r, **_: [1.0], "returned 1 scores for 3 answers; one each was expected, a number or"),
    "nan": (lambda p, r, **_: [1.0, 2.0, math.nan], "returned nan, not a finite number, for the prompt 'What is a mog"),
    "infinite": (lambda p, r, **_: [math.inf, 2.0, 1.0], r"returned inf.* 'Hi' and the answer 'the cat' \(1 of 3\)"),
    "no numbers": (lambda p, r, **_: ["a", "b", "c"], "ValueError: could not convert string to float: 'a'"),
    "none": (lambda p, r, **_: None, "TypeError: 'NoneType' object is not iterable"),
    "takes no record": (lambda p, r: [0.0] * 3, "TypeError: .* unexpected keyword argument"),
    "fails on all together": (lambda p, r, **_: [0.0] if len(r) == 1 else 1 / 0, r"'the cat' \(1 of 3\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_function_that_fails_is_named_with_prompt_and_answer(fault, raw):
    function, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        raw(Scoring(functions=[letters, function]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": ["no_such_module.f"]}, "'no_such_module.f' is no function (No module named 'no_such_module'"),
        ({"functions": ["math.no_such"]}, "'math.no_such' is no function"),
        ({"functions": ["nothing"]}, "'nothing' is no function"),
        ({"functions": [7]}, "7 is no function"),
        ({"functions": ["math.pi"]}, "'math.pi' is a float, not a function"),
        ({"functions": [letters], "weights": [1.0, 2.0]}, "weights (ppo.scoring) has 2 entries for 1 functions"),
        ({"weights": [1.0]}, "weights (ppo.scoring) has 1 entries for 0 functions"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Scoring(**settings)


def test_someone_must_score(reward_model):
    with pytest.raises(UserError, match="nothing scores the answers: give a reward model, or functions"):
        Scorer(None, Scoring())
    with pytest.raises(UserError, match="nothing scores the answers"):  # a weight of 0 is nobody, too
        Scorer(reward_model, Scoring(reward_model_weight=0.0))


def test_policy_and_sft_model_tie_where_they_write_the_same(ppo, prompts, fit):
    calls = itertools.count()

    def noisy(prompts, responses, **_):  # no two calls agree in the last bits; no two texts score alike
        return [zlib.crc32(r.encode()) % 10**4 + 1e-5 * next(calls) for r in responses]

    module = ppo(scoring=Scoring(functions=[noisy], reward_model_weight=0.0), val_samples=2)
    data = prompts()
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).validate(
        module, datamodule=data, verbose=False
    )
    assert module.held_out.wins.mean == 0.5 and module.held_out.wins.n == 6 * 2


def test_sentiment_scores_words_of_praise_above_none_above_words_of_blame():
    pytest.importorskip("vaderSentiment", reason="the sentiment reward is an extra: pip install -e '.[sentiment]'")
    texts = ["What a wonderful day, I love it!", "The table is in the room.", "This is a terrible, ugly mess."]
    good, none, bad = sentiment([[]] * 3, texts)
    assert 1 >= good > 0.5 and none == 0 and -1 <= bad < -0.5
