import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models import RewardHead, load_reward_model, score_answers
from lit_rlhf.models.heads import packed_scores
from lit_rlhf.models.reward_head import RewardEnsemble, RewardTransformer, score_scale
from lit_rlhf.stages import RewardDataModule, RewardModule
from lit_rlhf.stages.rankings import RankedAnswers
from lit_rlhf.stages.reward.diagnosis import diagnosis
from lit_rlhf.text.records import write_jsonl

ROWS = [
    {"prompt": f"Question {i}?", "responses": ["good " * (i % 3 + 1), "bad", "so so"], "ranks": [1, 3, 2]}
    for i in range(40)
]


@pytest.fixture
def data(tmp_path, tokenizer):
    def make(rows=ROWS, **settings):
        write_jsonl(tmp_path / "r.jsonl", rows)
        module = RewardDataModule(tmp_path / "r.jsonl", tokenizer, **{"batch_size": 8, "held_out": 0.2, **settings})
        module.setup()
        return module

    return make


TOOL = {"type": "function", "function": {"name": "multiply"}}
WITH_TOOLS = (
    "{% if tools %}{{ tools[0].function.name }} {% endif %}{% for m in messages %}{% if 'never' in m.content %}"
    "{{ raise_exception('no such word') }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
)


def test_tools_stand_in_front_of_rankings_demonstrations_and_feedback(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "response": "good", "tools": [TOOL]}])
    write_jsonl(tmp_path / "f.jsonl", [{"prompt": "r", "response": "so", "rating": x, "tools": [TOOL]} for x in (1, 1)])
    rows = [{**row, "tools": [TOOL]} for row in ROWS]
    made = data(rows, demonstrations=tmp_path / "d.jsonl", feedback=tmp_path / "f.jsonl")
    sequences = [s for item in [*made.train_set, *made.val_set] for s in item.sequences]
    texts = [tokenizer.decode(s) for s in [*sequences, *(sequence for sequence, _ in made.calibration.demonstrations)]]
    assert len(texts) == 3 * 40 + 1 + 1 and all(text.startswith("multiply ") for text in texts)
    assert not any("nobody reads" in note for note in made.notes)


WITH_CALLS = (
    "{% for m in messages %}{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.a }}>{% endfor %}{{ eos_token }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("cached", [False, True])
def test_calls_and_thoughts_of_answers_go_through_the_template(data, tokenizer, tmp_path, cached, monkeypatch):
    def called(a):
        call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a}}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]

    def thought(text):
        return [{"role": "assistant", "content": "yes", "reasoning_content": text}]

    monkeypatch.setattr(tokenizer, "chat_template", WITH_CALLS)
    rows = [{"prompt": f"q {i}", "chosen": called(i), "rejected": thought("bad")} for i in range(9)]
    rows += [{"prompt": f"r {i}", "chosen": thought("good"), "rejected": thought("bad")} for i in range(9)]
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "response": called(7)}])
    write_jsonl(tmp_path / "f.jsonl", [{"prompt": "s", "completion": called(x), "label": x > 1} for x in (1, 2, 1)])
    cache = tmp_path / "cache" if cached else None
    made = data(rows, demonstrations=tmp_path / "d.jsonl", feedback=tmp_path / "f.jsonl", cache=cache)
    items = [*made.train_set, *made.val_set]
    texts = {tokenizer.decode(s[-n:-1]) for item in items for s, n in zip(item.sequences, item.response_lengths)}
    assert texts == {*(f"<multiply {i}>" for i in range(9)), "(bad)yes", "(good)yes"}
    assert len(items) == 9 + 9 + 1 and not made.notes
    best = data(rows).calibration.demonstrations
    assert {tokenizer.decode(s[-n:-1]) for s, n in best} <= texts - {"(bad)yes"}
    [(tokens, length)] = made.calibration.demonstrations
    assert tokenizer.decode(tokens[-length:-1]) == "<multiply 7>"


