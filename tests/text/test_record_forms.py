"""The forms in which people have their records: what is read, what is said of the rest."""

import json
import math

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import (
    files_of,
    load_records,
    parse_demonstration,
    parse_feedback,
    parse_labelled,
    parse_prompt,
    parse_prompt_record,
    parse_ranking,
    parse_task,
    parse_text,
    prompt_key,
    rankings_of_feedback,
    read_pieces,
    text_of,
    write_jsonl,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 12}}}
TOOLS = [{"type": "function", "function": {"name": "multiply", "parameters": {"type": "object", "properties": {}}}}]


# ShareGPT


def test_sharegpt_is_read():
    turns = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    found = parse_demonstration({"conversations": turns})
    assert found.messages == [{"role": "system", "content": "Be short."}, user("Hi"), assistant("Ho")]
    assert found.context == 0 and found.tools is None
    assert parse_prompt({"conversations": turns}) == found.messages[:2]
    beside = parse_demonstration({"conversations": turns[1:], "system": "Be short."})
    assert beside.messages == found.messages
    with pytest.raises(ValueError, match="two system messages"):
        parse_demonstration({"conversations": turns, "system": "Be long."})


def test_tools_of_sharegpt_become_those_of_a_template():
    turns = [
        {"from": "human", "value": "What is 2 times 12?"},
        {"from": "function_call", "value": json.dumps({"name": "multiply", "arguments": {"a": 2, "b": 12}})},
        {"from": "observation", "value": "24"},
        {"from": "gpt", "value": "It is 24."},
    ]
    found = parse_demonstration({"conversations": turns, "tools": json.dumps(TOOLS)})
    assert found.tools == TOOLS
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages[2] == {"role": "tool", "content": "24"}
    turns[1]["value"] = "multiply 2 and 12"
    with pytest.raises(ValueError, match="has a function_call that is not JSON"):
        parse_demonstration({"conversations": turns})


# OpenAI


def test_messages_with_tools_keep_what_a_template_reads():
    said = {"role": "tool", "name": "multiply", "tool_call_id": "1", "content": "24"}
    called = {**assistant(None), "tool_calls": [CALL]}
    messages = [{"role": "developer", "content": "Use tools."}, user("2 times 12?"), called, said, assistant("24.")]
    found = parse_demonstration({"messages": messages, "tools": TOOLS})
    assert (found.messages, found.tools) == (messages, TOOLS)
    assert parse_prompt({"messages": messages[:4]}) == messages[:4]  # a prompt may end with what a tool said


def test_arguments_as_a_text_become_an_object():  # OpenAI writes them so, templates want them as they were meant
    written = {"id": "1", "type": "function", "function": {"name": "multiply", "arguments": '{"a": 2, "b": 12}'}}
    messages = [user("q"), {**assistant(None), "tool_calls": [written]}]
    assert parse_demonstration({"messages": messages}).messages[1]["tool_calls"] == [{**CALL, "id": "1"}]
    old = [user("q"), {**assistant(None), "function_call": written["function"]}]  # before there were several
    assert parse_demonstration({"messages": old}).messages[1]["tool_calls"] == [CALL]
    written["function"]["arguments"] = "{a: 2}"
    with pytest.raises(ValueError, match="a call of multiply whose arguments are not JSON"):
        parse_demonstration({"messages": messages})


def test_content_in_parts_is_kept():
    parts = [{"type": "text", "text": "Spell "}, {"type": "text", "text": "it."}]
    found = parse_demonstration({"messages": [user(parts), assistant("I T")]})
    assert found.messages[0] == user(parts) and text_of(found.messages[0]) == "Spell it."
    assert prompt_key(found.messages[:1]) == prompt_key([user("Spell it.")])
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(ValueError, match=r"'messages' has content of the type 'image_url'; parts of text were"):
        parse_demonstration({"messages": [user(picture), assistant("A cat.")]})


