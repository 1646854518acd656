import copy
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, add_lora, load_policy, save_model
from lit_rlhf.stages import ClassifyDataModule, ClassifyModule
from lit_rlhf.stages.classify.module import Predictions
from lit_rlhf.stages.supervised import MeanLoss
from lit_rlhf.text.records import write_jsonl

CLASSES = [{"text": f"{'red blue ' * (i % 3)}{i} {('red', 'blue', 'cat')[i % 3]}?", "label": i % 3} for i in range(60)]
SIMILAR = [
    {"text_a": f"What is {i}?", "text_b": f"Is it {i % 7} or {i}?", "label": ("no", "yes")[i % 2]} for i in range(40)
]
CHOICES = [
    {"context": f"Say {i}.", "choices": [f"It is {j}." for j in range(2 + i % 3)], "label": i % 2} for i in range(40)
]
KINDS = {"classification": CLASSES, "similarity": SIMILAR, "choice": CHOICES}


@pytest.fixture
def data(tmp_path, tokenizer):
    def make(rows, **settings):
        write_jsonl(tmp_path / "l.jsonl", rows)
        own = copy.deepcopy(tokenizer)  # which gets three tokens more
        module = ClassifyDataModule(tmp_path / "l.jsonl", own, **{"batch_size": 8, "held_out": 0.2, **settings})
        module.setup()
        return module

    return make


@pytest.fixture
def module(tmp_path, family, optimizer):
    """(data, settings) -> a module whose model knows the new tokens; the same weights each time."""

    def make(data, policy=family, **settings):
        save_model(policy, data.tokenizer, tmp_path / "base")
        torch.manual_seed(5)
        policy = load_policy(tmp_path / "base", data.tokenizer)
        made = ClassifyModule(policy, **data.for_module(), **{"optimizer": optimizer, **settings})
        made.configure_model()
        made.log = lambda *_, **__: None
        return made

    return make


def plain(module, reading):
    """(last hidden state, mean next-token loss, tokens) of one input, alone, by plain transformers."""
    tokens = torch.tensor([reading])
    out = module.policy(input_ids=tokens, output_hidden_states=True)
    return out.hidden_states[-1][0, -1], cross_entropy(out.logits[0, :-1], tokens[0, 1:]), len(reading) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_plain_transformers(kind, data, module):
    made = data(KINDS[kind])
    classifier = module(made, lm_coef=0.5)
    loader = made.train_dataloader()
    batch = next(iter(loader))
    losses, nats, tokens = [], 0.0, 0
    with torch.no_grad():
        for i in loader.order(0)[:8]:
            example = made.train_set[i]
            states, lm, counts = zip(*(plain(classifier, reading) for reading in example.inputs))
            weight = classifier.head.weight
            logits = torch.stack([s @ weight[0] for s in states]) if kind == "choice" else weight @ sum(states)
            losses.append(-logits.log_softmax(0)[example.label])
            nats, tokens = nats + sum(a * b for a, b in zip(lm, counts)), tokens + sum(counts)
    total, watched = classifier.losses(batch)
    assert_close(watched["classify/loss"].item(), (sum(losses) / 8).item(), atol=1e-4, rtol=1e-4)
    assert_close(watched["classify/lm_loss"].item(), (nats / tokens).item(), atol=1e-4, rtol=1e-4)
    l3 = sum(losses) / 8 + 0.5 * nats / tokens  # L3 = L2 + lambda L1
    assert_close(total.item(), l3.item(), atol=1e-4, rtol=1e-4)


