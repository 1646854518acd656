"""Chat on a page, by Gradio: on 127.0.0.1, with no requests to anywhere else, and answers shown as text."""

from __future__ import annotations

import base64
import contextlib
import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.apps.chat.conversation import Answer, Choice, Conversation
from lit_rlhf.apps.display import printable
from lit_rlhf.errors import UserError

try:
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import FileResponse

    from lit_rlhf.apps.server import Guard, PageServer
except ImportError:
    raise UserError(
        "chat.ui=web needs Gradio, which is not installed; pip install 'lit-rlhf[ui]', or use chat.ui=terminal"
    ) from None

STYLE = Path(__file__).with_name("page.css")
THUMBS = {1: "Like", -1: "Dislike", 0: None}
SCRIPT = Path(__file__).with_name("page.js")
# What the page asks for.
PATHS = (
    r"/(page\.js|config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/.*|"
    r"gradio_api/(queue/(join|data)|run/\w+|cancel|reset|startup-events|heartbeat/\w+|info|theme\.css))?/?"
)

Update = dict[Any, Any]  # component -> what it shows from here on


class ChatPage:
    """The page: one conversation per visitor."""

    def __init__(self, begin: Callable[[], Conversation]) -> None:
        self.begin = begin
        self.visitors: dict[str, Conversation] = {}
        self.blocks = self._build(begin())

    def guarded(self, server: PageServer) -> Guard:
        """The application to serve. Gradio sets styles in the page, and more at its other paths: uploads, files."""
        return Guard(self.app(), server, PATHS, styles="'unsafe-inline'")

    def app(self) -> FastAPI:
        """Gradio's application, which trusts whoever asks."""
        app = FastAPI(openapi_url=None)
        app.add_route("/page.js", lambda _: FileResponse(SCRIPT))
        return gr.mount_gradio_app(
            app,
            self.blocks,
            "/",
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
            footer_links=[],
            # Not as css=, to which Gradio adds prefixes that some rules do not survive.
            head=f"<style>{STYLE.read_text(encoding='utf-8')}</style><script src='/page.js'></script>",
            theme=gr.themes.Base(
                primary_hue="blue",
                neutral_hue="stone",
                radius_size="lg",
                font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ).set(body_text_color_subdued="*neutral_500"),
        )

    def _build(self, example: Conversation) -> gr.Blocks:
        with gr.Blocks(title="Chat · lit-rlhf", analytics_enabled=False, fill_height=True) as blocks:
            _html("head", _head(example))
            self.talk = gr.Chatbot(
                show_label=False,
                buttons=[],  # "copy" would copy the escaped text
                render_markdown=False,
                layout="bubble",
                feedback_options=("Like", "Dislike"),
                placeholder="Say something to begin.",
                elem_id="talk",
                height="100%",
                scale=1,
            )
            with gr.Column(visible=False, elem_id="compare") as self.compare:
                with gr.Row(equal_height=True, elem_id="answers"):
                    self.cards = [_html(f"answer-{name}") for name in "ab"]
                with gr.Row(elem_id="choose"):
                    self.choose = [
                        gr.Button(text, size="sm", min_width=60, elem_id=f"choose-{name}")
                        for text, name in (("A is better", "a"), ("Tie", "tie"), ("B is better", "b"))
                    ]
            self.notice = _html("notice")
            self.box = gr.Textbox(
                show_label=False,
                placeholder="Your message",
                submit_btn=True,
                autofocus=True,
                max_lines=8,
                elem_id="box",
            )
            with gr.Row(elem_id="actions"):
                regenerate = gr.Button("Regenerate", size="sm", min_width=60, elem_id="regenerate")
                names = gr.Button("Show names", size="sm", min_width=60, visible=example.compares, elem_id="names")
                new = gr.Button("New", size="sm", min_width=60, elem_id="new")
                self.saved = _html("save", _link(example))
                gr.Button("Load", size="sm", min_width=60, elem_id="load")
            loaded = gr.Textbox(visible="hidden", elem_id="loaded")  # by page.js, from a file of the person's
            self.names = names
            settings = self._settings(example)
            shown = [self.talk, self.compare, *self.cards, *self.choose, self.notice, self.box, self.names, self.saved]
            quiet = {"show_progress": "hidden", "api_visibility": "private"}
            self.box.submit(self.send, [self.saved, self.box, *settings], shown, **quiet)
            self.box.stop(self.stop, self.saved, None, queue=False, **quiet)
            regenerate.click(self.regenerate, [self.saved, *settings], shown, **quiet)
            for button, choice in zip(self.choose, ("A", "tie", "B")):
                button.click(self.prefer(choice), self.saved, shown, **quiet)
            self.talk.like(self.rate, self.saved, shown, **quiet)
            names.click(self.reveal, self.saved, shown, **quiet)
            gr.on([new.click, self.talk.clear], self.clear, self.saved, shown, **quiet)
            loaded.blur(self.load, [self.saved, loaded], [*shown, self.system], **quiet)
            blocks.unload(self.leave)
        return blocks

    def _settings(self, example: Conversation) -> list[gr.components.Component]:
        """What can be set: system prompt, temperature, top-p, tokens per answer, seed."""
        sampling = example.sampling
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.system = gr.Textbox(example.system, label="System prompt", lines=2, elem_id="system")
            with gr.Row():
                return [
                    self.system,
                    gr.Number(sampling.temperature, label="Temperature", minimum=0, step=0.1),
                    gr.Number(sampling.top_p, label="Top-p", minimum=0, maximum=1, step=0.05),
                    gr.Number(sampling.max_new_tokens, label="Tokens per answer", minimum=1, precision=0),
                    gr.Number(example.seed, label="Seed", minimum=0, precision=0),
                ]

    def send(self, request: gr.Request, saved: str, text: str, *settings: Any) -> Iterator[Update]:
        """Say something, with the settings that stand on the page."""
        conversation = self._of(request, saved)
        yield from self._answered(conversation, conversation.ask(text, together=True), settings, text)

    def regenerate(self, request: gr.Request, saved: str, *settings: Any) -> Iterator[Update]:
        """Answer the last message once more."""
        conversation = self._of(request, saved)
        yield from self._answered(conversation, conversation.regenerate(together=True), settings)

    def stop(self, request: gr.Request, saved: str) -> None:
        """End the answer that is being written."""
        self._of(request, saved).stop()

    def prefer(self, choice: Choice) -> Callable[[gr.Request, str], Update]:
        """The handler of a button below the two answers."""

        def prefer(request: gr.Request, saved: str) -> Update:
            conversation = self._of(request, saved)
            return self._done(conversation, lambda: conversation.choose(choice))

        return prefer

    def rate(self, request: gr.Request, saved: str, event: gr.LikeData) -> Update:
        """Rate an answer by a thumb."""
        conversation = self._of(request, saved)
        rating = {True: 1, False: -1}.get(event.liked, 0)  # "" where a thumb is taken back
        return self._done(conversation, lambda: conversation.rate(rating, event.index))

    def reveal(self, request: gr.Request, saved: str) -> Update:
        """Show which model is which, or hide it again."""
        conversation = self._of(request, saved)
        conversation.revealed = not conversation.revealed
        return self._view(conversation)

    def clear(self, request: gr.Request, saved: str) -> Update:
        """Begin a new conversation."""
        conversation = self._of(request, saved)
        conversation.clear()
        return self._view(conversation)

    def load(self, request: gr.Request, saved: str, text: str) -> Update:
        """Go on with a conversation that was saved."""
        conversation = self._of(request, saved)

        def load() -> str:
            conversation.from_json(text)
            return "loaded"

        return {**self._done(conversation, load), self.system: conversation.system}

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor; what was judged is on disk."""
        self.visitors.pop(request.session_hash or "", None)

    def _of(self, request: gr.Request, saved: str) -> Conversation:
        """A visitor's conversation; of one whom an earlier server knew, what the page has of it."""
        visitor = request.session_hash or ""
        if visitor not in self.visitors:
            self.visitors[visitor] = self.begin()
            with contextlib.suppress(UserError):  # there is none
                self.visitors[visitor].from_json(
                    base64.b64decode(saved.partition("base64,")[2].partition('"')[0]).decode()
                )
        return self.visitors[visitor]

    def _answered(
        self, conversation: Conversation, growing: Iterator[list[Answer]], settings: Sequence[Any], text: str = ""
    ) -> Iterator[Update]:
        """What the page shows after each token, and in the end."""
        yield self._busy(conversation, text)
        try:
            system, temperature, top_p, tokens, seed = settings
            conversation.system = (system or "").strip()
            conversation.set_sampling(temperature=temperature, top_p=top_p, max_new_tokens=tokens)
            if seed is None or seed < 0:
                raise UserError("seed: a whole number from 0 up was expected")
            if seed != conversation.seed:
                conversation.reseed(seed)
            for answers in growing:
                yield self._busy(conversation, "", answers)
        except UserError as error:
            # What could not be answered stays in the box, to be corrected.
            yield {**self._view(conversation, str(error)), self.box: self._box(text)}
            return
        yield self._view(conversation, conversation.dropped_note)

    def _done(self, conversation: Conversation, act: Callable[[], str]) -> Update:
        try:
            note = act()
        except UserError as error:
            note = str(error)
        return self._view(conversation, note)

    def _busy(self, conversation: Conversation, text: str = "", answers: list[Answer] | None = None) -> Update:
        """While an answer is written: nothing can be chosen, but it can be stopped."""
        update = self._view(conversation)
        messages = _messages(conversation, text)
        if answers is not None and not conversation.compares:
            messages.append({"role": "assistant", "content": _escaped(answers[0].text) or "…"})
        elif answers is not None:
            update |= self._cards(conversation, answers)
        update[self.talk] = gr.Chatbot(value=messages, feedback_value=_thumbs(conversation))
        update[self.box] = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        return {**update, **{button: gr.Button(interactive=False) for button in self.choose}}

    def _view(self, conversation: Conversation, note: str = "") -> Update:
        return {
            self.talk: gr.Chatbot(value=_messages(conversation), feedback_value=_thumbs(conversation)),
            self.compare: gr.Column(visible=bool(conversation.choices)),
            self.notice: f"<p>{_line(note[:1].upper() + note[1:])}</p>",
            self.box: self._box(),
            self.names: "Hide names" if conversation.revealed else "Show names",
            self.saved: _link(conversation),
            **(self._cards(conversation, conversation.choices) if conversation.choices else {}),
            **{button: gr.Button(interactive=True) for button in self.choose},
        }

    def _cards(self, conversation: Conversation, answers: list[Answer]) -> Update:
        """A and B, side by side."""
        cards = {}
        for card, place, answer in zip(self.cards, "AB", answers):
            name = f" {html.escape(answer.model)}" if conversation.revealed else ""
            text = _line(answer.text) or "…"
            cards[card] = f'<div class="answer"><h3><b>{place}</b>{name}</h3><div class="text">{text}</div></div>'
        return {**cards, self.compare: gr.Column(visible=True)}

    def _box(self, text: str = "") -> gr.Textbox:
        return gr.Textbox(value=text, submit_btn=True, stop_btn=False)