@pytest.mark.parametrize("file", ["demonstrations", "feedback"])
def test_what_a_template_refuses_in_other_files_is_named_or_skipped(data, tokenizer, tmp_path, file, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    rows = [{"prompt": f"p {i}", "response": text, "rating": 1} for i, text in enumerate(["good", "never", "fine"])]
    write_jsonl(tmp_path / "o.jsonl", rows)
    with pytest.raises(UserError, match=r"o.jsonl:2: .*refuses the dialogue: no such word.* on_bad_record=skip"):
        data(**{file: tmp_path / "o.jsonl"})
    made = data(**{file: tmp_path / "o.jsonl"}, on_bad_record="skip")
    [line] = made.skipped
    assert "o.jsonl:2: " in line and len(made.calibration.demonstrations) >= 2
    write_jsonl(tmp_path / "o.jsonl", rows[1:2])
    if file == "demonstrations":
        with pytest.raises(UserError, match=r"refuses every demonstration; the first: .*no such word"):
            data(demonstrations=tmp_path / "o.jsonl", on_bad_record="skip")


def test_loss_is_the_mean_over_pairs_by_plain_transformers(data, tokenizer, reward_model, optimizer, fit):
    module = RewardModule(reward_model, tokenizer, optimizer=optimizer)
    torch.nn.init.normal_(reward_model.score.weight)
    made = data()
    loader = made.train_dataloader()
    batch, losses = next(iter(loader)), []
    for i in loader.order(0)[:8]:
        best, worst, middle = (
            reward_model.eval()(torch.tensor([s])).logits.item() for s in made.train_set[i].sequences
        )
        for margin in (best - worst, best - middle, middle - worst):
            losses.append(torch.nn.functional.softplus(torch.tensor(-margin)).item())
    module.log = lambda *_, **__: None
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, optimizers=[optimizer], strategy=None)
    assert_close(module.training_step(batch, 0).item(), sum(losses) / 24, atol=1e-5, rtol=1e-5)


def test_each_answer_is_read_once(data):
    batch = next(iter(data().train_dataloader()))
    assert len(batch.packed.lengths) == 8 * 3  # K passes for K answers


def test_accumulated_micro_batches_equal_a_full_batch(data, tokenizer, reward_model, optimizer, fit):
    tied = [dict(r, ranks=[1, 1, 1]) if i % 5 == 0 else r for i, r in enumerate(ROWS)]
    one, two = (RewardModule(copy.deepcopy(reward_model), tokenizer, optimizer=optimizer) for _ in range(2))
    fit(one, data(tied, batch_size=8), max_steps=3)
    fit(two, data(tied, batch_size=2), max_steps=3, accumulate_grad_batches=4)
    for a, b in zip(one.parameters(), two.parameters()):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_it_learns_the_order_and_demonstrations_average_0(tmp_path, data, tokenizer, reward_model, optimizer, fit):
    demonstrations = [{"prompt": f"Question {i}?", "response": "good"} for i in range(10)]
    write_jsonl(tmp_path / "d.jsonl", demonstrations)
    made = data(demonstrations=tmp_path / "d.jsonl")
    module = RewardModule(reward_model, **made.for_module(), optimizer=optimizer)
    trainer = fit(module, made, max_epochs=8)
    trainer.validate(module, datamodule=made, verbose=False)
    figures = module.figures()
    assert figures["val_accuracy"] == 1.0
    assert figures["gold_accuracy"] is None  # nobody here knows better than the annotator
    module.export(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    scores = []
    for row in demonstrations:
        text = loaded.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}],
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        scores.append(model(**text).logits.item() + model.config.score_shift)
    assert_close(sum(scores) / len(scores), 0.0, atol=1e-5, rtol=0)


