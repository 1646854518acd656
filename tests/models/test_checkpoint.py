import copy
import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models import checkpoint, save_model
from lit_rlhf.models.checkpoint import fingerprint

pytestmark = pytest.mark.parametrize("model_config", ["llama"], indirect=True)  # one family is enough

IDS = torch.tensor([[5, 6, 7, 8]])


def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def plain_logits(policy):
    """By a model of transformers' own with the policy's weights."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(policy.config)).eval()
    plain.load_state_dict(policy.state_dict())
    assert torch.allclose(plain(IDS).logits, policy(IDS).logits, rtol=0, atol=1e-5)
    return plain(IDS).logits


def change(policy):
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(1)


def test_a_folder_loads_with_plain_transformers_and_writes(policy, tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = tmp_path / "stage" / "model"
    save_model(policy, tokenizer, folder)
    plain, plain_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(plain(IDS).logits, plain_logits(policy))
    prompt = plain_tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], return_tensors="pt")
    assert plain.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3
    assert [f.name for f in folder.parent.iterdir()] == ["model"]


def test_a_second_save_takes_the_place_of_the_first(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "left-over.txt").write_text("of an older save")
    change(policy)
    save_model(policy, tokenizer, tmp_path / "model")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits, plain_logits(policy))
    assert not (tmp_path / "model" / "left-over.txt").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("killed"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_save_that_fails_half_way_leaves_the_old_folder(policy, tokenizer, tmp_path, monkeypatch, part, error):
    folder = tmp_path / "model"
    save_model(policy, tokenizer, folder)
    before = files(folder)
    change(policy)
    broken = policy if part == "model" else tokenizer
    write = type(broken).save_pretrained

    def fail(path, **settings):
        write(broken, path, **settings)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(broken, "save_pretrained", fail)
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
            save_model(policy, tokenizer, folder)
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"{folder}: cannot be written (No space left on device); make room for it")
    assert files(folder) == before

    save_model(policy, tokenizer, folder)  # what was left half written is no obstacle
    assert files(folder) != before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_never_half_removed(policy, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_model(policy, tokenizer, folder)
    before = files(folder)
    change(policy)
    remove = checkpoint.shutil.rmtree

    def killed_on_the_way(path, *args, **settings):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt
        remove(path, *args, **settings)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed_on_the_way)
    with pytest.raises(KeyboardInterrupt):
        save_model(policy, tokenizer, folder)
    assert set(files(folder)) == set(before)  # the old model or the new one, whole


def test_a_place_that_cannot_be_written(policy, tokenizer, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file/model: cannot be written \(Not a directory\); make room"):
        save_model(policy, tokenizer, tmp_path / "file" / "model")


def test_the_fingerprint_is_that_of_the_weights(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path / "model")
    first = fingerprint(tmp_path / "model")
    assert first == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()[:16]
    tokenizer.chat_template = "another"
    save_model(policy, tokenizer, tmp_path / "model")
    assert fingerprint(tmp_path / "model") == first
    change(policy)
    save_model(policy, tokenizer, tmp_path / "model")
    assert fingerprint(tmp_path / "model") != first
    assert fingerprint(tmp_path / "missing") == hashlib.sha256(b"").hexdigest()[:16]
