"""What reaches the pages: the same requests to both, as another site's page, a stranger or a script sends them."""

import http.client
import json
import re
import socket

import pytest

from lit_rlhf.apps.chat.web import PATHS, ChatPage
from lit_rlhf.apps.label import LabellingPage
from lit_rlhf.apps.label.web import make_app
from lit_rlhf.apps.server import LARGEST, Guard, PageServer
from lit_rlhf.errors import UserError

EVIL = "evil.example"
JSON = {"Content-Type": "application/json"}


class Door:
    """A page that is served, and what would be kept if a stranger got in."""

    def __init__(self, server, path, body, folder):
        self.server, self.path, self.body, self.folder = server, path, body, folder
        self.host = f"127.0.0.1:{server.port}"

    def ask(self, path="/", body=None, **headers):
        """(status, headers, text) of a request with exactly these headers; Host is this server's unless given."""
        headers = {"Host": self.host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        verb = "GET" if body is None else "POST"
        connection.putrequest(verb, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            for each in value if isinstance(value, list) else [value]:
                connection.putheader(name, each)
        chunked = headers.get("Transfer-Encoding") == "chunked"
        if body is not None and not chunked:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(iter([body]) if chunked else body, encode_chunked=chunked)
        response = connection.getresponse()
        try:
            return response.status, dict(response.headers), response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def post(self, body=None, **headers):
        """What is asked in earnest."""
        return self.ask(self.path, self.body if body is None else body, **{**JSON, **headers})

    @property
    def kept(self):
        return [file.name for file in self.folder.rglob("*.jsonl") if file.stat().st_size]


@pytest.fixture(params=["label", "chat"])
def door(request, served, converse, judgements, tmp_path):
    """door(**settings of PageServer) -> a page behind the front door."""
    opened = []

    def open_(**settings):
        server = PageServer(request.param, **settings)
        folder = tmp_path / "data"
        if request.param == "chat":
            served(ChatPage(lambda: converse("ppo")).guarded(server), server)
            said = json.dumps({"data": ["", "Hello", "", 1, 1, 8, 0], "fn_index": 0, "session_hash": "me"})
            return Door(server, "/gradio_api/queue/join", said.encode(), folder)
        source = tmp_path / "answers.jsonl"
        source.write_text(json.dumps({"prompt": "Why?", "responses": ["So", "No"]}) + "\n")
        page = LabellingPage(source, folder)
        opened.append(page.labelling())
        served(Guard(make_app(opened[-1], page.about()), server), server)
        [item] = opened[-1].items
        said = json.dumps({"annotator": "ann", "item": item, "again": False, "verdict": [1, 2], "note": "NOTE"})
        return Door(server, "/api/judge", said.encode(), folder)

    yield open_
    for labelling in opened:
        labelling.close()


def test_who_may_ask_what(door):
    door = door()
    port = door.server.port
    mine = (door.host, f"localhost:{port}", f"LOCALHOST:{port}", "localhost", "127.0.0.1", f"[::1]:{port}", "127.9.9.9")
    for host in mine:
        assert door.ask(Host=host)[0] == 200, host
    # Names of others (DNS rebinding), addresses of others, and what is no name at all.
    hosts = [
        EVIL,
        f"{EVIL}:{port}",
        f"127.0.0.1.{EVIL}",
        f"localhost.{EVIL}",
        f"127.0.0.1@{EVIL}",
        "192.168.1.5",
        "10.0.0.1:80",
        "0.0.0.0",
        "[::]",
        "[::1",
        "[fe80::1]",
        "",
        "localhost.",
        "2130706433",
        "127.1",
        "*",
        [door.host, EVIL],
        [door.host] * 2,
    ]
    for host in hosts:
        for path, body in (("/", None), (door.path, door.body), ("/nothing", None)):
            assert door.ask(path, body, **JSON, Host=host)[0] == 400, (host, path)
    origins = [
        f"http://{EVIL}",
        "null",
        "",
        f"http://127.0.0.1:{port + 1}",
        "http://127.0.0.1",
        f"http://localhost:{port}",
        f"http://{door.host}.{EVIL}",
        f"http://{EVIL}#{door.host}",
        f"http://{door.host}@{EVIL}",
        "file://",
    ]
    for origin in origins:
        assert door.post(Origin=origin)[0] == 403, origin
    for site in ("cross-site", "same-site"):
        for mode in ("no-cors", "cors", "websocket"):
            assert door.ask(Sec_Fetch_Site=site, Sec_Fetch_Mode=mode)[0] == 403
            assert door.post(Sec_Fetch_Site=site, Sec_Fetch_Mode=mode)[0] == 403
    assert door.post(Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 403  # another site's form
    assert door.ask(Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link
    assert not door.kept
    status, _, text = door.post(Origin=f"http://{door.host}", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")
    assert status == 200, text


def test_how_much_may_be_sent_and_in_which_form(door):
    door = door()
    large = door.body.replace(b"NOTE", b"x" * 50_000_000).replace(b"Hello", b"x" * 50_000_000)
    for body, more in (
        (large, {}),
        (large[: LARGEST + 1], {}),
        (large[: 5 * LARGEST], {"Transfer_Encoding": "chunked"}),
    ):
        status, _, text = door.post(body, **more)
        assert status == 413 and "send less" in text
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nhello\r\n--x--\r\n'
    form = "application/x-www-form-urlencoded"
    for kind in ("text/plain", form, "multipart/form-data; boundary=x", "application/jsonx", ""):
        assert door.ask(door.path, door.body, Content_Type=kind)[0] == 415
        for path in ("/gradio_api/upload", "/upload", "/gradio_api/upload?upload_id=a"):
            assert door.ask(path, upload, Content_Type=kind)[0] in (404, 415)
    assert door.ask(door.path, door.body)[0] == 415
    assert not door.kept
    assert door.post(Content_Type="application/json; charset=utf-8")[0] == 200


def test_what_is_no_page_of_ours_is_not_there(door):
    door = door()
    inside = [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://evil.example/",
        "/gradio_api/upload",
        "/gradio_api/upload_progress",
        "/gradio_api/deep_link",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/gradio_api/component_server",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-code",
        "/gradio_api/custom_component/a/b/c/d",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/gradio_api/mcp/sse",
        "/gradio_api/call/send",
        "/gradio_api/api/send",
        "/monitoring",
        "/monitoring/summary",
        "/login",
        "/logout",
        "/dev/reload",
        "/svelte/x",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/robots.txt",
        "/../queue.py",
        "/%2e%2e/queue.py",
        "/assets/../../app.py",
        "/assets/%2e%2e/%2e%2e/routes.py",
        "/static/..%2f..%2fapp.py",
        "/assets//etc/passwd",
        "//etc/passwd",
        "/queue.py",
        "/.env",
        "/page.js/../web.py",
        "/gradio_api/heartbeat/..%2f..%2fconfig",
    ]
    for path in inside:
        for body in (None, b"{}"):
            status, _, text = door.ask(path, body, **JSON)
            assert status in (403, 404, 405) and "root:" not in text, (path, status)


def test_nonsense_ends_in_a_refusal_and_the_page_lives_on(door, capfd):
    door = door()
    half = door.body.replace(b"ann", b"\\ud83d") + b"]"
    deep = b"[" * 100_000 + b"]" * 100_000
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 100,
        deep,
        b'{"data":' + deep + b"}",
        half,
        b"9" * 5000,
        b'{"turn": 1e999}',
        door.body.replace(b"[1, 2]", deep).replace(b'"Hello"', deep),
        door.body.replace(b"[1, 2]", b"[" + b"9" * 5000 + b", 1]").replace(b'"Hello"', b"9" * 5000),
        door.body.replace(b"[1, 2]", b"[NaN, Infinity]").replace(b"{", b"["),
    ]
    for body in bodies:
        status, headers, text = door.post(body)
        assert 400 <= status < 600 and "Traceback" not in text, (body[:60], status)
        assert "content-security-policy" in map(str.lower, headers)
    assert not door.kept
    assert "Traceback" not in "".join(capfd.readouterr())
    assert door.ask()[0] == 200 and door.post()[0] == 200


def test_every_answer_has_the_headers_that_browsers_obey(door):
    door = door()
    for path, headers in (
        ("/", {}),
        ("/page.js", {}),
        ("/nothing", {}),
        ("/", {"Host": EVIL}),
        ("/", {"Origin": "null"}),
    ):
        _, found, text = door.ask(path, **headers)
        found = {name.lower(): value for name, value in found.items()}
        policy = dict(each.strip().partition(" ")[::2] for each in found["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert "unsafe" not in policy["script-src"] and "http" not in found["content-security-policy"]
        assert found["x-content-type-options"] == "nosniff" and found["x-frame-options"] == "DENY"
        assert found["referrer-policy"] == "no-referrer" and found["cache-control"] == "no-store"
        assert found["cross-origin-resource-policy"] == found["cross-origin-opener-policy"] == "same-origin"
        assert "server" not in found and "access-control-allow-origin" not in found
        scripts = re.findall(r"<script(?![^>]*\ssrc=)", text)
        assert policy["script-src"].count("sha256-") == len(scripts)  # those of the page itself, by their digests


def test_nothing_but_the_page_runs_in_the_page(door, chromium):
    page = chromium.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(door().server.address)
    page.wait_for_selector("#box textarea, #start:not([hidden])")
    assert not problems
    page.evaluate(
        """() => {
          window.hacked = [];
          const box = document.createElement("div");
          box.innerHTML = `<img src="data:," onerror="hacked.push(1)">
            <a id="away" href="javascript:hacked.push(2)">x</a>`;
          document.body.append(box);
          const script = document.createElement("script");
          script.textContent = "hacked.push(3)";
          document.body.append(script);
          document.getElementById("away").click();
          fetch("http://127.0.0.1:9/").catch(() => 0);
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("hacked") == []
    assert sum("Content Security Policy" in problem for problem in problems) >= 4
    page.close()


def test_a_token_in_the_address(door, chromium, monkeypatch):
    door = door(token=True)
    token = door.server.token
    assert len(token) >= 32 and door.server.address == f"http://{door.host}/?token={token}"
    for path in (
        "/",
        "/?token=",
        "/?token=x",
        f"/?token={token}x",
        f"/?token={token[:-1]}",
        f"/?t={token}",
        "/page.js",
        "/no",
    ):
        status, _, text = door.ask(path)
        assert status == 401 and token not in text, path
    for cookie in ("", "x=y", f"lit-rlhf-{door.server.port}=", f"lit-rlhf-{door.server.port}=x", f"token={token}"):
        assert door.post(Cookie=cookie)[0] == 401
    assert not door.kept
    status, headers, _ = door.ask(f"/?token={token}&annotator=ann")
    location, cookie = headers["location"], headers["set-cookie"]
    assert status == 303 and location == "/?annotator=ann" and "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
    cookie = cookie.partition(";")[0]
    assert door.ask(Cookie=cookie)[0] == 200
    assert door.post(Cookie=cookie, Origin=f"http://{EVIL}")[0] == 403
    assert door.ask(Cookie=cookie, Host=EVIL)[0] == 400
    assert door.post(Cookie=f"a=b; {cookie}")[0] == 200
    page = chromium.new_page()
    page.goto(door.server.address)
    page.wait_for_selector("#box textarea, #start:not([hidden])")
    assert token not in page.url
    page.close()


def test_a_token_of_the_environment_outlives_the_server(monkeypatch):
    monkeypatch.setenv("LIT_RLHF_TOKEN", "of-a-person_12")
    first = PageServer("label", token=True)
    assert first.token == "of-a-person_12" and not PageServer("label").token
    first.listener.close()
    for wrong in ("short", "with a blank in it", "half;a=cookie", "é" * 20, "x" * 300):
        monkeypatch.setenv("LIT_RLHF_TOKEN", wrong)
        with pytest.raises(UserError, match=r"^label.token: LIT_RLHF_TOKEN is not of 12 or more letters") as error:
            PageServer("label", token=True)
        assert wrong not in str(error.value)


def test_whoever_listens_to_the_network_is_called_by_its_numbers_and_its_own_names():
    server = PageServer("label", host="0.0.0.0")
    try:
        name = socket.gethostname()
        mine = ("192.168.1.5:80", "[fe80::1]:7860", "127.0.0.1", "localhost", name, name.upper())
        assert [name for name in mine if not server.named(name)] == []
        others = (EVIL, f"192.168.1.5.{EVIL}", "", "[", f"{name}.{EVIL}")
        assert not any(map(server.named, others))
    finally:
        server.listener.close()


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in ("label", "chat"):
            with pytest.raises(UserError, match=rf"{command}\.port={port}: cannot listen on 127.0.0.1 \(Address"):
                PageServer(command, port=port)
    first, second = PageServer("chat", port=None), PageServer("chat", port=None)
    assert 7860 <= first.port < second.port
    for server in (first, second):
        server.listener.close()


def test_the_paths_of_the_chat_page_are_those_it_asks_for():
    assert re.fullmatch(PATHS, "/gradio_api/queue/join") and not re.fullmatch(PATHS, "/gradio_api/upload")
