"""The judge's key: sent to the judge alone, and written nowhere."""

import json

import pytest
from judge_server import JudgeServer

from lit_rlhf.errors import UserError, scrubbed
from lit_rlhf.stages.preference import LLMJudge

CANARY = "sk-canary-7f3a90e1c2"
PROMPT, ANSWERS = [[{"role": "user", "content": "first?"}]], [["a", "bbb"]]


@pytest.fixture
def listen():
    """listen(status, body, headers) -> (address, the Authorization header of each request)."""
    servers = []

    def start(status, body="", **headers):
        seen = []

        def reply(request):
            seen.append(request.headers.get("Authorization"))
            return status, body.encode(), headers

        servers.append(JudgeServer(reply))
        return servers[-1].address, seen

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """judge(url, key) -> a judge with that key in the environment."""

    def make(url, key=CANARY, **settings):
        monkeypatch.setenv("JUDGE", key)  # a name that says nothing
        file = tmp_path / "verdicts.jsonl"
        return LLMJudge(f"{url}/v1", "stub", api_key_env="JUDGE", retries=0, progress_file=file, **settings)

    return make


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(listen, judge, status):
    elsewhere, followed = listen(200, "{}")
    url, seen = listen(status, Location=f"{elsewhere}/v1/chat/completions?api_key={CANARY}")
    with pytest.raises(UserError, match=rf"HTTP {status}.*it points to {elsewhere}/v1/chat.*nothing was sent") as error:
        judge(url)(PROMPT, ANSWERS)
    assert seen == [f"Bearer {CANARY}"] * len(seen) and not followed
    assert CANARY not in str(error.value)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_what_a_server_repeats_of_the_key_is_kept_nowhere(listen, judge, status, tmp_path):
    padding = "x" * (300 - len("wrong key: ") - 5)  # the end of what is shown of a reply cuts the key
    said = f"wrong key: {padding}{CANARY}"
    body = json.dumps({"choices": [{"message": {"content": f"{CANARY} A"}}]}) if status == 200 else said
    asked = judge(listen(status, body)[0])
    if status == 200:
        asked(PROMPT, ANSWERS)
        assert "[secret]" in (tmp_path / "verdicts.jsonl").read_text()
    else:
        with pytest.raises(UserError) as error:
            asked(PROMPT, ANSWERS)
        assert "wrong key" in str(error.value) and CANARY[:5] not in str(error.value)
    assert not [file for file in tmp_path.rglob("*") if CANARY[:5] in file.read_text()]


@pytest.mark.parametrize("key", [f"{CANARY}\r\nX-More: 1", f"{CANARY}é", f"{CANARY}\x07"])
def test_a_key_that_no_header_can_hold_is_refused(listen, judge, key):
    url, seen = listen(200, "{}")
    with pytest.raises(UserError, match="JUDGE: the key holds characters") as error:
        judge(url, key)(PROMPT, ANSWERS)
    assert not seen and "canary" not in str(error.value)


def test_a_whole_header_is_sent_as_it_is_and_a_line_end_is_no_part_of_the_key(listen, judge):
    body = json.dumps({"choices": [{"message": {"content": "A"}}]})
    for key, sent in ((f"Basic {CANARY}", f"Basic {CANARY}"), (f"{CANARY}\n", f"Bearer {CANARY}")):
        url, seen = listen(200, body)
        judge(url, key, instruction=key)(PROMPT, ANSWERS)
        assert set(seen) == {sent}


@pytest.mark.parametrize(
    "address", [f"http://me:{CANARY}@127.0.0.1:9/v1", f"http://{CANARY}@x/v1", f"http://x/v1?api_key={CANARY}",
                f"http://x/v1?sv=1&sig={CANARY}", f"http://x/v1?x-api-key={CANARY}", f"http://x/v1#access_token={CANARY}",
                f"http://me:{CANARY}/x@127.0.0.1/v1", f"me:{CANARY}@127.0.0.1"],
)  # fmt: skip
def test_an_address_with_a_password_in_it_is_refused(address):
    with pytest.raises(UserError, match=r"url \(annotator\): http://... or https") as error:
        LLMJudge(address, "stub")
    assert CANARY not in str(error.value)


def test_a_key_in_place_of_its_variable_is_refused():
    for key in (CANARY, "AKIA0123456789ABCDEF"):
        with pytest.raises(UserError, match="the name of an environment variable") as error:
            LLMJudge("http://x/v1", "stub", api_key_env=key)
        assert key not in str(error.value)


def test_errors_hold_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("LOCAL_KEY", "EMPTY")
    text = f"EMPTY, {CANARY}, https://me:p/w@host/a, http://tok@host, http://h/?a=1&access_token=x#b, mail a@b at http://h:80/@c"
    expected = "EMPTY, [secret], https://[secret]host/a, http://[secret]host, http://h/?a=1&[secret]#b, mail a@b at http://h:80/@c"
    assert scrubbed(text) == str(UserError(text)) == expected