def test_null_is_as_good_as_absent():  # Parquet gives each message the fields of all
    empty = {"tool_calls": None, "name": None}
    row = {"messages": [{**user("q"), **empty}, {**assistant("a"), **empty}], "conversations": None, "tools": None}
    assert parse_demonstration(row).messages == [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("parse", "row"),
    [
        (parse_demonstration, {"prompt": "q", "output": "a"}),
        (parse_prompt, {"prompt": "q"}),
        (parse_ranking, {"prompt": "q", "chosen": "a", "rejected": "b"}),
        (parse_ranking, {"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]}),
        (parse_ranking, {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -1}),
        (parse_feedback, {"prompt": "q", "completion": "a", "label": True}),
        (parse_feedback, {"prompt": "q", "response": "a", "helpfulness": 4}),
        (parse_task, {"prompt": "q", "answers": ["a"]}),
        (parse_labelled, {"premise": "q", "hypothesis": "a", "label": 1}),
    ],
)
def test_rows_of_a_table_have_the_columns_of_all_forms(tmp_path, parse, row):
    columns = (
        "instruction prompt context response completion output messages chosen rejected responses ranks scores "
        "annotator completions response_1 response1 rating label helpfulness kind models choices text_a premise "
        "hypothesis answers"
    )
    found = []
    for values in (row, {**dict.fromkeys(columns.split()), **row}):
        write_jsonl(tmp_path / "x.jsonl", [values])
        found += load_records(tmp_path / "x.jsonl", parse).records
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("q"), assistant("")], r"'messages' has an empty turn of the assistant \(message 2\)"),
        ([user(" "), assistant("a")], r"'messages' has an empty turn of the user \(message 1\)"),
        ([user("q"), assistant(None)], "each message needs 'role' and 'content'"),
        ([user("q"), {**assistant("a"), "tool_calls": "multiply"}], "has the tool_calls 'multiply'; a list was"),
        ([user("q"), {**assistant("a"), "tool_calls": [{"function": {}}]}], "'function' with 'name' and 'arguments'"),
        ([user("q"), assistant("a"), {"role": "tool", "content": "x"}], "ends with a turn of the tool"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        parse_demonstration({"messages": messages})


def test_a_conversational_completion_keeps_all_its_turns():
    turns = [{**assistant(None), "tool_calls": [CALL]}, {"role": "tool", "content": "24"}, assistant("24.")]
    found = parse_demonstration({"prompt": [user("q")], "completion": turns})
    assert parse_demonstration({"prompt": [user("q")], "completion": [user("q"), *turns]}) == found  # some repeat it
    assert found.messages == [user("q"), *turns] and found.context == 1


# Preferences


def test_kto_rows_are_thumbs():
    row = {"prompt": "q", "completion": "a"}
    assert [parse_feedback({**row, "label": label}).rating for label in (True, False, "True", "false", 1, 0, 0.0)] == [
        1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0
    ]  # fmt: skip
    talk = {"prompt": [user("q")], "completion": [assistant("a")], "label": True}
    assert parse_feedback(talk) == parse_feedback({**row, "label": True})
    with pytest.raises(ValueError, match="'label' is 'good'; true or false was expected"):
        parse_feedback({**row, "label": "good"})
    with pytest.raises(ValueError, match=r"one answer with a rating or a label is feedback .* reward.data.feedback="):
        parse_ranking({**row, "label": True})
    with pytest.raises(ValueError, match=r"reward.data.feedback= .*, DPO none"):  # HelpSteer's
        parse_ranking({"prompt": "q", "response": "a", "helpfulness": 3})


def test_helpsteer_is_rated_by_its_helpfulness(tmp_path):
    row = {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4, "verbosity": 1}
    assert parse_feedback(row).rating == 3.0
    write_jsonl(tmp_path / "h.jsonl", [row])
    loaded = load_records(tmp_path / "h.jsonl", parse_feedback)
    assert loaded.unread == ["correctness", "verbosity"]
    loaded = load_records(tmp_path / "h.jsonl", parse_feedback, fields={"rating": "correctness"})
    assert loaded.records[0].rating == 4.0 and sorted(loaded.unread) == ["helpfulness", "verbosity"]


@pytest.mark.parametrize(("strength", "ranks"), [(-3, [1, 2]), (2, [2, 1]), (0, [1, 1])])
def test_preference_strength_ranks_two_responses(strength, ranks):
    row = {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": strength}
    assert (parse_ranking(row).responses, parse_ranking(row).ranks) == (["x", "y"], ranks)
    assert parse_ranking(row).margins is None
    first, second = parse_ranking(row, score_margin=0.5).margins
    assert abs(first - second) == 0.5 * abs(strength) and (first > second) == (ranks == [1, 2])
    third = {"context": [user("q")], "response1": "x", "response2": "y", "overall_preference": strength}
    assert parse_ranking(third) == parse_ranking(row)


def test_ultrafeedback_binarized():
    talk = [user("q"), assistant("x")]
    row = {
        "prompt": "q", "prompt_id": "7", "chosen": talk, "rejected": [user("q"), assistant("y")], "messages": talk,
        "score_chosen": 8.5, "score_rejected": 6.0,
    }  # fmt: skip
    found = parse_ranking(row)
    assert (found.prompt, found.responses, found.ranks, found.margins) == ([user("q")], ["x", "y"], [1, 2], None)
    assert parse_ranking(row, score_margin=0.2).margins == pytest.approx([1.7, 1.2])
    with pytest.raises(ValueError, match=r"answer 1 is ranked above answer 2 and has the lower score \(5 and 6\)"):
        parse_ranking({**row, "score_chosen": 5}, score_margin=0.2)


def test_ultrafeedback_as_it_was_collected():
    def completion(text, score=None, ratings=(), model="m"):
        aspects = {f"a{i}": {"Rating": rating} for i, rating in enumerate(ratings)}
        return {"response": text, "model": model, "overall_score": score, "annotations": aspects}

    completions = [completion("x", 7.5), completion("y", None, ["4", "5", "N/A"], "n"), completion("x", 8.5)]
    found = parse_ranking({"instruction": "q", "models": ["m", "n", "m"], "completions": completions}, score_margin=2.0)
    assert (found.responses, found.ranks) == (["x", "y"], [1, 2])  # x: (7.5 + 8.5) / 2, y: (4 + 5) / 2
    assert found.margins == [16.0, 9.0] and found.lineage == {"models": ["m", "n"]}
    with pytest.raises(ValueError, match="'completions' holds 1 different answers; two or more were expected"):
        parse_ranking({"instruction": "q", "completions": completions[::2]})
    with pytest.raises(ValueError, match="'overall_score', or 'annotations', was expected"):
        parse_ranking({"prompt": "q", "completions": [{"response": "a", "annotations": [1]}, {"response": "b"}]})
    with pytest.raises(ValueError, match="'overall_score', or 'annotations', was expected"):
        parse_ranking({"instruction": "q", "completions": [completion("x"), completion("y")]})


def test_scores_rank_where_there_are_no_ranks():
    row = {"prompt": "q", "responses": ["x", "y", "z"], "scores": [0.5, 2, 0.5]}
    assert parse_ranking(row).ranks == [2, 1, 2]
    assert parse_ranking({**row, "ranks": [3, 1, 2]}).ranks == [3, 1, 2]
    with pytest.raises(ValueError, match="'scores' is nan; a number per response was expected"):
        parse_ranking({**row, "scores": [0.5, math.nan, 1]})


def test_a_margin_is_that_of_its_pair():
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "margin": 3}
    assert parse_ranking(row).margins is None  # for a stage that has none in its loss
    assert parse_ranking(row, margin=True).margins == [3.0, 0.0]
    swapped = {"prompt": "q", "responses": ["x", "y"], "ranks": [2, 1], "margin": 3}
    assert parse_ranking(swapped, margin=True).margins == [0.0, 3.0]
    for wrong in (-1, "much", math.nan, True, 10**400):
        with pytest.raises(ValueError, match=r"'margin' is .*; a number from 0 up was expected"):
            parse_ranking({**row, "margin": wrong}, margin=True)
    with pytest.raises(ValueError, match="'margin' is for two answers, and there are 3"):
        parse_ranking({"prompt": "q", "responses": ["x", "y", "z"], "ranks": [1, 2, 3], "margin": 1}, margin=True)


SYSTEM = {"role": "system", "content": "Be polite."}
OTHER = {"role": "system", "content": "Be rude."}
TALK = [user("q"), assistant("yes"), user("sure?")]


def test_answers_keep_what_a_template_reads():
    call, thought = {**assistant(""), "tool_calls": [CALL]}, {**assistant("x"), "reasoning_content": "deep"}
    pair = parse_ranking({"prompt": "q", "chosen": [call], "rejected": [thought]})
    assert (pair.turns, pair.ranks) == ([call, thought], [1, 2])
    shallow = {**thought, "reasoning_content": "shallow"}
    other = parse_ranking({"chosen": [user("q"), thought], "rejected": [user("q"), shallow]})
    assert (other.turns, other.ranks, other.responses) == ([thought, shallow], [1, 2], ["x", "x"])
    rated = [parse_feedback({"prompt": "q", "completion": [m], "label": m is call}) for m in (call, thought, shallow)]
    [ranking] = rankings_of_feedback([*rated, parse_feedback({"messages": [user("q"), thought], "label": True})])
    assert (ranking.turns, ranking.ratings) == ([call, thought, shallow], [1.0, 0.5, 0.0])


def pair(prompt, chosen, rejected):
    """Messages before each answer; None: the answer alone, as a text."""
    said = [text if turns is None else [*turns, assistant(text)] for turns, text in ((chosen, "x"), (rejected, "y"))]
    return {**prompt, "chosen": said[0], "rejected": said[1]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (pair({"prompt": "q"}, TALK[1:], TALK[1:]), TALK),
        (pair({"prompt": "q"}, TALK, TALK), TALK),
        (pair({}, TALK, TALK), TALK),
        (pair({"prompt": "q"}, [SYSTEM, user("q")], [SYSTEM, user("q")]), [SYSTEM, user("q")]),
        (pair({"prompt": [SYSTEM, user("q")]}, [user("q")], None), [SYSTEM, user("q")]),
        (pair({"system": "Be polite."}, [user("q")], [user("q")]), [SYSTEM, user("q")]),
    ],
)
def test_what_both_answers_begin_with_is_the_prompt(row, prompt):
    found = parse_ranking(row)
    assert (found.prompt, found.responses, found.answers) == (prompt, ["x", "y"], None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair({"prompt": "q"}, TALK, None), "part before their last turns, and single answers are compared; end each"),
        (pair({}, TALK, [user("q")]), "'chosen' and 'rejected' part before their last turns"),
        (
            pair({"prompt": "q"}, [SYSTEM, user("q")], None),
            "'chosen' and 'rejected' do not have the same system message",
        ),
        (pair({"prompt": "q"}, [SYSTEM, user("q")], [OTHER, user("q")]), "give it to both, or to the prompt alone"),
        (
            pair({"prompt": [OTHER, user("q")]}, [SYSTEM, user("q")], None),
            "two system messages: 'Be polite.' in 'chosen'",
        ),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        parse_ranking(row)


