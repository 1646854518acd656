"""Whatever settings, records and model folders hold, a command ends well or with one line, and in its time.

For a run's own files see ``test_files.py``."""

import csv
import io
import json
import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors.torch import save

from lit_rlhf.models import load_policy, load_reward_model, policy_from_config, reward_model_from_config, save_model
from lit_rlhf.pipeline.command import one_job
from lit_rlhf.pipeline.overrides import addresses
from lit_rlhf.pipeline.run_folder import register_resolvers
from lit_rlhf.pipeline.settings import compose_settings, conf_dir
from lit_rlhf.stages import (
    ClassifyDataModule,
    DPODataModule,
    EvaluateDataModule,
    FewShotDataModule,
    PPODataModule,
    PreferenceDataModule,
    PretrainDataModule,
    RewardDataModule,
    SFTDataModule,
)
from lit_rlhf.stages.stage import all_stages
from lit_rlhf.text import load_tokenizer, train_bpe

register_resolvers()


SETTINGS, RECORDS, MODELS = 100, 300, 80  # cases; of model folders, for each kind


def tries(count):
    """The same cases each time."""
    fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=fixtures)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------- what is put in a file's place


def become(path, kind):
    """Put something at a path that is no file to read: a name of ``PLACES``."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"unreadable": "/proc/self/mem", "loop": path, "endless": "/dev/zero"}[kind])


PLACES = ("folder", "pipe", "nothing", "unreadable", "loop", "endless")
BYTES = st.sampled_from([b"", b"\xe2\x82", b"\xff\xfe", b"\x00" * 9, b"[" * 100_000, b"9" * 5_000, b"{", b"[]", b"null",
                         b"7", b'""', b"{}", b"[{}]", b'{"a": NaN}', b"\xef\xbb\xbf", b"\r\r\r"])  # fmt: skip
BYTES = BYTES | st.binary(max_size=40)


# ---------------------------------------------------------------- settings


def words(text):
    return text.split()


VALUES = words("""null true 0 -1 1 7 1e-30 0.00001 inf -inf nan '' ' ' [] {} [1,2] [''] [null] {a:1} ${nope} ${seed}
    ${run} ${oc.env:NOPE} ${oc.env:HOME,} ${oc.decode:'['} ${hydra:nope} ${upstream_model:nope} ??? nope ../x /dev/null
    /proc/x fifo folder a,b ( ) [ { ' a=b $ choice(1,2) range(1,3) glob(*) 0x10 1_000 @x a@b \udcff é 9e400 int(x)
    str(1) a:b ~ ${}""")
VALUES += ["a" * 300, "9" * 5_000, "[" * 2_000, "a/" * 3_000]
SIGNS = ("", "", "", "", "+", "++", "~")


def groups():
    names = {str(file.parent.relative_to(conf_dir())) for file in conf_dir().rglob("*.yaml")}
    return sorted(names - {"."})


@st.composite
def overrides(draw, known):
    stage = draw(st.sampled_from(sorted([*all_stages(), "chat", "label", "report", "plan", "pipeline"])))
    asked, own = [f"stage={stage}"], [key for key in known if key.split(".")[0] not in {*all_stages()} - {stage}]
    for _ in range(draw(st.integers(1, 3))):
        sign, key = draw(st.sampled_from(SIGNS)), draw(st.sampled_from(own) | st.sampled_from(known))
        if draw(st.integers(0, 9)) == 0:
            key += draw(st.sampled_from([".", ".x", "[0]", "@x", "/x", ".0", " ", "\udcff"]))
        value = "" if sign == "~" and draw(st.booleans()) else f"={draw(st.sampled_from(VALUES))}"
        asked.append(f"{sign}{key}{value}")
    return asked


@pytest.mark.slow
def test_settings(folder, ends_well):
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    known = [*addresses(compose_settings([])), *groups()]

    @tries(SETTINGS)
    @given(overrides(known))
    @example(["stage=null"])
    @example(["~seed"])
    def check(asked):
        with ends_well():
            one_job(asked)

    check()


# ---------------------------------------------------------------- records

DEEP = [("[" * n + "]" * n) for n in (100, 900, 5_000, 100_000)]
TEXTS = st.sampled_from(["hi", "", " ", "\ud83d", "\x00", "<|im_end|>", "<|endoftext|>", "{{ x }}", "é" * 9,
                         "a" * 9_000, "\u2028", "user", "assistant", "system", "tool", "1", "true"])  # fmt: skip
PLAIN = st.none() | st.booleans() | TEXTS | st.sampled_from(
    [0, 1, 2, -1, 0.5, 1e308, float("nan"), float("inf"), 10**400, -(10**400), 2**63]
)  # fmt: skip
NAMES = st.sampled_from(
    words("""prompt response completion messages conversations instruction input output chosen
    rejected responses ranks scores text label rating tools question choices answer answers annotations premise
    hypothesis text_a text_b context margin score_chosen score_rejected finished models temperatures kind weight
    annotator system preference_strength helpfulness data id model""")
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": TEXTS, "content": PLAIN | st.lists(PLAIN, max_size=2), "weight": PLAIN, "tool_calls": PLAIN,
                  "from": TEXTS, "value": PLAIN},
)  # fmt: skip
VALUE = st.recursive(PLAIN | st.lists(MESSAGE, max_size=3), lambda inner: st.lists(inner, max_size=3) | MESSAGE |
                     st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4)  # fmt: skip

GOOD = {
    SFTDataModule: {"prompt": "{}?", "response": "yes"},
    DPODataModule: {"prompt": "{}?", "responses": ["yes", "no"], "ranks": [1, 2]},
    RewardDataModule: {"prompt": "{}?", "chosen": "yes", "rejected": "no"},
    PPODataModule: {"prompt": "{}?"},
    PreferenceDataModule: {"prompt": "{}?"},
    EvaluateDataModule: {"prompt": "{}?"},
    ClassifyDataModule: {"text": "{}?", "label": "a"},
    FewShotDataModule: {"prompt": "{}?", "answers": ["yes"]},
    PretrainDataModule: {"text": "{}?"},
}


@st.composite
def lines(draw, good):
    """Lines of a file: some good ones, and some that are not."""
    texts = [json.dumps({k: v.format(i) if isinstance(v, str) else v for k, v in good.items()}) for i in range(12)]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.just(good) | st.just({})) | draw(st.dictionaries(NAMES, VALUE, max_size=3))
        raw = json.dumps(row).encode()
        if row and draw(st.integers(0, 3)) == 0:
            name = draw(st.sampled_from(sorted(row)))
            inside = draw(st.sampled_from([*DEEP, "9" * 5_000, "1e999", f'[{{"role": "user", "content": {DEEP[1]}}}]']))
            raw = json.dumps({**row, name: "HERE"}).replace('"HERE"', inside).encode()
        choices = [st.just(raw)] * 8 + [st.just(raw[: len(raw) // 2]), BYTES]
        texts.insert(draw(st.integers(0, len(texts))), draw(draw(st.sampled_from(choices))))
    return [text if isinstance(text, bytes) else text.encode() for text in texts]


def as_csv(rows, names):
    """The same as a CSV file; what is no record is a line of it."""
    file = io.StringIO(",".join(names) + "\n")
    file.seek(0, io.SEEK_END)
    writer = csv.writer(file)
    for row in rows:
        try:
            writer.writerow([json.loads(row).get(name) for name in names])
        except (ValueError, AttributeError, RecursionError):
            file.write(row.decode("utf-8", "replace") + "\n")
    return file.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def files(draw):
    """(data module, settings, name of the file, its bytes or what else is in its place)."""
    kind = draw(st.sampled_from(list(GOOD)))
    written = draw(lines(GOOD[kind]))
    name = draw(st.sampled_from(["d.jsonl"] * 6 + ["d.json", "d.csv", "d.txt", "d.parquet", "d", "d.npy", "d.bin"]))
    table = as_csv(written, [*GOOD[kind], draw(NAMES)])
    content = {"d.json": b"[" + b",".join(written) + b"]", "d.csv": table}.get(name, b"\n".join(written))
    if draw(st.integers(0, 7)) == 0:
        content = draw(BYTES | st.sampled_from(PLACES))
    extra = {"on_bad_record": draw(st.sampled_from(["fail", "skip", "skip"]))}
    if draw(st.integers(0, 4)) == 0:
        extra["fields"] = {draw(NAMES): draw(st.sampled_from(["a.b", "prompt", "messages", "", ".", "x"]))}
    if kind is not PretrainDataModule and draw(st.booleans()):
        extra["held_out"] = draw(st.sampled_from([1e-9, 0.3, 0.999]))
    return kind, extra, name, content


def test_records(folder, ends_well):
    tokenizer = train_bpe(["What is 12 + 30? It is 42. yes no"] * 3, 300)

    @tries(RECORDS)
    @given(files())
    def check(drawn):
        kind, extra, name, content = drawn
        file = folder / name
        become(file, "nothing" if isinstance(content, bytes) else content)
        if isinstance(content, bytes):
            file.write_bytes(content)
        extra |= {"block_size": 4} if kind is PretrainDataModule else {}
        with ends_well(naming=name):
            data = kind(path=str(file), tokenizer=tokenizer, **extra)
            data.prepare_data()
            data.setup("fit")
            data.for_module()

    check()


# ---------------------------------------------------------------- model folders

SMALL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NASTY = st.sampled_from([None, True, -1, 0, 1, 10**30, 1e308, float("nan"), "", "x", [], {}, [[]], {"a": 1}, "\ud83d"])


@st.composite
def damages(draw, model):
    """(file of the folder, its bytes or what else is in its place)."""
    file = draw(st.sampled_from(sorted(f for f in model.iterdir() if f.is_file())))
    data = file.read_bytes()
    how = draw(st.sampled_from(["field"] * 6 + ["cut", "scrambled", "bytes", "place"]))
    if how == "field" and file.suffix == ".json":
        values = json.loads(data)
        node, keys = values, []
        while isinstance(node, dict) and node and (not keys or draw(st.booleans())):
            keys.append(draw(st.sampled_from(sorted(node))))
            inside, node = node, node[keys[-1]]
        if draw(st.integers(0, 4)):
            inside[keys[-1]] = draw(NASTY)
        else:
            del inside[keys[-1]]
        return file.name, json.dumps(values).encode()
    if how == "place":
        return file.name, draw(st.sampled_from(PLACES))
    if how == "bytes":
        return file.name, draw(BYTES | st.just(save({})))
    at = draw(st.integers(0, len(data)))
    return file.name, data[:at] + (
        draw(st.binary(min_size=1, max_size=8)) + data[at + 4 :] if how == "scrambled" else b""
    )


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_model_folders(kind, folder, ends_well):
    tokenizer = train_bpe(["What is 12 + 30? It is 42."] * 3, 300)
    make = policy_from_config if kind == "policy" else reward_model_from_config
    save_model(make(SMALL, tokenizer), tokenizer, folder / "whole")

    @tries(MODELS)
    @given(damages(folder / "whole"))
    def check(drawn):
        name, content = drawn
        shutil.rmtree(folder / "model", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "model")
        become(folder / "model" / name, "nothing" if isinstance(content, bytes) else content)
        if isinstance(content, bytes):
            (folder / "model" / name).write_bytes(content)
        with ends_well(naming="model"):
            read = load_tokenizer(folder / "model")
            (load_policy if kind == "policy" else load_reward_model)(folder / "model", read)

    check()
