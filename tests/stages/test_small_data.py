"""Few prompts are enough for every stage, whatever the seed: none is refused, and none is ever on both sides."""

import copy
import json

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.stages import (
    ClassifyDataModule,
    DPODataModule,
    DPOModule,
    EvaluateDataModule,
    FewShotDataModule,
    PPODataModule,
    PreferenceDataModule,
    RewardDataModule,
    SFTDataModule,
    SFTModule,
)
from lit_rlhf.text.chat import encode_prompts, ensure_chat_template
from lit_rlhf.text.records import Moved, prompt_fingerprint, write_jsonl

KINDS = (
    SFTDataModule, PreferenceDataModule, RewardDataModule, PPODataModule, DPODataModule, ClassifyDataModule,
    EvaluateDataModule, FewShotDataModule,
)  # fmt: skip


def rows(count):
    answers = {"response": "Fine.", "chosen": "Fine.", "rejected": "No."}
    for i in range(count):
        text = f"Suggest a name for shop number {i}."
        yield {"prompt": text, "text": text, "label": f"l{i % 2}", **answers}


def read(kind, path, tokenizer, moved, **settings):
    data = kind(path, tokenizer, **settings)
    data.moved = moved
    data.setup()
    assert kind.__name__ in f"{data}"  # in one line, before and after
    return data


def asked(text):
    return prompt_fingerprint([{"role": "user", "content": text}])


def sides(data):
    """Fingerprints of (train, held out), from what a data module has read, whatever it is."""
    if getattr(data, "train_prompts", None):
        return tuple({prompt_fingerprint(p.messages) for p in s} for s in (data.train_prompts, data.held_out_prompts))
    if hasattr(data, "rankings"):
        return tuple({prompt_fingerprint(r.prompt) for r in s} for s in (data.train_records, data.val_records))
    train, held_out = data.records()
    found = []
    for side in (train, held_out):
        texts = [getattr(r, "messages", None) or [{"role": "user", "content": r.texts[0]}] for r in side]
        found.append({prompt_fingerprint(t[:1]) for t in texts})
    return tuple(found)


@pytest.mark.parametrize("count", [4, 5, 12, 20])
def test_all_stages_of_a_run_part_few_prompts_alike(count, tmp_path, tokenizer):
    path = tmp_path / "few.jsonl"
    write_jsonl(path, rows(count))
    for seed in range(12):
        moved, train, held_out = Moved(), set(), set()
        for kind in KINDS:
            here = sides(read(kind, path, tokenizer, moved, held_out=0.1, split_seed=seed))
            assert all(here)
            train, held_out = train | here[0], held_out | here[1]
            moved.trained |= here[0]
        assert not train & held_out and len(train | held_out) == count


def test_twenty_prompts_of_ones_own_for_every_seed(tmp_path, tokenizer):  # as experiment=own_prompts reads them
    path, ranked = tmp_path / "prompts.jsonl", tmp_path / "rankings.jsonl"
    texts = [f"Suggest a name for shop number {i}." for i in range(20)]
    write_jsonl(path, [{"prompt": text} for text in texts])
    for seed in range(200):
        moved = Moved()
        drawn = read(PreferenceDataModule, path, tokenizer, moved, held_out=0.2, split_seed=seed)
        if seed % 10 == 0:  # people have judged seven of them
            judged = [texts[(seed + 3 * i) % 20] for i in range(7)]
            write_jsonl(ranked, [{"prompt": text, "responses": ["a", "b"], "ranks": [1, 2]} for text in judged])
            reward = read(RewardDataModule, ranked, tokenizer, moved, held_out=0.2, split_seed=seed, batch_size=4)
            moved.trained |= sides(reward)[0]
            assert len(list(reward.train_dataloader())) > 0
            ppo = read(PPODataModule, path, tokenizer, moved, held_out=0.2, split_seed=seed, batch_size=64)
            evaluate = read(EvaluateDataModule, path, tokenizer, moved, held_out=0.2, split_seed=seed)
            assert sides(ppo)[1] == sides(evaluate)[1] and not sides(evaluate)[1] & sides(reward)[0]
            assert len(next(iter(ppo.train_dataloader())).messages) == 64  # a batch above the data
        else:
            assert all(sides(drawn))


def test_that_prompts_changed_sides_is_said_with_their_number(tmp_path, tokenizer):
    write_jsonl(tmp_path / "few.jsonl", [*rows(4), *rows(4)])
    notes = [
        read(SFTDataModule, tmp_path / "few.jsonl", tokenizer, Moved(), held_out=0.02, split_seed=seed).notes
        for seed in range(3)
    ]
    assert all("changed sides" in note[-1] and "1 of them" in note[-1] for note in notes)
    with pytest.raises(UserError, match=r"one.jsonl: there is one distinct prompt, and to hold one out takes two"):
        write_jsonl(tmp_path / "one.jsonl", [*rows(1), *rows(1)])
        read(SFTDataModule, tmp_path / "one.jsonl", tokenizer, Moved())


