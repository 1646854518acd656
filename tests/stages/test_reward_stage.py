import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.stages import RewardDataModule, RewardModule
from lit_rlhf.text import write_jsonl

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
    module._trainer = type("T", (), {"optimizers": [type("O", (), {"param_groups": [{"lr": 0.0}]})()]})()
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
    module = RewardModule(reward_model, tokenizer, optimizer=optimizer)
    made = data(demonstrations=tmp_path / "d.jsonl")
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
    module = RewardModule(reward_model, tokenizer, optimizer=optimizer)
    made = data()
    fit(module, made, max_steps=4)
    module.export(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    sequences = [s for item in made.val_set for s in item.sequences]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        with torch.no_grad():
            plain = model(**batch).logits[:, 0]
        assert_close(plain, module.raw_scores(sequences), atol=1e-5, rtol=0)


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
    ranking = data.train_rankings[0]
    assert [m["role"] for m in ranking.prompt] == ["user", "assistant", "user"]
    assert (ranking.responses, ranking.ranks) == (["Yes.", "No."], [1, 2])


def test_long_answers_are_counted(data):
    long = [{"prompt": "word " * 200, "responses": ["a", "b"], "ranks": [1, 2]}, *ROWS]
    made = data(long, max_length=60)
    assert made.long == 2
    assert max(len(s) for item in made.train_set for s in item.sequences) <= 60
    assert data(long, max_length=60, on_long="skip").long == 2
