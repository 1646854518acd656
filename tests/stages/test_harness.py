"""Tasks of lm-evaluation-harness, against log-probs of plain transformers."""

import pytest
import torch
import yaml
from lightning import Trainer
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import EvaluateModule, WorldEvaluateDataModule
from lit_rlhf.stages.evaluate.harness import LMEval
from lit_rlhf.text.records import write_jsonl

QUESTIONS = [
    {"question": f"The colour of the {thing} is", "choices": [" red", " a very deep blue", " green"], "answer": i % 3}
    for i, thing in enumerate(["sky", "sea", "sun", "rof", "hat"])
]


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task file and its data."""
    write_jsonl(tmp_path / "tasks/questions.jsonl", QUESTIONS)
    task = {
        "task": "colours", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks/questions.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    }  # fmt: skip
    (tmp_path / "tasks/colours.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "tasks"


def by_hand(folder):
    """Accuracies by the sum of a choice's log-probs, and by that per character, of a model as transformers loads it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = [0, 0]
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            before = len(tokenizer(row["question"], add_special_tokens=False).input_ids)
            ids = torch.tensor([tokenizer(row["question"] + choice, add_special_tokens=False).input_ids])
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[i - 1, ids[0, i]].item() for i in range(before, ids.shape[1])))
        per_byte = [s / len(c) for s, c in zip(sums, row["choices"])]
        right[0] += sums.index(max(sums)) == row["answer"]
        right[1] += per_byte.index(max(per_byte)) == row["answer"]
    return [n / len(QUESTIONS) for n in right]


def test_tasks_are_asked_as_the_harness_and_plain_transformers_do(
    tasks, policy, tokenizer, world, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # no repository of git's, as most people's folders
    folder = tmp_path / "model"  # as a stage exports it
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = WorldEvaluateDataModule(world, tokenizer, limit_held_out=2, text_documents=0)
    data.setup()
    benchmark = LMEval("colours", include_path=tasks, batch_size=4)
    module = EvaluateModule(
        {"sft": (policy, tokenizer)}, **data.for_module(), samples=1, sampling=Sampling(3), benchmark=benchmark
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.test(module, datamodule=data, verbose=False)
    found = module.figures()["models"]["sft"]["benchmark"]["colours"]
    assert found["n"] == len(QUESTIONS) and found["acc_stderr"] > 0
    assert [found["acc"], found["acc_norm"]] == pytest.approx(by_hand(folder))
    out, err = capfd.readouterr()
    assert f"evaluate: sft: colours: acc {found['acc']:.3g}, acc_norm {found['acc_norm']:.3g}, n {found['n']}" in out
    assert "fatal: not a git repository" not in err
    said = [line for line in out.splitlines() if "higher_is_better is not" in line]
    assert len(said) == 1 and said[0].startswith("evaluate.benchmark: [Task: colours] metric acc")  # of two that warn
    own = simple_evaluate(
        "hf", {"pretrained": str(folder)}, ["colours"], device="cpu", log_samples=False,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]["colours"]  # fmt: skip
    assert (own["acc,none"], own["acc_norm,none"]) == (found["acc"], found["acc_norm"])


def test_what_cannot_be_asked_is_said_in_one_line(tasks, policy, tokenizer):
    with pytest.raises(UserError, match=r"there is no task 'numbers'; not in .*; .*include_defaults=true"):
        LMEval(["colours", "numbers"], include_path=tasks)  # before anything is sampled
    (tasks / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"tasks \(evaluate.benchmark\): colours: FileNotFoundError: .*questions.jsonl"):
        LMEval("colours", include_path=tasks)(policy, tokenizer)
    with pytest.raises(UserError, match=r"include_path=nowhere \(evaluate.benchmark\): there is no such folder"):
        LMEval("colours", include_path="nowhere")