def test_plain_transformers_scores_batches_alike(tmp_path, data, tokenizer, reward_model, optimizer, fit):
    made = data()
    module = RewardModule(reward_model, **made.for_module(), optimizer=optimizer)
    fit(module, made, max_steps=4)
    module.export(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    sequences = [s for item in made.val_set for s in item.sequences]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        with torch.no_grad():
            plain = model(**batch).logits[:, 0]
        assert_close(plain + score_scale(module.reward_model).shift, module.scores(sequences), atol=1e-5, rtol=0)


def test_transcripts_as_in_hh_rlhf(tmp_path, tokenizer):
    rows = [
        {
            "chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Yes.",
            "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: No.",
        }
        for i in range(20)
    ]
    write_jsonl(tmp_path / "hh.jsonl", rows)
    data = RewardDataModule(tmp_path / "hh.jsonl", tokenizer, held_out=0.3)
    data.setup()
    ranking = data.train_records[0]
    assert [m["role"] for m in ranking.prompt] == ["user", "assistant", "user"]
    assert (ranking.responses, ranking.ranks) == (["Yes.", "No."], [1, 2])


def test_records_with_long_answers_are_counted(data):
    long = [{"prompt": "word " * 200, "responses": ["a", "b"], "ranks": [1, 2]}, *ROWS]
    made = data(long, max_length=60)
    assert made.long == 1
    assert max(len(s) for item in made.train_set for s in item.sequences) <= 60
    assert data(long, max_length=60, on_long="skip").long == 1


@pytest.mark.parametrize("cached", [False, True])
def test_a_name_that_no_record_has_is_refused(data, tmp_path, cached):
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):  # the second time from the cache
        with pytest.raises(
            UserError, match=r"no record has the field 'stars' that <stage>.data.fields gives for 'rating'; the "
        ):
            data(fields={"rating": "stars"}, cache=cache)
    rated = [{"prompt": "r", "response": text, "stars": stars} for text, stars in (("good", 1), ("bad", 0))]
    write_jsonl(tmp_path / "f.jsonl", rated)
    made = data(feedback=tmp_path / "f.jsonl", fields={"rating": "stars"}, cache=cache)  # one of the files has it
    [ranking] = [r for r in [*made.train_records, *made.val_records] if r.ratings]
    assert ranking.ratings == [1.0, 0.0]
    assert made.notes == [f"{tmp_path / 'f.jsonl'}: ratings are read from 0 (bad) to 1 (good)"]


def test_feedback_alone_is_named(tmp_path, tokenizer):
    write_jsonl(tmp_path / "f.jsonl", [{"prompt": "q", "response": "a", "rating": 1}])
    with pytest.raises(UserError, match=rf"^{tmp_path}/f.jsonl: there is one distinct prompt"):
        RewardDataModule(None, tokenizer, feedback=tmp_path / "f.jsonl").setup()


FEEDBACK = [
    *({"prompt": f"Rated {i}?", "response": f"fine {i}", "rating": 1} for i in range(12)),  # no pair: one by one
    *({"prompt": f"Rated {i + 20}?", "response": "bad", "rating": -1} for i in range(12)),
    *({"prompt": f"Rated {i + 40}?", "response": "ok", "rating": 1} for i in range(6)),
    *({"prompt": f"Rated {i + 40}?", "response": "no", "rating": -1} for i in range(6)),
]  # fmt: skip


@pytest.fixture
def feedback(tmp_path):
    write_jsonl(tmp_path / "feedback.jsonl", FEEDBACK)
    return tmp_path / "feedback.jsonl"


def step(module, batch):
    """The loss and what is logged of one training step, without a trainer."""
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(torch.as_tensor(value).detach())})
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, optimizers=[optimizer], strategy=None)
    return module.training_step(batch, 0), logged


def plain_score(model, tokens):
    return model.eval()(torch.tensor([tokens])).logits.item()