def _messages(conversation: Conversation, text: str = "") -> list[dict[str, str]]:
    asked = [{"role": "user", "content": text}] if text.strip() else []
    return [{**m, "content": _escaped(m["content"])} for m in [*conversation.messages, *asked]]


def _link(conversation: Conversation) -> str:
    """The conversation as a file; it is in the page, which has it when the server has ended, too."""
    data = base64.b64encode(conversation.to_json().encode()).decode()
    return f'<p><a download="conversation.json" href="data:application/json;base64,{data}">Save</a></p>'


def _html(name: str, value: str = "") -> gr.Markdown:
    """A place for HTML of ours: in Markdown, lines that begin with a tag stay as they are. ``gr.HTML`` needs eval."""
    return gr.Markdown(value, elem_id=name, sanitize_html=False, latex_delimiters=[])


def _line(text: str) -> str:
    """Text for a place for HTML, in one line: an empty line would begin Markdown."""
    return _escaped(text).replace("\n", "&#10;")


def _escaped(text: str) -> str:
    """Text as HTML that shows it: without Markdown Gradio still renders tags, and an image would be fetched."""
    return html.escape(printable(text))


def _thumbs(conversation: Conversation) -> list[str | None]:
    """The thumb of each answer, in their order."""
    places = (i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
    return [THUMBS[conversation.answers[i].rating] for i in places]


def _head(conversation: Conversation) -> str:
    names = [html.escape(name) for name in conversation.names]
    if conversation.compares:
        who = f"{' and '.join(sorted(names))} answer side by side, shuffled at each turn. Say which answer is better."
    else:
        who = f"You are talking to <b>{names[0]}</b>. Thumbs are kept as feedback of the run."
    return f"<div><h1>Chat</h1><p>{who}</p></div>"
