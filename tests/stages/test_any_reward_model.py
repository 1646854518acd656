"""Reward models of any make: with tokenizers, labels, heads and families of their own, in the stages that ask them."""

import copy
import math

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from lit_rlhf.errors import UserError, say_once
from lit_rlhf.models import (
    Classifier,
    ScorerEnsemble,
    TextRewardModel,
    load_policy_and_tokenizer,
    load_scorer,
    load_scorer_tokenizer,
    save_model,
)
from lit_rlhf.models.heads import critic_from_reward_model, score_answers
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import (
    EvaluateModule,
    PPOModule,
    RewardBenchDataModule,
    RewardBenchModule,
    WorldEvaluateDataModule,
    WorldPPODataModule,
)
from lit_rlhf.stages.ppo import MonteCarlo, Scoring
from lit_rlhf.stages.preference import RewardModelAnnotator
from lit_rlhf.stages.remote_scorers import HTTPScorer
from lit_rlhf.text.chat import ROLE_TEMPLATE, ensure_chat_template
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.text.tokenizer import load_reader

PROMPTS = [
    [{"role": "user", "content": "What is 2 plus 3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you? And who am I to you?"}],
    [{"role": "user", "content": "Name a fruit."}],
]
SIDES = ("chosen", "rejected")
ANSWERS = ["2 plus 3 is 5.", "A cat, and you are a friend of mine, I think.", ""]
WORDS = "Human Assistant System : . , ? is plus 2 3 5 What A cat you Name a"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _said_anew():
    say_once.cache_clear()


def stirred(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def gpt2_tokenizer(test_data):
    return load_reader(test_data / "gpt2-tokenizer")  # it has no template


def chatml(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def gpt2_reward_model(tokenizer, labels=1):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    return stirred(GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), num_labels=labels, **sizes)))


def word_pieces():
    """A tokenizer that begins a text with [CLS] and ends it with [SEP], and that knows no end-of-text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def bert(tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "rude", 1: "plain", 2: "kind"}
    config = BertConfig(vocab_size=len(tokenizer), id2label=names, label2id={n: i for i, n in names.items()}, **sizes)
    return stirred(BertForSequenceClassification(config))


def transcript(prompt, answer):
    return "\n\n".join(
        f"{m['role'].replace('user', 'human').capitalize()}: {m['content']}" if m["role"] != "system" else m["content"]
        for m in [*prompt, {"role": "assistant", "content": answer}]
    )


def by_pipeline(model, tokenizer, text, label):
    """The logit of a label as transformers' own pipeline has it, which rounds it to float32, and as it is."""
    asked = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none", top_k=None)
    found = asked(text)
    found = found[0] if isinstance(found[0], list) else found
    rounded = {each["label"]: each["score"] for each in found}[model.config.id2label[label]]
    return rounded, model(**asked.preprocess(text)).logits[0, label].item()


# ------------------------------------------------------------------ as transformers reads them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["transcript", "template", "labels", "encoder", "pair"])
def test_a_classifier_scores_as_transformers_own_pipeline(kind, dtype, request):
    if kind in ("encoder", "pair"):
        tokenizer, label = word_pieces(), "kind"
        model = bert(tokenizer).to(dtype)
    else:
        tokenizer = request.getfixturevalue("gpt2_tokenizer")
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer, label = chatml(tokenizer) if kind == "template" else tokenizer, 2 if kind == "labels" else None
        model = gpt2_reward_model(tokenizer, labels=3 if kind == "labels" else 1).to(dtype)
        model.config.pad_token_id = tokenizer.pad_token_id
    scorer = Classifier(model, tokenizer, label, "pair" if kind == "pair" else None, batch_size=2)
    answers = [*ANSWERS[:2], "A" if kind == "pair" else ""]  # of a pair the pipeline leaves out an empty text
    found = scorer(PROMPTS, answers)
    for prompt, answer, score in zip(PROMPTS, answers, found):
        dialogue, text = [*prompt, {"role": "assistant", "content": answer}], transcript(prompt, answer)
        if kind == "template":
            text = tokenizer.apply_chat_template(dialogue, tokenize=False)
            assert text.endswith("<|im_end|>\n")  # what stands behind the end of the turn is read, too
        if kind == "pair":
            asked = prompt[0]["content"] if len(prompt) == 1 else transcript(prompt, "")[: -len("\n\nAssistant: ")]
            text = {"text": asked, "text_pair": answer}
        rounded, exact = by_pipeline(model, tokenizer, text, {"kind": 2, None: 0}.get(label, label))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert_close(score, exact, atol=tolerance, rtol=tolerance)
        assert_close(score, rounded, atol=1e-5, rtol=1e-5)
    assert len({round(score, 3) for score in found}) == 3