def test_feedback_is_paired_where_it_differs_and_else_learned_one_by_one(data, feedback, tokenizer, reward_model):
    made = data(feedback=feedback, batch_size=64)
    by_prompt = {len(item.ranks): item for item in made.train_set}
    assert set(by_prompt) == {1, 2, 3}  # alone, a pair from feedback, a ranking of three
    batch = next(iter(made.train_dataloader()))
    alone, pairs = [], []
    for item in made.train_set:
        scores = [plain_score(reward_model, tokens) for tokens in item.sequences]
        gaps = [scores[i] - scores[j] for i, a in enumerate(item.ranks) for j, b in enumerate(item.ranks) if a < b]
        if gaps:
            pairs.append(sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps))
        else:
            liked = made.tokenizer.decode(item.sequences[0]).count("fine")
            alone.append(math.log1p(math.exp(-scores[0] if liked else scores[0])))
    loss, logged = step(RewardModule(reward_model, tokenizer, feedback_coef=0.25), batch)
    assert_close(logged["reward/loss"], sum(pairs) / len(pairs), atol=1e-5, rtol=1e-5)
    assert_close(logged["reward/feedback_loss"], sum(alone) / len(alone), atol=1e-5, rtol=1e-5)
    assert_close(loss.item(), sum(pairs) / len(pairs) + 0.25 * sum(alone) / len(alone), atol=1e-5, rtol=1e-5)


def test_feedback_alone_trains_a_model(data, feedback, tokenizer, reward_model, optimizer, fit, tmp_path):
    made = RewardDataModule(None, tokenizer, feedback=feedback, batch_size=8, held_out=0.3)
    module = RewardModule(reward_model, tokenizer, optimizer=optimizer)
    fit(module, made, max_epochs=16)
    liked, disliked = [], []
    for item in made.val_set:
        if len(item.ranks) == 1:
            (liked if item.ratings[0] == 1 else disliked).append(plain_score(reward_model, item.sequences[0]))
    assert liked and disliked and min(liked) > 0 > max(disliked)  # a thumb's sign is the score's
    with pytest.raises(UserError, match="neither path"):
        RewardDataModule(None, tokenizer)


def test_the_loss_of_feedback_alone_is_its_own(tokenizer, reward_model, fit, tmp_path):
    """Of no pair it would be 0, before and after."""
    rows = [{"prompt": f"Is it {i}?", "completion": "Yes." * (1 + i % 2), "label": i % 3 > 0} for i in range(40)]
    write_jsonl(tmp_path / "kto.jsonl", rows)
    made = RewardDataModule(None, tokenizer, feedback=tmp_path / "kto.jsonl", batch_size=8, held_out=0.3)
    module = RewardModule(reward_model, tokenizer)
    [found] = fit(module, made, max_epochs=1).validate(module, made, verbose=False)
    signs = [1 if item.ratings[0] == 1 else -1 for item in made.val_set]
    scores = [plain_score(reward_model, item.sequences[0]) for item in made.val_set]
    losses = [math.log(1 + math.exp(-sign * score)) for sign, score in zip(signs, scores)]
    assert module.figures()["val_pairs"] == 0 and len(set(signs)) == 2
    for name in ("loss", "feedback_loss"):
        assert found[f"val/reward/{name}"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_accumulated_feedback_equals_a_full_batch(data, feedback, tokenizer, reward_model, optimizer, fit):
    one, two = (RewardModule(copy.deepcopy(reward_model), tokenizer, optimizer=optimizer) for _ in range(2))
    fit(one, data(feedback=feedback, batch_size=8), max_steps=3)
    fit(two, data(feedback=feedback, batch_size=2), max_steps=3, accumulate_grad_batches=4)
    for a, b in zip(one.parameters(), two.parameters()):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_what_was_disliked_is_not_imitated(data, feedback, tokenizer, reward_model):
    made = RewardDataModule(None, tokenizer, feedback=feedback, batch_size=32, held_out=0.1)
    made.setup()
    batch = next(iter(made.train_dataloader()))
    learned = tokenizer.decode(batch.packed.tokens[batch.learned])
    assert "fine" in learned and "ok" in learned and "bad" not in learned and "no" not in learned


def test_margin_and_smoothing_reach_the_loss_and_not_the_validation(data, tokenizer, reward_model, optimizer, fit):
    made, losses = data(), {}
    batch = next(iter(made.train_dataloader()))
    for name, settings in {"plain": {}, "margin": {"margin": 2.0}, "smooth": {"label_smoothing": 0.2}}.items():
        losses[name] = step(RewardModule(reward_model.eval(), tokenizer, **settings), batch)[1]["reward/loss"]
    gaps = []
    for i in made.train_dataloader().order(0)[:8]:
        best, worst, middle = (plain_score(reward_model, s) for s in made.train_set[i].sequences)
        gaps += [(best - worst, 2), (best - middle, 1), (middle - worst, 1)]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = {
        "plain": sum(softplus(-gap) for gap, _ in gaps) / 24,
        "margin": sum(softplus(2.0 * apart - gap) for gap, apart in gaps) / 24,
        "smooth": sum(0.8 * softplus(-gap) + 0.2 * softplus(gap) for gap, _ in gaps) / 24,
    }
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, abs=1e-4)
    trainer = fit(RewardModule(reward_model, tokenizer, optimizer=optimizer, margin=2.0), made, max_steps=1)
    trainer.validate(trainer.lightning_module, datamodule=made, verbose=False)
    margins = []
    for item in made.val_set:
        best, worst, middle = (plain_score(reward_model, s) for s in item.sequences)
        margins += [best - worst, best - middle, middle - worst]
    held_out = sum(softplus(-gap) for gap in margins) / len(margins)
    assert trainer.callback_metrics["val/reward/loss"].item() == pytest.approx(held_out, abs=1e-4)


