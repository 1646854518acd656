import csv
import json
import math
import random

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import (
    Demonstration,
    load_records,
    parse_demonstration,
    parse_feedback,
    parse_prompt,
    parse_ranking,
    parse_text,
    prompt_key,
    rankings_of_feedback,
    split_by_prompt,
    write_jsonl,
)
from lit_rlhf.text.records.fields import inside
from lit_rlhf.text.records.messages import parse_transcript
from lit_rlhf.text.records.split import is_held_out

PROMPT = [{"role": "user", "content": "q"}]
DIALOGUE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]
TRANSCRIPT = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"


OPEN = [  # what people say may look like a transcript
    "Human: Why?", "Assistant:", "Human: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: I obey.\n\nHuman: and now?",
    f"q{TRANSCRIPT}",
]  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# What a record may look like


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "q"}, PROMPT),
        ({"prompt": " q ", "other": 1}, [user(" q ")]),
        ({"prompt": DIALOGUE}, DIALOGUE),
        ({"messages": DIALOGUE}, DIALOGUE),
        ({"messages": [*DIALOGUE, assistant("a2")]}, DIALOGUE),
        ({"instruction": "i", "input": "x"}, [user("i\n\nx")]),
        ({"instruction": "i", "input": ""}, [user("i")]),
        ({"instruction": "i", "input": None}, [user("i")]),
        ({"instruction": "i"}, [user("i")]),
        ({"prompt": TRANSCRIPT}, DIALOGUE[1:]),
        *(({"prompt": text}, [user(text)]) for text in OPEN),
        ({"prompt": "Human rights: which?"}, [user("Human rights: which?")]),
    ],
)
def test_prompt(row, messages):
    assert parse_prompt(row) == messages


@pytest.mark.parametrize(
    ("row", "messages", "context"),
    [
        ({"prompt": "q", "response": "a"}, [*PROMPT, assistant("a")], 1),
        ({"prompt": "q", "completion": " a\n"}, [*PROMPT, assistant(" a\n")], 1),
        ({"prompt": "q", "output": "a"}, [*PROMPT, assistant("a")], 1),
        ({"instruction": "i", "input": "x", "output": "a"}, [user("i\n\nx"), assistant("a")], 1),
        ({"prompt": DIALOGUE, "response": "a2"}, [*DIALOGUE, assistant("a2")], 4),
        ({"prompt": PROMPT, "completion": [assistant("a")]}, [*PROMPT, assistant("a")], 1),  # conversational, as in TRL
        ({"messages": [*DIALOGUE, assistant("a2")]}, [*DIALOGUE, assistant("a2")], 0),
        ({"messages": [{**user("q"), "name": "x"}, assistant("a")]}, [{**user("q"), "name": "x"}, assistant("a")], 0),
    ],
)
def test_demonstration(row, messages, context):
    assert parse_demonstration(row) == Demonstration(messages, context)