def test_a_template_that_begins_a_text_itself_is_not_begun_twice(tokenizer, gpt2_tokenizer):
    gpt2_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 50256)]
    )
    gpt2_tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "]")
    model = gpt2_reward_model(gpt2_tokenizer)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, Classifier(model, gpt2_tokenizer)(PROMPTS, ANSWERS)):
        dialogue = [*prompt, {"role": "assistant", "content": answer}]
        inputs = gpt2_tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"][0, :2].tolist().count(50256) == 1
        assert_close(score, model(**inputs).logits.item(), atol=1e-5, rtol=1e-5)


def test_names_of_special_tokens_in_an_answer_are_characters(gpt2_tokenizer):
    for tokenizer in (gpt2_tokenizer, chatml(copy.deepcopy(gpt2_tokenizer))):
        scorer = Classifier(gpt2_reward_model(tokenizer), tokenizer)
        [plain, named] = (scorer._rows(PROMPTS[:1], [text], None)[0]["input_ids"] for text in ("a", "a<|endoftext|>"))
        assert named.count(50256) == plain.count(50256) == 0
        assert tokenizer.decode(named).count("<|endoftext|>") == 1


def test_of_what_is_too_long_the_end_is_read_and_a_line_says_so(capsys):
    tokenizer = word_pieces()
    model = bert(tokenizer)
    tokenizer.model_max_length = 16
    short, long = ([[{"role": "user", "content": "A cat. " * n}]] for n in (2, 40))
    scorer = Classifier(model, tokenizer, 1)
    assert len(scorer._rows(short, ["you"], None)[0]["input_ids"]) < 16
    assert "longer" not in capsys.readouterr().out
    [row] = scorer._rows(long, ["you"], None)
    assert (
        len(row["input_ids"]) == 16 and row["input_ids"][0] == 2 and tokenizer.decode(row["input_ids"][-2:-1]) == "you"
    )
    assert "reads the last 16 tokens of dialogues that are longer" in capsys.readouterr().out