def test_two_similar_texts_have_no_order(data, module):
    made = data(SIMILAR)
    swapped = data([dict(r, text_a=r["text_b"], text_b=r["text_a"]) for r in SIMILAR[:8]] * 5, limit=8, held_out=0.5)
    assert {len(e.inputs) for e in swapped.train_set} == {2}
    classifier = module(made)
    a, b = made.train_set[0].inputs
    batches = [made.collate([made.train_set[0]._replace(inputs=r)], [0], [0]) for r in ([a, b], [b, a])]
    logits = [classifier.logits(classifier.hidden(batch)[0], batch) for batch in batches]
    assert_close(*logits)
    alone = made.collate([made.train_set[0]._replace(inputs=[a])], [0], [0])
    assert not torch.allclose(classifier.logits(classifier.hidden(alone)[0], alone), logits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_micro_batches_equal_a_full_batch(kind, data, module, policy, fit):
    # By plain descent the weights move as far as the gradients say. Adam's first step has the size of the learning rate
    # however small a gradient is: the sign of one that is a rounding error decides.
    descent = partial(torch.optim.SGD, lr=0.1)
    one, two = (module(data(KINDS[kind]), policy, optimizer=descent) for _ in range(2))
    for made, settings in ((one, {"batch_size": 8}), (two, {"batch_size": 2})):
        del made.log  # the trainer's own
        fit(made, data(KINDS[kind], **settings), max_steps=2, accumulate_grad_batches=8 // settings["batch_size"])
    for a, b in zip(one.parameters(), two.parameters()):
        assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_it_learns_what_can_be_told_and_exports_it_whole(data, module, fit, tmp_path):
    made = data(CLASSES)
    classifier = module(made)
    del classifier.log
    trainer = fit(classifier, made, max_epochs=12)
    trainer.validate(classifier, datamodule=made, verbose=False)
    figures = classifier.figures()
    assert figures["accuracy"] == figures["f1"] == 1.0
    assert figures["accuracy_low"] < 0.9 and figures["accuracy_high"] == 1.0
    assert figures["labels"] == ["0", "1", "2"]
    confusion = torch.tensor(figures["confusion"])
    assert confusion.sum() == figures["examples"] == len(made.val_set) and confusion.trace() == confusion.sum()
    assert figures["guessing"] == confusion.diagonal().max().item() / figures["examples"]
    classifier.export(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [row["text"] for row in CLASSES]
    told = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1)  # as anybody would call it
    assert [model.config.id2label[i] for i in told.tolist()] == [str(row["label"]) for row in CLASSES]


def test_figures_by_hand(data, module):
    made = data(CLASSES[:20])
    classifier = module(made)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    batch = made.collate(made.train_set, list(range(6)), list(range(6)))._replace(labels=labels)
    told = torch.tensor([0, 0, 1, 1, 1, 1])
    lm_loss = MeanLoss(torch.tensor(1.0), 1)
    classifier.held_out = [Predictions(torch.eye(3)[told] * 9, labels, batch.example.bincount(), lm_loss)]
    classifier._trainer = SimpleNamespace(callback_metrics={})
    classifier.log_dict = lambda metrics, **_: classifier.trainer.callback_metrics.update(metrics)
    classifier.on_validation_epoch_end()
    figures = classifier.figures()
    # precision 2/2, 2/4, 0; recall 2/3, 2/2, 0: F1 0.8, 2/3, 0
    assert figures["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 1, 0]]
    assert_close(figures["f1"], (0.8 + 2 / 3 + 0) / 3)
    assert_close(figures["accuracy"], 4 / 6)
    assert (figures["examples"], figures["guessing"]) == (6, 0.5)


def test_choices_and_similar_texts_export_so_that_plain_transformers_agree(data, module, tmp_path):
    for kind in ("choice", "similarity"):
        made = data(KINDS[kind])
        classifier = module(made)
        classifier.export(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
        example = made.train_set[1]
        batch = made.collate([example], [0], [0])
        scores = torch.cat([model(torch.tensor([r])).logits for r in example.inputs])
        expected = scores.T if kind == "choice" else scores.sum(0, keepdim=True)
        assert_close(classifier.logits(classifier.hidden(batch)[0], batch), expected, atol=1e-4, rtol=1e-4)


def test_adapters_are_merged(data, module, policy, tmp_path, capsys):
    made = data(CLASSES)
    classifier = module(made, policy=policy)
    add_lora(classifier.policy, LoRA(r=2))
    for name, parameter in classifier.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    classifier.export(tmp_path)
    assert "adapter: not written, for peft knows no model with such a head; model/ is whole" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    batch = made.collate([made.train_set[0]], [0], [0])
    expected = model(torch.tensor(made.train_set[0].inputs)).logits
    assert_close(classifier.logits(classifier.hidden(batch)[0], batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([*CLASSES, *CHOICES], {}, "holds records of several kinds (choice, classification)"),
        ([dict(r, label="one") for r in CLASSES], {}, "all records have the label 'one'"),
        (CLASSES, {"max_length": 8, "on_long": "skip"}, "60 records are longer than max_length=8 tokens"),
        ([*CLASSES, {"text": "t"}], {}, "l.jsonl:61: no field 'label' (it has text)"),
    ],
)
def test_bad_data_is_one_line(rows, settings, reason, data):
    rows = [dict(r, text="What is it? " * 9 + r["text"]) for r in rows] if "max_length" in settings else rows
    with pytest.raises(UserError) as error:
        data(rows, **settings)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_long_texts_are_cut_and_counted(data):
    made = data([dict(r, text="What is it? " * 9 + r["text"]) for r in CLASSES], max_length=12)
    assert made.long == 60 and {len(r) for e in made.train_set for r in e.inputs} == {12}
    assert json.dumps(made.labels) == '["0", "1", "2"]'
