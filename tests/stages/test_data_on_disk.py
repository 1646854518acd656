"""Records and tokens on disk are those in memory, in the same order, with the same skips, notes and errors."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.stages import ClassifyDataModule, DPODataModule, PPODataModule, RewardDataModule, SFTDataModule
from lit_rlhf.text.records import Records
from lit_rlhf.text.rows import Rows
from lit_rlhf.text.token_file import code_digest

KINDS = (SFTDataModule, RewardDataModule, DPODataModule, ClassifyDataModule, PPODataModule)
KEPT = ("skipped", "notes", "long", "left_out", "labels", "calibration")


def row(i):
    say = f"Suggest a name for shop number {i}, in {'many ' * (40 if i % 9 == 4 else i % 5)}words."
    answers = {"response": f"Fine {i}.", "chosen": f"Fine {i}.", "rejected": "No." if i % 7 else f"Fine {i}."}
    return {"prompt": say, "text": say, "label": f"l{i % 3}", "n": i, "kind": f"k{i % 2}", **answers}


@pytest.fixture
def file(tmp_path):
    """60 records, three of them bad, some too long for 60 tokens, some pairs of equal answers."""
    lines = [json.dumps(row(i)) for i in range(60)]
    lines[7], lines[20], lines[41] = "{", json.dumps({"text": 1, "prompt": ""}), "[]"
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    return path


def made(kind, path, tokenizer, **settings):
    settings = {"on_bad_record": "skip", "max_length": 60, "batch_size": 4, "held_out": 0.2, **settings}
    data = kind(path, copy.deepcopy(tokenizer), **settings)
    data.said = []
    data.tell = data.said.append
    data.setup()
    return data


def sides(data):
    names = ("train_prompts", "held_out_prompts") if isinstance(data, PPODataModule) else ("train_set", "val_set")
    return [getattr(data, name) for name in names]


def batches(data):
    """Everything in the batches of two epochs and of the validation."""
    train = data.train_dataloader()
    return [str(batch) for batch in [*train, *train, *data.val_dataloader()]]


def assert_same(data, expected):
    for mine, theirs in zip(sides(data), sides(expected)):
        assert isinstance(mine, Rows) and isinstance(theirs, list) and theirs
        assert [str(item) for item in mine] == [str(item) for item in theirs]  # NaN is not itself
        assert type(mine[0]) is type(theirs[0]) and str(mine[-1]) == str(theirs[-1])
        assert str(list(mine[2:5])) == str(theirs[2:5])
        assert list(data.lengths(mine)) == list(expected.lengths(theirs))
    for name in KEPT:
        assert str(getattr(data, name, None)) == str(getattr(expected, name, None)), name
    assert data.sizes() == expected.sizes() and data.longest() == expected.longest()
    if not isinstance(data, ClassifyDataModule):
        assert [*data.trained_prompts()] == [*expected.trained_prompts()]
    torch.set_printoptions(profile="full")
    assert batches(data) == batches(expected)


@pytest.mark.parametrize("on_long", ["skip", "cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_disk_as_in_memory(kind, on_long, file, tmp_path, tokenizer):
    expected = made(kind, file, tokenizer, on_long=on_long)
    cache = tmp_path / "cache"
    assert_same(made(kind, file, tokenizer, on_long=on_long, cache=cache), expected)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    again = made(kind, file, tokenizer, on_long=on_long, cache=cache)
    assert_same(again, expected)
    assert again.said == expected.said
    assert_same(pickle.loads(pickle.dumps(again)), expected)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == written and len(written) == 3
    assert not [*cache.rglob("*.tmp")]


@pytest.mark.parametrize("settings", [
    {"limit": 5}, {"split_seed": 3}, {"max_length": 40}, {"fields": {"response": "chosen"}},
    {"special_tokens": "refuse"},
])  # fmt: skip
def test_what_changes_the_examples_makes_others(settings, file, tmp_path, tokenizer):
    made(SFTDataModule, file, tokenizer, cache=tmp_path / "cache")
    assert_same(
        made(SFTDataModule, file, tokenizer, cache=tmp_path / "cache", **settings),
        made(SFTDataModule, file, tokenizer, **settings),
    )


def test_a_file_or_a_template_that_changed_is_read_anew(file, tmp_path, tokenizer):
    made(SFTDataModule, file, tokenizer, cache=tmp_path / "cache")
    with file.open("a") as more:
        more.write("\n" + json.dumps(row(99)))
    data = made(SFTDataModule, file, tokenizer, cache=tmp_path / "cache")
    assert_same(data, made(SFTDataModule, file, tokenizer))
    tokenizer.chat_template = f"Hm. {tokenizer.chat_template}"
    other = made(SFTDataModule, file, tokenizer, cache=tmp_path / "cache")
    assert_same(other, made(SFTDataModule, file, tokenizer))
    assert other.train_set[0].tokens != data.train_set[0].tokens


def test_what_a_model_has_no_room_for_is_cut_again(file, tmp_path, tokenizer):
    both = [made(SFTDataModule, file, tokenizer, max_length=500, cache=cache) for cache in (None, tmp_path / "cache")]
    for data in both:
        data.fit_context(40)
    assert_same(*both[::-1])
    assert both[1].longest() <= 40 and both[1].long > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_errors(kind, file, tmp_path, tokenizer):
    lines = file.read_text().splitlines()
    said = []
    for text in (lines, lines[8:14], lines[8:10]):
        file.write_text("\n".join(text))
        for cache in (None, tmp_path / "cache"):
            with pytest.raises(UserError) as caught:
                settings = {"on_bad_record": "fail"} if text is lines else {"max_length": 9, "on_long": "skip"}
                made(kind, file, tokenizer, cache=cache, **settings)
            said.append(str(caught.value))
    assert said[::2] == said[1::2] and said[0].startswith(f"{file}:8: not JSON")
    assert "longer than max_length=9" in said[2]
    assert not [*(tmp_path / "cache").glob("*/rows.arrow.tmp")]


def test_a_record_that_the_template_refuses_is_named_by_its_line(file, tmp_path, tokenizer):
    file.write_text("\n".join(json.dumps({**row(i), "response": "<|user|> x"[9 * (i != 3) :]}) for i in range(9)))
    said = []
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(UserError, match=rf"{file}:4: a text holds the special token") as caught:
            made(SFTDataModule, file, tokenizer, cache=cache, special_tokens="refuse", on_bad_record="fail")
        said.append(str(caught.value))
        skipping = made(SFTDataModule, file, tokenizer, cache=cache, special_tokens="refuse")
        assert len(skipping.skipped) == 1 and skipping.skipped[0].startswith(f"{file}:4: ")
    assert said[0] == said[1]


def test_weights_are_shares_of_an_epoch(tmp_path, tokenizer):
    for name, numbers in (("a", range(40)), ("b", range(40, 60)), ("c", range(60, 100))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({**row(i), "response": f"{i}"}) for i in numbers))
    path = [f"{tmp_path}/[ac].jsonl", tmp_path / "b.jsonl"]  # two entries
    data = made(SFTDataModule, path, tokenizer, weights=[1, 3], max_length=500)
    learned = [tokenizer.decode([t for t, own in zip(*item) if own][:-1]) for item in data.train_set]
    of_b = [40 <= int(number) < 60 for number in learned]
    order = data.train_dataloader().order
    seen = order(0)
    assert abs(sum(of_b[i] for i in seen) - 0.75 * len(seen)) <= 1 and len(seen) == len(learned)
    counts = [seen.count(i) for i in range(len(learned)) if of_b[i]]
    assert max(counts) - min(counts) <= 1 < max(counts)  # each is read before one is read again
    assert order(1) != seen and sorted(set(order(1))) != sorted(set(seen))
    with pytest.raises(UserError, match=r"weights \(data\) has 3 entries for 2 sources"):
        made(SFTDataModule, path, tokenizer, weights=[1, 3, 1]).train_dataloader()
    prompts = made(PPODataModule, path, tokenizer, weights=[0.1, 9.9], max_length=500)
    chosen = [prompts.train_prompts[i].record["n"] for i in prompts.train_dataloader().order(0)]
    assert sum(40 <= n < 60 for n in chosen) / len(chosen) > 0.95


@pytest.mark.parametrize("few", [1, 2, 3])
def test_a_source_of_few_prompts_is_trained_on_whatever_the_seed(few, tmp_path, tokenizer):
    for name, numbers in (("many", range(40)), ("few", range(40, 40 + few))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row(i)) for i in numbers))
    path, all_held = [tmp_path / "many.jsonl", tmp_path / "few.jsonl"], 0
    for seed in range(30):
        data = made(SFTDataModule, path, tokenizer, weights=[1, 1], held_out=0.5, split_seed=seed, max_length=500)
        all_held += data.moved.train != set()
        data.train_dataloader().order(0)  # of each source something
        sides = [{r.messages[0]["content"] for r in side} for side in (data.train_records, data.val_records)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40 + few
    assert 0 < all_held < 30


def test_records_of_parquet_keep_their_types(tmp_path, monkeypatch, tokenizer):
    from datetime import date, datetime, time, timedelta
    from decimal import Decimal

    from datasets import Dataset, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hub")
    values = {
        "at": datetime(2024, 2, 3, 4, 5, 6), "day": date(2024, 2, 3), "hour": time(4, 5), "took": timedelta(1, 2, 3),
        "price": Decimal("1.20"), "raw": b"\0\xff", "parts": [{"a": None, "b": [1.5, float("inf")]}],
    }  # fmt: skip
    Dataset.from_list([{"prompt": f"q{i}", **values} for i in range(8)]).to_parquet(tmp_path / "x.parquet")
    memory, disk = (made(PPODataModule, tmp_path / "x.parquet", tokenizer, cache=c) for c in (None, tmp_path / "c"))
    assert isinstance(disk._train, Records)
    assert [p.record for p in disk.train_prompts] == [p.record for p in memory.train_prompts]
    assert {**disk.train_prompts[0].record, **values} == disk.train_prompts[0].record


READ = """
import hashlib, json, sys
from pathlib import Path
from lit_rlhf.stages import SFTDataModule
from lit_rlhf.text.tokenizer import load_tokenizer