def item(ranks, lengths, kind="", annotator="", gold=None):
    return ranks, lengths, kind, annotator, gold


def held_out(scores, items):
    """All answers of some prompts, as a validation has them."""
    ranks, lengths, kinds, annotators, gold = zip(*items)
    together = [torch.tensor([x for row in rows for x in row]) for rows in (ranks, lengths)]
    owner = torch.tensor([i for i, row in enumerate(ranks) for _ in row])
    grades = None if gold[0] is None else torch.tensor([x for row in gold for x in row])
    return RankedAnswers(scores, together[0], owner, together[1], scores * math.nan, grades, kinds, annotators)


def test_the_diagnosis_by_hand():
    # Six prompts of kind a, by Ann: right, sure of 3/4. Six of kind b, by Bo: wrong, sure of 3/4.
    items = [item([1, 2], [4, 2], "a", "Ann", [5.0, 0.0])] * 6 + [item([2, 1], [3, 3], "b", "Bo", [1.0, 0.0])] * 6
    scores = torch.tensor([math.log(3), 0.0] * 12)
    found = diagnosis(held_out(scores, items))
    assert found["by"]["kind"] == {"a": {"accuracy": 1.0, "pairs": 6}, "b": {"accuracy": 0.0, "pairs": 6}}
    assert found["by"]["annotator"]["Ann"] == {"accuracy": 1.0, "pairs": 6}
    assert found["by"]["gold_kind"]["b"] == {"accuracy": 1.0, "pairs": 6}
    assert found["by"]["distance"] == {}  # all are one rank apart
    assert list(found["by"]["length"]) == ["equal", "longer"]  # double is not more than double
    assert found["calibration"] == [{"predicted": pytest.approx(0.75), "observed": 0.5, "pairs": 12}]
    assert found["calibration_error"] == pytest.approx(0.25) == found["gold_calibration_error"]
    # inside a prompt, lengths 4 and 2 score ln 3 and 0; of 3 and 3, length says nothing: 6 ab / sqrt(6 a² 12 b²)
    assert found["length_correlation"] == pytest.approx(math.sqrt(0.5), abs=1e-3)
    assert found["annotator_length_correlation"] == pytest.approx(math.sqrt(0.5), abs=1e-3)