def test_a_rating_is_of_one_answer():
    with pytest.raises(ValueError, match="3 turns have one rating, and it is for one answer"):
        parse_feedback({"prompt": "q", "completion": [*TALK[1:], assistant("x")], "label": True})


def test_pairs_of_sharegpt():
    row = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"},
    }  # fmt: skip
    assert (parse_ranking(row).prompt, parse_ranking(row).responses) == ([user("q")], ["x", "y"])


# Names of the user's own, and what nobody reads


def load(tmp_path, rows, parse, **settings):
    write_jsonl(tmp_path / "x.jsonl", rows)
    return load_records(tmp_path / "x.jsonl", parse, **settings)


def test_other_names(tmp_path):
    rows = [{"question": "q", "info": {"answer": "a", "by": "me"}, "id": 3}]
    fields = {"prompt": "question", "response": "info.answer"}
    loaded = load(tmp_path, rows, parse_demonstration, fields=fields)
    assert loaded.records[0].messages == [user("q"), assistant("a")]
    assert loaded.unread == ["info.by", "id"]
    with pytest.raises(UserError, match=r"x.jsonl:1: no field 'prompt', looked for as 'query' \(it has question, info"):
        load(tmp_path, rows, parse_demonstration, fields={"prompt": "query"})
    with pytest.raises(UserError, match=r"or 'output', looked for as 'info.answr' among its fields"):
        load(tmp_path, rows, parse_demonstration, fields={"prompt": "question", "response": "info.answr"})