def test_ranking():
    row = {"prompt": "q", "responses": ["x", "y", ""], "ranks": [2, 1, 1], "annotator": "me", "model": "sft", "n": 3}
    ranking = parse_ranking(row)
    assert (ranking.prompt, ranking.responses, ranking.ranks) == (PROMPT, ["x", "y", ""], [2, 1, 1])
    assert (ranking.annotator, ranking.lineage) == ("me", {"model": "sft"})


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "q", "chosen": "x", "rejected": "y"}, PROMPT, ["x", "y"]),
        ({"prompt": DIALOGUE, "chosen": "x", "rejected": ""}, DIALOGUE, ["x", ""]),
        ({"prompt": "q", "chosen": OPEN[0], "rejected": OPEN[2]}, PROMPT, [OPEN[0], OPEN[2]]),
        ({"instruction": "i", "chosen": "x", "rejected": "y"}, [user("i")], ["x", "y"]),
        # conversational, as in TRL: with the prompt apart, and with the prompt in both
        ({"prompt": PROMPT, "chosen": [assistant("x")], "rejected": [assistant("y")]}, PROMPT, ["x", "y"]),
        ({"prompt": DIALOGUE, "chosen": TRANSCRIPT, "rejected": [*DIALOGUE, assistant("y")]}, DIALOGUE, ["", "y"]),
        ({"chosen": [*DIALOGUE, assistant("x")], "rejected": [*DIALOGUE, assistant("y")]}, DIALOGUE, ["x", "y"]),
        ({"chosen": [*PROMPT, assistant("x")], "rejected": [*PROMPT, assistant("x")]}, PROMPT, ["x", "x"]),
        # whole transcripts, as in hh-rlhf
        ({"chosen": TRANSCRIPT + " x", "rejected": TRANSCRIPT + " y"}, DIALOGUE[1:], ["x", "y"]),
        ({"chosen": TRANSCRIPT + " x", "rejected": TRANSCRIPT}, DIALOGUE[1:], ["x", ""]),
        (  # they part before the last answer: what follows the shared prompt is the answer
            {
                "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: more\n\nAssistant: x",
                "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: less\n\nAssistant: y",
            },
            [user("q1")],
            ["a1\n\nHuman: more\n\nAssistant: x", "a1\n\nHuman: less\n\nAssistant: y"],
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: more\n\nAssistant: z",
                "rejected": "\n\nHuman: q\n\nAssistant: y",
            },
            PROMPT,
            ["x\n\nHuman: more\n\nAssistant: z", "y"],
        ),
    ],
)
def test_pair(row, prompt, responses):
    ranking = parse_ranking(row)
    ranks = [1, 1] if responses[0] == responses[1] else [1, 2]  # of two equal answers none is better
    assert (ranking.prompt, ranking.responses, ranking.ranks) == (prompt, responses, ranks)


def test_transcript():
    text = "\n\nHuman: a list:\n\n1. Human: not a turn\n\nAssistant:  two  spaces \n\nlines\n\nHuman: end"
    assert parse_transcript(text) == [
        user("a list:\n\n1. Human: not a turn"), assistant("two  spaces \n\nlines"), user("end")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="not a transcript"):
        parse_transcript("Once upon a time\n\nHuman: q")


def test_all_of_hh_rlhf_is_read(test_data):
    file = test_data / "hh-rlhf" / "harmless-base.jsonl"
    rankings = load_records(file, parse_ranking).records
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rankings) == len(rows) == 1812
    for row, ranking in zip(rows, rankings):
        assert ranking.prompt[0]["role"] == ranking.prompt[-1]["role"] == "user"
        for name, response in zip(("chosen", "rejected"), ranking.responses):
            # put together again, it is the transcript but for space around the turns
            turns = "".join(f"{'Human' if m['role'] == 'user' else 'Assistant'}:{m['content']}" for m in ranking.prompt)
            assert "".join(row[name].split()) == "".join(f"{turns}Assistant:{response}".split())


def test_real_instructions_are_read(test_data):
    folder = test_data / "instructions"
    demonstrations = load_records(folder / "instruction-data.json", parse_demonstration).records
    rows = json.loads((folder / "instruction-data.json").read_text(encoding="utf-8"))
    skipped = [row for row in rows if not row["output"].strip()]
    assert len(demonstrations) == len(rows) - len(skipped) == 1000
    for row, demonstration in zip(rows, demonstrations):
        question = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        assert demonstration == Demonstration([user(question), assistant(row["output"])], 1)
    assert len(load_records(folder / "instruction-data-with-preference.json", parse_ranking).records) == 1000


# Formats


ROWS = [{"prompt": 'a "quoted", text\nof two lines', "response": "x"}, {"prompt": "ünï 👍🏽", "response": "\u2028y\t"}]


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(path))


def write_windows(path, rows):
    path.write_bytes(("\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n").encode())


WRITERS = {
    "x.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8"),
    "raw.jsonl": write_jsonl,
    "windows.jsonl": write_windows,
    "x.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "x.CSV": write_csv,
    "x.parquet": write_parquet,
}


@pytest.fixture
def datasets_cache(monkeypatch, tmp_path):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, name, datasets_cache):
    WRITERS[name](tmp_path / name, ROWS)
    loaded = load_records(tmp_path / name, parse_demonstration)
    assert loaded.records == [Demonstration([user(r["prompt"]), assistant(r["response"])], 1) for r in ROWS]
    assert loaded.skipped == []