def test_padding_that_a_family_feels_is_not_given_to_it(gpt2_tokenizer, capsys):
    class Feels(GPT2ForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, **settings):
            found = super().forward(input_ids=input_ids, attention_mask=attention_mask, **settings)
            found.logits = found.logits + input_ids.shape[1]
            return found

    config = gpt2_reward_model(gpt2_tokenizer).config
    model = stirred(Feels(config))
    together = Classifier(model, gpt2_tokenizer)(PROMPTS, ANSWERS)
    assert "texts of one length are read together (slower)" in capsys.readouterr().out
    alone = [Classifier(model, gpt2_tokenizer)([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS)]
    assert_close(together, alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ from a folder


@pytest.fixture
def folder(tmp_path):
    """(model, tokenizer) -> the folder that they are saved in."""

    def save(model, tokenizer, name="judge"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_a_bias_that_transformers_leaves_out_is_read(folder, gpt2_tokenizer, tokenizer):
    path = folder(gpt2_reward_model(gpt2_tokenizer), gpt2_tokenizer)
    before = load_scorer(path, tokenizer)(PROMPTS, ANSWERS)
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "score.bias": torch.tensor([1.5])}, path / "model.safetensors", metadata={"format": "pt"})
    assert_close(load_scorer(path, tokenizer)(PROMPTS, ANSWERS), [score + 1.5 for score in before])
    assert load_scorer(path, gpt2_tokenizer).score.bias.item() == 1.5  # where it reads the policy's tokens, too


def test_who_reads_tokens_and_who_reads_text(folder, tmp_path, gpt2_tokenizer, tokenizer, reward_model, capsys):
    ensure_chat_template(tokenizer)
    save_model(reward_model, tokenizer, tmp_path / "ours")
    assert not isinstance(load_scorer(tmp_path / "ours", tokenizer), TextRewardModel) and not capsys.readouterr().out
    path = folder(gpt2_reward_model(gpt2_tokenizer), gpt2_tokenizer)
    assert isinstance(load_scorer(path, tokenizer), Classifier)
    said = capsys.readouterr().out
    assert f"{path}: this reward model reads answers as text, by its own tokenizer, as a transcript (Human: ..." in said
    reward_model.config.score_shift = 0.5  # as a model has it that was trained here
    tokenizer.chat_template = tokenizer.chat_template.replace(" ' ", "': '")
    other = copy.deepcopy(tokenizer)
    other.chat_template = "Talk:" + ROLE_TEMPLATE
    save_model(reward_model, other, tmp_path / "other")
    scorer = load_scorer(tmp_path / "other", tokenizer)  # the same words, another template
    assert isinstance(scorer, TextRewardModel) and not isinstance(scorer, Classifier)
    assert_close(scorer(PROMPTS, ANSWERS), score_answers(reward_model, other, PROMPTS, ANSWERS).tolist())
    both = load_scorer([path, tmp_path / "other"], tokenizer, combine="worst")
    each = [load_scorer(p, None)(PROMPTS, ANSWERS) for p in (path, tmp_path / "other")]
    assert_close(both(PROMPTS, ANSWERS), [min(pair) for pair in zip(*each)])


MISTAKES = {
    "which": ({}, r"judge: a classifier of 3 labels needs to know which one is the score; label= one of 0 \(rude\), 1"),
    "name": ({"label": "nice"}, "has no label 'nice'; label= one of 0"),
    "layout": ({"label": 0, "layout": "template"}, "its tokenizer has no chat template; layout=transcript or pair"),
    "bits": (
        {"label": 0, "quantization": "4bit"},
        "quantization=4bit is for reward models that read the policy's own tokens",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_classifier_must_be_told(mistake, folder, tokenizer):
    settings, message = MISTAKES[mistake]
    path = folder(bert(word_pieces()), word_pieces())
    assert isinstance(load_scorer(path, tokenizer, label="2"), Classifier)
    with pytest.raises(UserError, match=message):
        load_scorer(path, tokenizer, **settings)


def test_a_classifier_without_a_tokenizer_is_refused(folder, tokenizer):
    path = folder(bert(word_pieces()), word_pieces())
    for file in path.iterdir():
        if file.name.startswith(("tokenizer", "vocab")):
            file.unlink()
    with pytest.raises(UserError, match="there is no tokenizer beside this classifier"):
        load_scorer(path, tokenizer, label=0)


def test_an_ensemble_is_held_against_its_arguments():
    for members, combine, said in (([], "mean", "at least one"), ([len], "best", "'mean' or 'worst'")):
        with pytest.raises(UserError, match=f"ScorerEnsemble.*{said}"):
            ScorerEnsemble(members, combine)
    with pytest.raises(UserError, match=r"HTTPScorer\(batch_size=0\)"):
        HTTPScorer("http://127.0.0.1:1/score", batch_size=0)


def test_scorers_of_different_makes_score_together(capsys):
    def silent_on_no(prompts, responses, **_):
        return [None if text == "no" else 4.0 * len(text) for text in responses]

    def by_tools(prompts, responses, tools=(), **_):
        return [float(len(t or ())) for t in tools]

    silent_on_no.score_std, silent_on_no.score_mean = 2.0, 1.0
    answers, record = (PROMPTS, ["ab", "no", "c"]), {"tools": [None, [1], [1, 2, 3]]}
    assert ScorerEnsemble([silent_on_no, by_tools])(*answers, **record) == [(4 + 0) / 2, 1.0, (2 + 3) / 2]
    worst = ScorerEnsemble([silent_on_no, by_tools], "worst")
    assert worst(*answers, **record) == [0.0, 1.0, 2.0] and worst.score_mean == (1 / 2 + 0) / 2
    assert ScorerEnsemble([silent_on_no])(*answers) == [4.0, None, 2.0]
    assert "the spread of its scores is not known (score_std), so they count as they are" in capsys.readouterr().out


# ------------------------------------------------------------------ in the stages


@pytest.fixture
def judge(gpt2_tokenizer):
    return Classifier(gpt2_reward_model(gpt2_tokenizer), gpt2_tokenizer)


@pytest.mark.parametrize("advantage", ["ppo", "grpo"])
def test_ppo_learns_from_a_reward_model_that_has_other_tokens(advantage, judge, ppo, train, policy, tokenizer, capsys):
    judge.model.config.score_std = 2.0
    heard = []
    judge.register_forward_pre_hook(lambda _, given: heard.append(given[:2]))
    settings = {"reward_model": judge, "kl_coef": 0.0, "scoring": Scoring(missing_eos_penalty=0.0)}
    if advantage == "grpo":
        settings |= {"advantage": MonteCarlo(baseline="prompt", divide_by_std=True), "answers_per_prompt": 4}
    module = train(ppo(**settings))
    said = capsys.readouterr().out
    assert ("the critic begins as the policy, for the reward model reads text" in said) == (advantage == "ppo")
    rollout, (asked, texts) = module.rollouts[0], heard[0]
    assert asked == [m for m in module.batches[0].messages for _ in range(module.answers_per_prompt)]
    for text, sequence, n in zip(texts, rollout.sequences, rollout.lengths.tolist()):
        assert tokenizer.decode(sequence[-n:], skip_special_tokens=True).strip() == text
    assert_close(rollout.rewards.sum(-1), torch.tensor(judge(asked, texts)) / 2.0, atol=1e-5, rtol=1e-5)
    assert rollout.rewards.sum(-1).std() > 0 and module.scorer.unit == "SFT std"
    assert not any(name.startswith("scorer.reward_model") for name in module.state_dict())  # frozen: not in checkpoints
    if advantage == "ppo":
        started = critic_from_reward_model(policy, judge)
        assert torch.equal(started.backbone.get_input_embeddings().weight, policy.get_input_embeddings().weight)


def evaluated(world, tokenizer, models, scorer, **settings):
    data = WorldEvaluateDataModule(world, tokenizer, limit_held_out=6, batch_size=3, text_documents=0)
    data.setup()
    sampling = Sampling(max_new_tokens=6)
    module = EvaluateModule(models, scorer, **{**data.for_module(), "samples": 2, "sampling": sampling, **settings})
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).test(
        module, datamodule=data, verbose=False
    )
    return module


def test_evaluation_and_best_of_n_by_a_reward_model_that_has_other_tokens(judge, world, tokenizer, policy, tmp_path):
    models = {"sft": (policy, tokenizer), "mine": (stirred(copy.deepcopy(policy)), tokenizer)}
    module = evaluated(world, tokenizer, models, judge, judge="reward_model", best_of=3)
    for answers in (*module.answers.values(), module.candidates):
        for prompt, texts, scores in zip(module.prompts, answers.texts, answers.scores):
            assert_close(scores, judge([prompt["prompt"]] * len(texts), texts), atol=1e-5, rtol=1e-5)
    assert module.best.scores == [[max(row)] for row in module.candidates.scores]
    assert module.figures()["judge"] == "reward model (proxy)"


def test_in_evaluation_nothing_may_be_said_of_an_answer(world, tokenizer, policy, tmp_path):
    def picky(prompts, responses, kind, finished, **_):
        assert len(kind) == len(finished) == len(responses)
        return [None if "e" in text else float(len(text)) for text in responses]

    models = {"sft": (policy, tokenizer), "mine": (stirred(copy.deepcopy(policy)), tokenizer)}
    module = evaluated(world, tokenizer, models, picky, gold_judge=None, best_of=3)
    module.export(tmp_path)
    figures, answers = module.figures(), module.answers["sft"]
    known = [[s for s in row if not math.isnan(s)] for row in answers.scores]
    assert any(math.isnan(s) for row in answers.scores for s in row)
    flat = [s for row in known for s in row]
    assert figures["judge"] == "picky (proxy)" and figures["models"]["sft"]["score"] == pytest.approx(
        sum(flat) / len(flat)
    )
    assert (
        math.isfinite(figures["win_rate"]["mine_vs_sft"]["mean"])
        and "NaN" not in (tmp_path / "samples.jsonl").read_text()
    )
    assert math.isfinite(figures["ratings"]["models"]["mine"]["elo"])
    for best, row in zip(module.best.scores, module.candidates.scores):
        told = [s for s in row if not math.isnan(s)]
        assert best == [max(told)] if told else math.isnan(best[0])


def test_an_annotator_of_any_make(folder, gpt2_tokenizer):
    path = folder(gpt2_reward_model(gpt2_tokenizer), gpt2_tokenizer)
    answers = [["yes", "no", "it is"], ["a", "b"], ["c", "d"]]
    annotator = RewardModelAnnotator.load(path)
    scores = [annotator.reward_model([p] * len(row), row) for p, row in zip(PROMPTS, answers)]
    assert annotator(PROMPTS, answers) == [[1 + sum(o > s for o in row) for s in row] for row in scores]
    with pytest.raises(UserError, match=r"annotator quiet has no score for an answer to the prompt 'What is 2"):

        def quiet(prompts, responses, **_):
            return [None] * len(responses)

        RewardModelAnnotator(quiet)(PROMPTS, answers)


@pytest.mark.slow
def test_a_real_checkpoint_learns_from_a_reward_model_of_another_tokenizer(
    test_checkpoint, world, reward_model, tokenizer, judge, fit
):
    policy, its_tokenizer = load_policy_and_tokenizer(test_checkpoint)
    reward_model.config.score_std = 0.5
    both = ScorerEnsemble([TextRewardModel(reward_model, tokenizer), judge])
    data = WorldPPODataModule(world, its_tokenizer, prompts=8, batch_size=2, limit_held_out=1)
    settings = {"sampling": Sampling(max_new_tokens=8), "minibatch_size": 2, "kl_coef": 0.0, "val_samples": 1}
    module = PPOModule(policy, both, its_tokenizer, **settings, scoring=Scoring(missing_eos_penalty=0.0))
    rollouts, collect = [], module.collect
    module.collect = lambda prompts: rollouts.append((prompts, collect(prompts))) or rollouts[-1][1]
    fit(module, data, max_epochs=1, limit_train_batches=1)
    prompts, (rollout, _) = rollouts[0]
    written = zip(rollout.sequences, rollout.lengths.tolist())
    texts = [its_tokenizer.decode(s[-n:], skip_special_tokens=True) for s, n in written]
    ours = score_answers(reward_model, tokenizer, prompts.messages, texts) / 0.5
    expected = (ours + torch.tensor(judge(prompts.messages, texts))) / 2
    assert_close(rollout.rewards.sum(-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("several", [False, True], ids=["one", "ensemble"])
def test_a_benchmark_asks_a_classifier_about_one_of_its_labels(several, tmp_path):
    tokenizer = word_pieces()
    model = bert(tokenizer)
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"prompt": "What is 2 plus 3 ?", "chosen": "5 .", "rejected": answer} for answer in ("A cat", "you", "2 .")]
    write_jsonl(tmp_path / "bench.jsonl", rows)
    path = [tmp_path / "bert"] * 2 if several else tmp_path / "bert"
    own = load_scorer_tokenizer(path)
    data = RewardBenchDataModule(tmp_path / "bench.jsonl", own)
    data.setup()
    scorer = load_scorer(path, own, label="kind", layout="pair", score_std=2.0)
    module = RewardBenchModule(scorer, **data.for_module())
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(module, datamodule=data, verbose=False)
    logits = [
        [model(**tokenizer(row["prompt"], row[side], return_tensors="pt")).logits[0, 2].item() for side in SIDES]
        for row in rows
    ]
    for each, expected in zip(module.scored, logits):
        assert each.scores == pytest.approx([x / 2 if several else x for x in expected], abs=1e-5)
    assert module.figures()["accuracy"] == sum(chosen > rejected for chosen, rejected in logits) / 3
