"""The card in a folder of exported weights."""

import shutil

import pytest
from huggingface_hub import ModelCard

from lit_rlhf.pipeline.model_card import _licence


def test_a_card_tells_what_a_model_is_made_of(finished_run):
    card = ModelCard.load(finished_run / "runs/quickstart/ppo/model/README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["lit_rlhf", "ppo"]
    for said in (
        "`ppo.policy.path` | quickstart/sft",
        "`ppo.reward_model.path` | quickstart/reward",
        "the built-in world",
    ):
        assert said in card.text
    assert "win_rate.mean" in card.text and str(finished_run) not in card.text


@pytest.mark.parametrize("text", [b"---\nlicense: caf\xe9\n---\n", b"---\nlicense: [a\n---\n", b"---\n- a\n---\n"])
def test_a_damaged_card_of_a_base_ends_no_stage(tmp_path, capsys, text):
    (tmp_path / "README.md").write_bytes(text)
    assert _licence(str(tmp_path)) is None
    assert "README.md: no card that can be read" in capsys.readouterr().out


def test_the_licence_and_the_name_of_a_base_are_kept_and_no_path_of_this_machine(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs/quickstart/sft/model", tmp_path / "base")
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    lit_rlhf("stage=sft", "run=tuned", "model=hf", f"model.path={tmp_path / 'base'}")
    card = ModelCard.load(tmp_path / "runs/tuned/sft/model/README.md")
    assert card.data.license == "apache-2.0" and "checkpoint that the run began with | base" in card.text
    assert str(tmp_path) not in card.content