def test_prompts_that_are_read_as_transcripts_are_counted(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": text} for text in (*OPEN, TRANSCRIPT, TRANSCRIPT)])
    [(line, count)] = load_records(tmp_path / "x.jsonl", parse_prompt).seen.remarks.items()
    assert "'prompt' is a transcript from Human: to Assistant:, and is read as its turns" in line and count == 2


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_nested_fields(tmp_path, name, datasets_cache):
    WRITERS[name](tmp_path / name, [{"prompt": DIALOGUE, "responses": ["x", "y"], "ranks": [2, 1]}])
    (ranking,) = load_records(tmp_path / name, parse_ranking).records
    assert (ranking.prompt, ranking.responses, ranking.ranks) == (DIALOGUE, ["x", "y"], [2, 1])


@pytest.mark.parametrize("name", ["tools", "functions", "info.functions"])
def test_calls_of_parquet_have_their_own_arguments(tmp_path, name, datasets_cache):
    """Arrow gives each struct the fields of all, null where it has none; a null that JSON says is one."""

    def row(argument, default):
        parameters = {"type": "object", "properties": {argument: {"type": "integer"}}}
        call = {"type": "function", "function": {"name": f"with_{argument}", "arguments": {argument: default}}}
        talk = [*PROMPT, {"role": "assistant", "content": "", "tool_calls": [call]}]
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        *_, last = name.split(".")
        return {"messages": talk, **({"info": {last: tools}} if "." in name else {name: tools})}

    rows = [row("a", 1), row("b", 2)]
    write_parquet(tmp_path / "x.parquet", rows)
    fields = {"tools": name}
    for row_, found in zip(rows, load_records(tmp_path / "x.parquet", parse_demonstration, fields=fields).records):
        assert (found.messages, found.tools) == (row_["messages"], inside(row_, name))
    write_jsonl(tmp_path / "x.jsonl", [row("a", None), row("a", 1)])
    loaded = load_records(tmp_path / "x.jsonl", parse_demonstration, fields=fields)
    found, _ = loaded.records
    [(line, count)] = loaded.seen.remarks.items()
    assert "nulls inside calls and tools stand in what models read" in line and count == 1
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_plain_text_is_one_record(tmp_path):
    text = "two  spaces\n\n and a last line\n"
    assert load_records(write(tmp_path / "x.txt", text), parse_text).records == [text]


def test_blank_lines_are_no_records(tmp_path):
    assert load_records(write(tmp_path / "x.jsonl", '\n{"text": "a"}\n \n{"text": "b"}\n\n'), parse_text).records == [
        "a",
        "b",
    ]
    assert load_records(write(tmp_path / "x.csv", "text\na\n\nb\n"), parse_text).records == ["a", "b"]


def test_a_long_field_of_csv(tmp_path):
    text = "long " * 50_000
    write_csv(tmp_path / "x.csv", [{"text": text}])
    assert load_records(tmp_path / "x.csv", parse_text).records == [text]


# Bad input


def error(path, parse, on_bad_record="fail"):
    with pytest.raises(UserError) as caught:
        load_records(path, parse, on_bad_record)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parse", "row", "message"),
    [
        (
            parse_text,
            {"txt": "a"},
            "no field 'text' (it has txt); where the file calls it otherwise, set <stage>.data.fields='{text: NAME}'",
        ),
        (parse_text, {"text": " "}, "'text' is ' '; a non-empty string was expected"),
        (parse_text, {"text": 5}, "'text' is 5; a non-empty string was expected"),
        (parse_text, ["a"], "['a'] is not a record; an object with named fields was expected"),
        (parse_prompt, {}, "no field 'prompt' (it has none)"),
        (parse_prompt, {"prompt": None, "x": 1}, "no field 'prompt' (it has prompt (null), x)"),
        (parse_prompt, {"prompt": "\n"}, "'prompt' is empty"),
        (parse_prompt, {"prompt": []}, "'prompt' is []; a non-empty list of messages was expected"),
        (parse_prompt, {"prompt": [*PROMPT, assistant("a")]}, "'prompt' ends with a turn of the assistant"),
        (parse_prompt, {"messages": [assistant("a")]}, "'messages' has no turn of the user; a prompt ends with one"),
        (parse_prompt, {"prompt": DIALOGUE[:1]}, "'prompt' has no turn of the user"),
        (parse_prompt, {"messages": ["q"]}, "'messages' holds 'q'; each message needs 'role' and 'content'"),
        (parse_prompt, {"messages": [{"role": "user"}]}, "each message needs 'role' and 'content'"),
        (
            parse_prompt,
            {"messages": [{"role": "bot", "content": "q"}]},
            "has the role 'bot'; system, developer, user, assistant or tool was expected",
        ),
        (
            parse_prompt,
            {"conversations": [{"from": "bing", "value": "q"}]},
            "'conversations' has the speaker ('from') 'bing'; human, gpt, system, function_call or tool was expected",
        ),
        (parse_prompt, {"messages": [{"content": "q"}]}, "each message needs 'role' and 'content'"),
        (parse_prompt, {"instruction": ""}, "'instruction' is ''; a non-empty string was expected"),
        (parse_prompt, {"instruction": "i", "input": 5}, "'input' is 5; a string was expected"),
        (parse_demonstration, {"prompt": "q"}, "no 'response', 'completion' or 'output' among its fields (prompt)"),
        (parse_demonstration, {"prompt": "q", "response": " "}, "'response' is ' '; a non-empty string was expected"),
        (
            parse_demonstration,
            {"prompt": "q", "completion": None},
            "no 'response', 'completion' or 'output' among its fields (prompt, completion (null))",
        ),
        (parse_demonstration, {"messages": PROMPT}, "'messages' ends with a turn of the user"),
        (parse_ranking, {"prompt": "q"}, "no field 'responses' (it has prompt)"),
        (parse_ranking, {"prompt": "q", "responses": ["x", "y"]}, "no field 'ranks' (it has prompt, responses)"),
        (parse_ranking, {"responses": ["x", "y"], "ranks": [1, 2]}, "no field 'prompt'"),
        (
            parse_ranking,
            {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [1, 2]},
            "'ranks' has 2 entries for 3 responses. Give one rank per response (1 = best, ties allowed)",
        ),
        (
            parse_ranking,
            {"prompt": "q", "responses": ["x"], "ranks": [1]},
            "a list of two or more strings was expected",
        ),
        (
            parse_ranking,
            {"prompt": "q", "responses": "xy", "ranks": [1, 2]},
            "'responses' is 'xy'; a list of two or more",
        ),
        (
            parse_ranking,
            {"prompt": "q", "responses": ["x", "y"], "ranks": [0, 1]},
            "'ranks' is [0, 1]; whole numbers from 1",
        ),
        (parse_ranking, {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 1.5]}, "whole numbers from 1 (best) up"),
        (parse_ranking, {"prompt": "q", "responses": ["x", "y"], "ranks": [True, 2]}, "whole numbers from 1 (best) up"),
        (parse_ranking, {"prompt": "q", "chosen": "x"}, "no field 'rejected' (it has prompt, chosen)"),
        (parse_ranking, {"prompt": "q", "rejected": "x"}, "no field 'chosen' (it has prompt, rejected)"),
        (
            parse_ranking,
            {"prompt": "q", "chosen": "x", "rejected": 5},
            "'rejected' is 5; an answer or messages were expected",
        ),
        (
            parse_ranking,
            {"prompt": "Hi", "chosen": "\n\nHuman: Ho\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
            "'chosen' answers 'Ho', but 'prompt' is 'Hi'",
        ),
        (
            parse_ranking,
            {"prompt": "Hi", "chosen": [assistant("x")], "rejected": [user("Hu"), assistant("y")]},
            "'rejected' answers 'Hu', but 'prompt' is 'Hi'",
        ),
        (parse_ranking, {"chosen": "x", "rejected": "y"}, "no 'prompt', and 'chosen' is 'x', not a transcript"),
        (parse_ranking, {"chosen": "Human: a\n\nAssistant: b", "rejected": "y"}, "'rejected' is 'y', not a transcript"),
        (
            parse_ranking,
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
            "do not begin with the same turn of the user",
        ),
        (
            parse_ranking,
            {"chosen": "Assistant:", "rejected": "Assistant:"},
            "do not begin with the same turn of the user",
        ),
        (
            parse_ranking,
            {"chosen": [*PROMPT, user("x")], "rejected": [*PROMPT, user("y")]},
            "'chosen' ends with a turn of the user",
        ),
        (
            parse_ranking,
            {"prompt": "q", "chosen": [*PROMPT], "rejected": [assistant("y")]},
            "'chosen' ends with a turn of the user; it must end with the assistant's",
        ),
        (
            parse_ranking,
            {"chosen": f"{TRANSCRIPT} x", "rejected": f"{TRANSCRIPT} y\n\nHuman: and?"},
            "'rejected' ends with a turn of the user; it must end with the assistant's",
        ),
        (
            parse_ranking,
            {"prompt": "q", "responses": ["x", "y", "x"], "ranks": [1, 2, 3]},
            "responses 1 and 3 are the same text, 'x', with the ranks 1 and 3. Give equal answers one rank",
        ),
        (
            parse_ranking,
            {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2], "models": ["sft"]},
            "'models' is ['sft']; a list of 2, one per response, was expected",
        ),
        (
            parse_ranking,
            {"chosen": [DIALOGUE[0], user("x"), assistant("a")], "rejected": [DIALOGUE[0], user("y"), assistant("b")]},
            "do not begin with the same turn of the user",
        ),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_reason(tmp_path, parse, row, message):
    path = write(tmp_path / "x.jsonl", f"\n{json.dumps(row)}\n")
    found = error(path, parse)
    assert found.startswith(f"{path}:2: ") and message in found
    assert found.endswith(". Fix it, or set on_bad_record=skip (<stage>.data.on_bad_record).")


def test_the_first_bad_record_is_the_one_named(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": ""}\n{}\n')
    assert error(path, parse_text).startswith(f"{path}:3: 'text' is ''")


def test_a_record_a_line_in_a_json_file_is_told_its_name(tmp_path):
    path = write(tmp_path / "x.json", '{"text": "a"}\n{"text": "b"}\n')
    found = error(path, parse_text)
    assert found == f"{path}:2: not JSON (Extra data at column 1); one record per line is JSONL: name it .jsonl"


def test_wrong_json(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n\n{"text": "b"\n')
    assert error(path, parse_text).startswith(f"{path}:3: not JSON (Expecting ',' delimiter at column ")
    path = write(tmp_path / "x.json", '[{"text": "a"},\n {"text": "b",}]')
    assert error(path, parse_text).startswith(f"{path}:2: not JSON (")
    path = write(tmp_path / "y.json", '{"text": "a"}')
    assert error(path, parse_text) == f"{path}: holds {{'text': 'a'}}; a list of records was expected"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_not_utf8(tmp_path, name):
    text = '{"text": "one"}\n{"text": "two"}\ncaf\xe9 \n' if name.endswith("jsonl") else "one\ntwo\ncaf\xe9 \n"
    path = write(tmp_path / name, text.encode("latin-1"))
    assert error(path, parse_text).startswith(f"{path}:3: not UTF-8 (byte 0xe9); save it as UTF-8 (iconv ")


def test_half_an_emoji(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "\\ud83d\\udc4d"}\n{"text": "\\ud83d"}\n')
    assert error(path, parse_text).startswith(f"{path}:2: holds half a character ('\\ud83d')")
    assert load_records(path, parse_text, "skip").records == ["👍"]
    path = write(tmp_path / "x.json", '[{"text": "a"}, {"text": "\\udc4d"}]')
    assert error(path, parse_text).startswith(f"{path}: record 2: holds half a character")


def test_bad_csv(tmp_path):
    path = write(tmp_path / "x.csv", "prompt,response\na,b\nc\n")
    assert error(path, parse_demonstration).startswith(
        f"{path}:3: not as many fields as the header (['prompt', 'response'])"
    )
    path = write(tmp_path / "y.csv", "prompt,response\na,b,c\n")
    assert error(path, parse_demonstration).startswith(f"{path}:2: not as many fields")
    path = write(tmp_path / "z.csv", 'prompt,response\na,b\nc,"never closed\nd,e\nf,g\n')
    assert error(path, parse_demonstration).startswith(f"{path}:3: not CSV (")
    assert len(load_records(path, parse_demonstration, "skip").records) == 1


def test_bad_parquet(tmp_path, datasets_cache):
    path = write(tmp_path / "x.parquet", b"PAR1 not really")
    assert error(path, parse_text).startswith(f"{path}: not a Parquet file (")
    write_parquet(tmp_path / "y.parquet", [{"text": "a"}, {"text": ""}])
    assert error(tmp_path / "y.parquet", parse_text).startswith(f"{tmp_path / 'y.parquet'}: record 2: 'text' is ''")


@pytest.mark.parametrize(("name", "text"), [
    ("x.jsonl", ""), ("x.jsonl", "\n \n"), ("x.json", ""), ("x.json", "[]"), ("x.csv", ""), ("x.csv", "text\n"),
    ("x.txt", ""), ("x.txt", " \n"),
])  # fmt: skip
@pytest.mark.parametrize("on_bad_record", ["fail", "skip"])
def test_an_empty_file(tmp_path, name, text, on_bad_record):
    path = write(tmp_path / name, text)
    assert error(path, parse_text, on_bad_record) == f"{path}: no valid record: it is empty"


def test_no_valid_record(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n{"b": 1}\n')
    assert error(path, parse_text, "skip") == (
        f"{path}: no valid record; the first of 2 bad ones is {path}:1: no field 'text' (it has a); where the file "
        "calls it otherwise, set <stage>.data.fields='{text: NAME}'"
    )


def test_no_such_file(tmp_path):
    assert error(tmp_path / "x.jsonl", parse_text).startswith(
        f"{tmp_path / 'x.jsonl'}: no such file (the current folder is "
    )
    assert error("data/x.jsonl", parse_text).startswith("data/x.jsonl: no such file")  # no Hub name: it has a suffix
    assert error(tmp_path, parse_text).startswith(f"{tmp_path}: is a folder; a file was expected")
    path = write(tmp_path / "x.xlsx", "a")
    assert error(path, parse_text) == (
        f"{path}: cannot tell its format from '.xlsx'; use one of .jsonl, .json, .csv, .parquet, .txt"
    )


def test_a_hub_name_without_a_network():
    found = error("some-one/some.thing", parse_text)
    assert found.startswith("some-one/some.thing: no such file here, and as a Hub data set it could not be loaded (")
    assert found.endswith("Offline: download it elsewhere and give the path of the file.")


def test_skipped_records_are_counted_and_listed(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n{}\n"c"\n{"text": "d"}')
    loaded = load_records(path, parse_text, "skip")
    assert loaded.records == ["a", "b", "d"]
    assert [line.split(": ")[0] for line in loaded.skipped] == [f"{path}:{n}" for n in (2, 4, 5)]
    assert "not JSON" in loaded.skipped[0] and "no field 'text'" in loaded.skipped[1]


# The split


def prompts(count):
    return [[user(f"question {i}")] for i in range(count)]


def test_the_split_depends_on_the_prompt_and_the_seed_alone():
    everything = prompts(2000)
    shuffled = random.Random(0).sample(everything, 700)  # another file: fewer records, another order
    train, held_out = split_by_prompt(everything, lambda p: p, 0.1, seed=3)
    train2, held_out2 = split_by_prompt(shuffled * 2, lambda p: p, 0.1, seed=3)
    side = {prompt_key(p): "train" for p in train} | {prompt_key(p): "held out" for p in held_out}
    assert {side[prompt_key(p)] for p in train2} == {"train"}
    assert {side[prompt_key(p)] for p in held_out2} == {"held out"}
    assert train + held_out != everything and sorted(map(prompt_key, train + held_out)) == sorted(
        map(prompt_key, everything)
    )
    assert 150 < len(held_out) < 250  # 200 expected, standard deviation 13
    other = split_by_prompt(everything, lambda p: p, 0.1, seed=4)[1]
    assert sum(p in held_out for p in other) < 50  # 20 expected


def test_a_larger_fraction_holds_out_the_same_prompts_and_more():
    small, large = ([is_held_out(p, f, seed=0) for p in prompts(500)] for f in (0.1, 0.3))
    assert all(b for a, b in zip(small, large) if a) and sum(large) > 2 * sum(small)
    assert not any(is_held_out(p, 0.0, seed=0) for p in prompts(50))


def test_a_known_prompt_stays_on_its_side():  # across processes and versions: runs are resumed
    assert [is_held_out(p, 0.25, seed=1) for p in prompts(12)] == [
        False,
        True,
        False,
        False,
        False,
        False,
        False,
        False,
        False,
        False,
        False,
        True,
    ]


def test_folds_part_the_prompts_once():
    folds = [split_by_prompt(prompts(500), lambda p: p, 0.2, seed=1, fold=fold)[1] for fold in range(5)]
    assert sorted(p[0]["content"] for fold in folds for p in fold) == sorted(p[0]["content"] for p in prompts(500))
    assert min(map(len, folds)) > 70
    with pytest.raises(UserError, match=r"fold=5: held_out=0\.2 makes 5 folds, counted from 0"):
        split_by_prompt(prompts(500), lambda p: p, 0.2, seed=1, fold=5)


def test_too_few_records_to_split():
    with pytest.raises(UserError, match=r"there is one distinct prompt, and to hold one out takes two"):
        split_by_prompt(prompts(1), lambda p: p, 0.1, seed=0)
    assert split_by_prompt(prompts(3), lambda p: p, 0.0, seed=0) == (prompts(3), [])


def test_prompt_key_tells_roles_and_turns_apart():
    keys = [[user("a")], [assistant("a")], [user("a"), user("b")], [user('a"], ["user", "b')], [user("a\nb")]]
    assert len({prompt_key(messages) for messages in keys}) == 5


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "folder" / "x.jsonl"
    write_jsonl(path, [{"text": "ü"}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"text": "new"}, {"text": {1, 2}}])  # a set is not JSON
    assert path.read_text(encoding="utf-8") == '{"text": "ü"}\n'


def rated(prompt, response, rating, annotator=""):
    return parse_feedback({"prompt": prompt, "response": response, "rating": rating, "annotator": annotator})


def test_feedback_on_one_prompt_becomes_a_ranking_and_equal_ratings_tie():
    rankings = rankings_of_feedback(
        [rated("a?", "x", 1, "Ann"), rated("b?", "u", 1), rated("a?", "y", -1, "Bo"), rated("a?", "z", 1, "Ann")]
    )
    first, second = rankings
    assert (first.responses, first.ranks, first.ratings) == (["x", "y", "z"], [1, 3, 1], [1.0, 0.0, 1.0])
    assert first.annotator == "Ann+Bo" and first.prompt == [{"role": "user", "content": "a?"}]
    assert (second.responses, second.ranks, second.ratings) == (["u"], [1], [1.0])


def test_numbers_are_measured_between_the_lowest_and_the_highest_and_repeats_averaged():
    given = [rated("a?", "x", 2), rated("a?", "y", 5), rated("a?", "x", 3), rated("a?", "z", 1)]
    (ranking,) = rankings_of_feedback(given)
    assert ranking.ratings == [0.375, 1.0, 0.0]  # x: (0.25 + 0.5) / 2
    assert ranking.ranks == [2, 1, 3]


@pytest.mark.parametrize(
    ("given", "ratings"),
    [([1, 0], [1.0, 0.0]), ([0, 0.5], [0.0, 0.5]), ([1, 0, -1], [1.0, 0.5, 0.0]), ([0, 0], [0.0, 0.0])],
)
def test_ratings_without_a_negative_one_are_no_thumbs(given, ratings):
    [ranking] = rankings_of_feedback([rated("a?", f"x{i}", rating) for i, rating in enumerate(given)])
    assert ranking.ratings == ratings


def test_ratings_that_are_all_alike_are_refused_but_thumbs_are_not():
    with pytest.raises(UserError, match="all 2 ratings are 4"):
        rankings_of_feedback([rated("a?", "x", 4), rated("b?", "y", 4)])
    assert [r.ratings for r in rankings_of_feedback([rated("a?", "x", -1)])] == [[0.0]]


@pytest.mark.parametrize("rating", [None, True, "good", math.nan, [1]])
def test_a_rating_that_is_no_number_is_named(rating):
    with pytest.raises(ValueError, match="rating"):
        parse_feedback({"prompt": "a?", "response": "x", "rating": rating})
    assert parse_feedback({"prompt": "a?", "response": "x", "rating": "-1"}).rating == -1.0  # from a CSV file