def test_more_examples_than_there_are_are_left_out(tmp_path, tokenizer):
    write_jsonl(tmp_path / "few.jsonl", rows(12))
    data = read(FewShotDataModule, tmp_path / "few.jsonl", tokenizer, Moved(), held_out=0.2)
    left = len(data.train_set)
    assert data.shots == [k for k in (0, 1, 4, 8, 16, 32) if k <= left]
    assert any(f"16, 32 examples are more than the {left} that there are" in note for note in data.notes)


def test_several_files_and_names_of_ones_own(tmp_path, tokenizer):
    for name in "ab":
        lines = [json.dumps({"q": f"{name} {i}?", "a": "Yes.", "id": i}) + "\n" for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    fields = {"prompt": "q", "response": "a"}
    for path in (f"{tmp_path}/*.jsonl", [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]):
        data = read(SFTDataModule, path, tokenizer, Moved(), fields=fields)
        assert len(data.train_set) + len(data.val_set) == 20
        assert sum("nobody reads the field id" in note for note in data.notes) == 2  # a line for each file


def test_a_margin_reaches_the_loss_or_is_said(tmp_path, tokenizer, policy, reward_model, fit):
    import torch

    from lit_rlhf.functional import ranking_loss, ranking_pairs
    from lit_rlhf.stages import RewardModule

    margins = [{**row, "margin": i % 3} for i, row in enumerate(rows(12))]
    write_jsonl(tmp_path / "m.jsonl", margins)
    data = read(RewardDataModule, tmp_path / "m.jsonl", tokenizer, Moved(), batch_size=11)
    batch = next(iter(data.train_dataloader()))
    module = RewardModule(reward_model, tokenizer)
    loss, _ = module.losses(batch)
    from lit_rlhf.models.heads import packed_scores

    scores, pairs = packed_scores(module.reward_model, batch.packed), ranking_pairs(batch.ranks, batch.prompt_index)
    each = -torch.nn.functional.logsigmoid(
        scores[pairs.better] - scores[pairs.worse] - (batch.margins[pairs.better] - batch.margins[pairs.worse])
    )
    assert set((batch.margins[pairs.better] - batch.margins[pairs.worse]).tolist()) == {0.0, 1.0, 2.0}
    torch.testing.assert_close(loss, each.mean())
    assert loss > ranking_loss(scores, pairs)
    dpo = read(DPODataModule, tmp_path / "m.jsonl", tokenizer, Moved())
    assert any("nobody reads the fields" in note and "margin" in note for note in dpo.notes)


@pytest.mark.parametrize("kind", [PPODataModule, PreferenceDataModule, EvaluateDataModule])
def test_prompts_are_asked_of_a_checkpoint_without_a_template(kind, tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is {i}?"} for i in range(12)])
    data = kind(tmp_path / "prompts.jsonl", bare, held_out=0.3)
    data.setup()
    first = data.held_out_prompts[0]
    assert "What is" in bare.decode(first.tokens)
    if kind is PPODataModule:  # the prompts that a reward model of the same checkpoint was trained on
        other = copy.deepcopy(tokenizer)
        other.chat_template = None
        ensure_chat_template(other)
        assert first.tokens == encode_prompts(other, [first.messages])[0]
        assert any("no chat template" in note for note in data.notes)


LEARNED = {"sft": (SFTDataModule, SFTModule), "dpo": (DPODataModule, DPOModule)}


@pytest.mark.parametrize("kind", [SFTDataModule, RewardDataModule, DPODataModule, ClassifyDataModule, PPODataModule])
def test_a_batch_larger_than_the_data_is_said_once(kind, tmp_path, tokenizer):
    write_jsonl(tmp_path / "few.jsonl", rows(12))
    for size, said in ((9, 0), (100, 1)):
        data = read(kind, tmp_path / "few.jsonl", tokenizer, Moved(), held_out=0.1, batch_size=size)
        loaders = [data.train_dataloader(), data.train_dataloader()]
        assert [len(loader) for loader in loaders] == [1, 1]
        assert sum(note.startswith("batch_size=100 is more than the ") for note in data.notes) == said


@pytest.mark.parametrize("budget", [{"max_steps": 3}, {"max_epochs": 1}])
@pytest.mark.parametrize("stage", LEARNED)
def test_an_epoch_without_a_step_is_refused(stage, budget, tmp_path, tokenizer, policy, fit):
    """Lightning would go through empty epochs for ever, or end without a word."""
    kind, module = LEARNED[stage]
    write_jsonl(tmp_path / "few.jsonl", rows(12))
    data = read(kind, tmp_path / "few.jsonl", tokenizer, Moved(), held_out=0.1, batch_size=4)
    with pytest.raises(UserError, match=r"there are \d+ sequences .*, less than the 32 of one step \(batch_size=4 "):
        fit(module(policy, tokenizer), data, accumulate_grad_batches=8, **budget)