def test_a_name_that_hides_the_files_own(tmp_path):
    loaded = load(tmp_path, [{"prompt": "no", "better": "yes"}], parse_prompt, fields={"prompt": "better"})
    assert loaded.records == [[user("yes")]] and loaded.unread == ["prompt (the file's own)"]


def test_fields_that_nobody_reads_are_named_once(tmp_path):
    rows = [{"prompt": "q", "response": "a", "id": i, "source": None if i else "web"} for i in range(3)]
    rows.append({"prompt": "q", "response": "a", "output": "other"})
    assert load(tmp_path, rows, parse_demonstration).unread == ["id", "source", "output"]
    talk = [{"messages": [{**user("q"), "weight": 0, "name": "me"}, assistant("a")]}]
    loaded = load(tmp_path, talk, parse_demonstration)
    assert (loaded.unread, loaded.passed_on) == ([], [])
    assert load(tmp_path, [{"prompt": talk[0]["messages"][:1]}], parse_prompt).passed_on == ["weight"]
    assert load(tmp_path, [{"prompt": "q", "response": "a", "weight": 2}], parse_demonstration).unread == ["weight"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("q"), {**assistant("a"), "weight": 0.5}], "the weight 0.5; 0 .not learned. or 1 was expected"),
        ([user("q"), {**assistant("a"), "weight": True}], "the weight True"),
        ([user("q"), {**assistant("a"), "weight": "1"}], "the weight '1'"),
        ([{**user("q"), "weight": 1}, assistant("a")], "a message of the user has the weight 1"),
        ([user("q"), {**assistant("a"), "weight": 0}], "every turn of the assistant has weight 0"),
    ],
)
def test_weights_that_are_none(tmp_path, messages, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [{"messages": messages}], parse_demonstration)
    loaded = load(tmp_path, [{"prompt": "q", "difficulty": 3}], parse_prompt_record)
    assert loaded.unread == ["difficulty"] and loaded.records[0].others == {"difficulty": 3}