def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

file, tokenizer, cache = sys.argv[1:]
data = SFTDataModule(file, load_tokenizer(tokenizer), max_length=4000, cache=cache or None)
write, written = data._write_examples, []
data._write_examples = lambda *how: (written.append(how), write(*how))
before = own_memory()
data.setup()
after = own_memory()
tokens = hashlib.sha256()
for item in data.train_set:
    tokens.update(str(item).encode())
print(json.dumps({"grown": after - before, "written": len(written), "tokens": tokens.hexdigest()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_two_processes_share_what_one_writes_and_none_holds_it_in_memory(tmp_path, tokenizer):
    words = "the cat sat on the mat and looked at the dog. " * 60
    rows = ({"prompt": f"{i}?", "response": f"{i} {words}"} for i in range(2000))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(tmp_path / "x.jsonl"), str(tmp_path / "tokenizer")]
    caches = (str(tmp_path / "cache"), str(tmp_path / "cache"), "")
    started = [subprocess.Popen([*command, cache], env=env, stdout=subprocess.PIPE, text=True) for cache in caches]
    one, other, memory = (json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started)
    assert sorted([one["written"], other["written"]]) == [0, 2] and memory["written"] == 0  # both sides, by one of them
    assert one["tokens"] == other["tokens"] == memory["tokens"]
    assert max(one["grown"], other["grown"]) < memory["grown"] / 2, (one, other, memory)


def test_records_are_read_anew_by_another_parser(file, tmp_path, monkeypatch, tokenizer):
    """A function of the user's own is known by its module's source, not by its name alone."""
    module = tmp_path / "own_parser.py"
    body = "from lit_rlhf.text.records import Demonstration, parse_demonstration\n"
    body += "def parse(row) -> Demonstration:\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for ending in ("!", "?!"):
        said = f"str(row.get('n')) + {ending!r}"
        module.write_text(f"{body}    return parse_demonstration({{**row, 'response': {said}}})\n")
        sys.modules.pop("own_parser", None)
        parse = importlib.import_module("own_parser").parse
        own = type("Own", (SFTDataModule,), {"parse_record": staticmethod(parse)})
        own.__module__ = "own_parser"
        code_digest.cache_clear()
        data = made(own, file, tokenizer, cache=tmp_path / "cache")
        found.append(data.train_records[0].messages[-1]["content"])
    assert found == ["2!", "2?!"]
