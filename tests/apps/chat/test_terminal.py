import io
import json

import pytest

from lit_rlhf.apps.chat.conversation import Conversation
from lit_rlhf.apps.chat.terminal import Terminal
from lit_rlhf.apps.display import printable


def session(conversation: Conversation, *lines: str) -> list[str]:
    sink = io.StringIO()
    Terminal(conversation, io.StringIO("".join(f"{line}\n" for line in lines)), sink).run()
    return sink.getvalue().splitlines()


def test_a_session_from_a_pipe(converse, judgements, tmp_path):
    talk = converse("ppo")
    file = tmp_path / "talk.json"
    shown = session(
        talk, "Who are you?", "/up", "/temp 0", "/temp warm", "/system You are the cat.", "/nope", f"/save {file}",
        "/help", "/new", f"/load {file}", "/quit", "never read",
    )  # fmt: skip
    text = json.loads(file.read_text())[-1]["content"]
    assert shown[0] == "Talking to ppo."
    assert shown[2] == "you: Who are you?"
    assert "\n".join(shown[3:]).startswith(f"ppo: {printable(text)}\n")
    for line in (
        f"[kept in {judgements.feedback_file}]", "[temperature 0]",
        "[temperature=warm: it should be a valid number, unable to parse string as a number]",
        "[system prompt: You are the cat.]", "[there is no /nope; /help lists what there is]", f"[saved to {file}]",
        "/quit    leave; so does Ctrl-D", "[a new conversation]",
    ):  # fmt: skip
        assert line in shown, line
    assert "\n".join(shown).endswith(f"you: Who are you?\nppo: {printable(text)}\nyou: /quit")
    assert talk.sampling.temperature == 0 and talk.system == "You are the cat."
    assert not any("never" in line for line in shown)
    assert json.loads(judgements.feedback_file.read_text())["rating"] == 1


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of a terminal in UTF-8, and in the C locale
def test_bytes_that_are_no_text_are_said_and_the_talk_goes_on(converse, errors):
    lines = b"\xff\xfe\n/system \xff\n\xf0\x9f cut\nWho are you?"
    sink = io.StringIO()
    talk = converse("ppo")
    Terminal(talk, io.TextIOWrapper(io.BytesIO(lines), "utf-8", errors), sink).run()
    assert sink.getvalue().count("[a text holds half a character ('\\udc") == 3
    assert talk.system == "" and [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_half_a_character_that_was_loaded_is_said(converse, tmp_path):
    turns = [{"role": "user", "content": "Hi \ud83d"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "talk.json").write_text(json.dumps(turns))
    shown = session(converse("ppo"), f"/load {tmp_path / 'talk.json'}", "And?", "/new", "Who are you?")
    assert any("half a character ('\\ud83d')" in line for line in shown)
    assert any(line.startswith("ppo: ") for line in shown[shown.index("you: Who are you?") :])


def test_two_models_blind(converse, judgements):
    talk = converse("ppo", "sft")
    shown = session(talk, "/a", "Who are you?", "/names", "/b")
    assert shown[0] == "Talking to two models, blind: ppo and sft."
    assert "[there are no two answers to choose from]" in shown
    a = next(i for i, line in enumerate(shown) if line.startswith("A: "))
    b = next(i for i, line in enumerate(shown) if line.startswith("B: "))
    named = next(line for line in shown if line.startswith("[A is "))
    assert a < b < shown.index(named)
    record = json.loads(judgements.labels_file.read_text())
    assert named == "[A is {}, B is {}]".format(*record["models"]) and record["ranks"] == [2, 1]
    assert record["blind"] is False  # the names stood there when the choice was made
    assert talk.messages[-1]["content"] == record["responses"][1]


def test_ctrl_c_stops_the_answer_and_not_the_program(converse):
    class Interrupting(io.StringIO):
        """Ctrl-C while the fourth piece of an answer is written, and once at the prompt."""

        pieces = 0

        def write(self, text):
            self.pieces += 1
            if self.pieces == 9:
                raise KeyboardInterrupt
            return super().write(text)

    talk = converse("ppo")
    sink = Interrupting()
    Terminal(talk, io.StringIO("Who are you?\n/tokens 3\n"), sink).run()
    assert "[stopped]\nyou: /tokens 3\n[up to 3 tokens per answer]" in sink.getvalue()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(converse, tmp_path):
    file = tmp_path / "talk.json"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\x1b[2J gone"}]
    file.write_text(json.dumps(turns))
    shown = session(converse("ppo"), f"/load {file}")
    assert "assistant: \\x1b[2J gone" in shown and not any("\x1b" in line for line in shown)


def test_a_long_conversation_says_what_it_leaves_out(converse):
    shown = session(converse("ppo"), *(f"Who are you? {i}" for i in range(7)))
    assert any(line.startswith("[the conversation is longer than the model's context: its 2 oldest") for line in shown)


MISTAKES = ["/regen", "/up", "/load /nowhere", "/save /nowhere/at/all", "/seed -3", "/top_p 2"]


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(converse, command):
    shown = session(converse("ppo"), command)
    assert len(shown) == 5 and shown[-2].startswith("[") and shown[-2].endswith("]")