def test_what_our_own_stages_write_is_no_news(tmp_path):
    drawn = {"prompt": [user("q")], "responses": ["x", "y"], "ranks": [1, 2], "round": 0, "sampling": {}}
    assert load(tmp_path, [{**drawn, "split": "train", "equal": 0}], parse_ranking).unread == []
    judged = {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2], "item": "7", "turn": 1, "shown": [0, 1]}
    assert load(tmp_path, [{**judged, "seconds": 2.0, "note": ""}], parse_ranking).unread == []
    assert load(tmp_path, [{"prompt": "q", "response": "a", "note": "n"}], parse_demonstration).unread == ["note"]


# Several files


def test_patterns_name_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[1].jsonl"):
        (tmp_path / name).write_text("x")
    assert files_of(f"{tmp_path}/[ab].jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert files_of([f"{tmp_path}/c.txt", f"{tmp_path}/?.jsonl"]) == [
        f"{tmp_path}/c.txt", f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    ]  # fmt: skip
    assert files_of(f"{tmp_path}/[1].jsonl") == [f"{tmp_path}/[1].jsonl"]  # it is there under this very name
    assert files_of(["Anthropic/hh-rlhf", tmp_path / "missing.jsonl"])[0] == "Anthropic/hh-rlhf"
    with pytest.raises(UserError, match=r"\*.csv: no file matches"):
        files_of(f"{tmp_path}/*.csv")


# Bad input: one line with file and line, never a traceback


DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"text": "a"}\n' + DEEP, 2, "lists or objects in each other, thousands deep"),
        ('{"text": "a"}\n{"text": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}", 2, "thousands deep"),
        ('{"text": "a"}\n{"text": ' + LONG + "}", 2, "a whole number of thousands of digits"),
        ('{"text": "a"}\n{"text": ' + "[" * 900 + "]" * 900 + "}", 2, "a non-empty string was expected"),
        ('{"text": "a"}\n{"text": NaN}', 2, "'text' is nan; a non-empty string was expected"),
        ('{"text": "a"}\n{"text": Infinity}', 2, "'text' is inf; a non-empty string was expected"),
    ],
)
def test_json_that_breaks_readers(tmp_path, text, line, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        load_records(tmp_path / "x.jsonl", parse_text)
    assert str(error.value).startswith(f"{tmp_path}/x.jsonl:{line}: ") and message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert load_records(tmp_path / "x.jsonl", parse_text, "skip").records == ["a"]
    (tmp_path / "x.json").write_text("[" + text.replace("\n", ",\n") + "]")
    with pytest.raises(UserError) as error:
        load_records(tmp_path / "x.json", parse_text)
    assert message in str(error.value) and str(error.value).startswith(
        (f"{tmp_path}/x.json:2: ", f"{tmp_path}/x.json: record 2: ")
    )


@pytest.mark.parametrize("rating", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, '"many"', "null", "[]"])
def test_ratings_that_are_no_numbers(tmp_path, rating):
    (tmp_path / "x.jsonl").write_text(f'{{"prompt": "q", "response": "a", "rating": {rating}}}\n')
    with pytest.raises(UserError, match=r"x.jsonl:1: (no field )?'rating'"):
        load_records(tmp_path / "x.jsonl", parse_feedback)


def test_ranks_of_hundreds_of_digits(tmp_path):
    row = f'{{"prompt": "q", "responses": ["x", "y"], "ranks": [1, {"9" * 400}]}}'
    (tmp_path / "x.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"x.jsonl:1: 'ranks' is .*whole numbers from 1 \(best\) up were expected"):
        load_records(tmp_path / "x.jsonl", parse_ranking)


def test_what_is_no_file_is_named(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.jsonl")  # reading it would wait for ever
    with pytest.raises(UserError, match=r"x.jsonl: is a pipe or a device; a file was expected"):
        load_records(tmp_path / "x.jsonl", parse_text)
    for name in ("x.csv", "x.txt"):  # a disk that fails: reading gives EIO, to the superuser as well
        (tmp_path / name).symlink_to("/proc/self/mem")
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(Input/output error\)"):
            load_records(tmp_path / name, parse_text)
    with pytest.raises(UserError, match=r"x.txt: cannot be read \(Input/output error\)"):
        list(read_pieces(tmp_path / "x.txt"))
    (tmp_path / "b.jsonl").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"b.jsonl:\d+: not "):
        load_records(tmp_path / "b.jsonl", parse_text)
    (tmp_path / "u.jsonl").write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(UserError, match=r"u.jsonl:1: not UTF-8 \(byte 0xff\); save it as UTF-8 \(iconv -f utf-16"):
        load_records(tmp_path / "u.jsonl", parse_text)
    with pytest.raises(UserError, match="no such file"):
        load_records("x" * 5000 + ".jsonl", parse_text)


def test_turns_of_the_assistant_in_a_row_are_counted(tmp_path):
    rows = [{"messages": [user("q"), assistant("a"), assistant("b")]}] * 2 + [{"prompt": "q", "response": "a"}]
    rows.append({"messages": [user("q"), assistant("a"), {**assistant("b"), "weight": 0}]})
    [(line, count)] = load(tmp_path, rows, parse_demonstration).seen.remarks.items()
    assert "two turns of the assistant stand in a row, and each is learned" in line and count == 2


def test_transcripts_that_part_early_are_counted(tmp_path):
    early = [f"\n\nHuman: q\n\nAssistant: {a}\n\nHuman: more\n\nAssistant: z" for a in "xy"]
    late = [f"\n\nHuman: q\n\nAssistant: {a}" for a in "xy"]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in (early, early, late, late[:1] + early[1:])]
    [(line, count)] = load(tmp_path, rows, parse_ranking).seen.remarks.items()
    assert "the transcripts part before their last answer: what follows" in line and count == 3


def test_a_greeting_of_the_assistants_answers_nothing():
    greeting, rest = {"role": "assistant", "content": "Hi!"}, [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="nothing stands before a turn of the assistant; give it the weight 0"):
        parse_demonstration({"messages": [greeting, *rest]})
    system = {"role": "system", "content": "Be."}
    with pytest.raises(ValueError, match="only a system message stands before a turn of the assistant"):
        parse_demonstration({"messages": [system, greeting, *rest]})
    assert len(parse_demonstration({"messages": [{**greeting, "weight": 0}, *rest]}).messages) == 3