def test_a_diagnosis_without_a_pair_is_empty():
    assert diagnosis(held_out(torch.zeros(2), [item([1, 1], [2, 2])])) == {}


def test_answers_that_the_gold_judge_grades_alike_say_nothing_by_gold():
    items = [item([1, 2], [4, 2], gold=[3.0, 3.0])] * 3
    found = diagnosis(held_out(torch.tensor([1.0, 0.0] * 3), items))
    assert "gold_calibration_error" not in found and "gold_kind" not in found["by"] and found["calibration_error"] > 0


@pytest.mark.parametrize("head", [RewardHead("mlp", "mean"), RewardHead("linear", "token"), RewardHead("likelihood")])
def test_every_head_learns_the_order_and_loads_again(tmp_path, data, tokenizer, policy, optimizer, fit, head):
    model = RewardTransformer.from_policy(policy, head)
    made = data()
    module = RewardModule(model, **made.for_module(), optimizer=optimizer, lm_coef=0.1)
    trainer = fit(module, made, max_epochs=10)
    trainer.validate(module, datamodule=made, verbose=False)
    assert module.figures()["val_accuracy"] == 1.0
    assert module.lm_coef == 0.1  # the embedding is tied, so there is a language model to keep
    module.export(tmp_path)
    loaded = load_reward_model(tmp_path / "model", tokenizer).eval()
    rankings = made.train_records[:5]
    best = score_answers(loaded, tokenizer, [r.prompt for r in rankings], [r.responses[0] for r in rankings])
    worst = score_answers(loaded, tokenizer, [r.prompt for r in rankings], [r.responses[1] for r in rankings])
    assert (best > worst).all()
    answers = [(d.messages[:-1], d.messages[-1]["content"]) for d in made.answered(made.train_records)]
    scores = score_answers(loaded, tokenizer, [p for p, _ in answers], [a for _, a in answers])
    assert_close(scores.mean().item(), 0.0, atol=1e-4, rtol=0)  # demonstrations average 0


@pytest.mark.parametrize("ensemble", [False, True])
def test_ppo_is_scored_and_valued_by_a_likelihood_head(ensemble, policy, ppo, prompts, train, tokenizer):
    members = [RewardTransformer.from_policy(copy.deepcopy(policy), RewardHead("likelihood")) for _ in range(2)]
    members[1].config.score_std = 2.0
    module = ppo(reward_model=RewardEnsemble(members, "worst") if ensemble else members[0], critic_warmup=0)
    data = prompts()
    train(module, 1, batch_size=8)
    rollout = module.rollouts[0]
    packed = module.batching.packed(rollout.sequences, rollout.response_mask)
    raw = packed_scores(module.scorer.reward_model, packed)
    expected = packed_scores(members[0].eval(), packed)
    assert_close(raw, torch.minimum(expected, expected / 2) if ensemble else expected)
    assert (raw < 0).all() and data.train_prompts
    assert rollout.values.std() > 0  # what the answer's beginning was worth, not the fresh head's 0


def test_shared_prompts_change_neither_loss_nor_gradients(data, tokenizer, reward_model, optimizer):
    module = RewardModule(reward_model.double(), tokenizer, optimizer=optimizer, lm_coef=0.5)
    torch.nn.init.normal_(reward_model.score.weight)
    found = []
    for share in (False, True):
        made = data(share_prompts=share)
        loader = made.train_dataloader()
        batch = loader.collate([3, 8, 12, 20], [3, 8, 12, 20])
        module.zero_grad()
        loss, _ = step(module, batch)
        loss.backward()
        gradients = [p.grad.clone() for p in module.parameters()]
        found.append((batch.packed.tokens.numel(), len(batch.learned), loss, gradients))
    apart, shared = found
    assert shared[0] < 0.8 * apart[0] and shared[1] == apart[1] > 0
    assert_close(shared[2], apart[2], rtol=0, atol=1e-6)
    for one, other in zip(apart[3], shared[3], strict=True):
        assert_close(other, one, rtol=0, atol=1e-5)
