"""``stage=chat``: which models answer, how, and where one talks to them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lit_rlhf.apps.chat.assistant import Assistant, load_assistant
from lit_rlhf.apps.chat.conversation import SAMPLING, Conversation
from lit_rlhf.apps.chat.judgements import Judgements
from lit_rlhf.apps.chat.terminal import Terminal
from lit_rlhf.errors import UserError
from lit_rlhf.rollouts import Sampling
from lit_rlhf.text import Transcript
from lit_rlhf.text.special_tokens import SpecialTokens


@dataclass
class Chat:
    """A conversation in the terminal or on a page.

    Args:
        models: name -> folder of the models of a run, the best one first; one that is not there is passed over.
        judgements: where thumbs and choices are kept.
        model: a name of ``models``, a folder or a Hub name; None: the best that is there.
        against: a second model to compare with, blind; None: there is one model.
        ui: where one talks.
        sampling: how answers are drawn.
        seed: of the sampling.
        system: system prompt; "" is none.
        transcript: what a base model is shown, so that it answers; None: the one in the words that it has read.
        special_tokens: what their names mean in what is said: "plain" text, or "refuse".
        device: of torch, on which the models run.
        port: of the page; null takes the first free one from 7860 on.
        token: whether only those who have the page's printed address get in, on a machine that others use, too
            (``LIT_RLHF_TOKEN`` gives one that stays).
        open_browser: whether to open the page at once.
    """

    models: dict[str, str]
    judgements: Judgements
    _: KW_ONLY
    model: str | None = None
    against: str | None = None
    ui: Literal["terminal", "web"] = "terminal"
    sampling: Sampling = SAMPLING
    seed: Annotated[int, Field(ge=0)] = 0
    system: str = ""
    transcript: Transcript | None = None
    special_tokens: SpecialTokens = "plain"
    device: str = "cpu"
    port: Annotated[int, Field(ge=1, lt=2**16)] | None = None
    token: bool = False
    open_browser: bool = False

    def launch(self) -> None:
        """Talk until the person leaves."""
        if self.ui == "terminal":
            Terminal(self.conversation(self.load())).run()
            return
        from lit_rlhf.apps.chat.web import ChatPage  # Gradio is an extra
        from lit_rlhf.apps.server import PageServer

        assistants = self.load()
        page = ChatPage(lambda: self.conversation(assistants))
        server = PageServer("chat", port=self.port, token=self.token)
        print(f"chat: {server.address} (Ctrl-C ends it)", flush=True)
        server.serve(page.guarded(server), self.open_browser)

    def load(self) -> list[Assistant]:
        """The model, and the one that it is compared with."""
        asked = {"model": self.model or self._best(), "against": self.against}
        return [
            load_assistant(name, self._folder(key, name), self.transcript, self.device, self.special_tokens)
            for key, name in asked.items()
            if name is not None
        ]

    def conversation(self, assistants: list[Assistant]) -> Conversation:
        """A new conversation with these settings."""
        return Conversation(assistants, self.judgements, sampling=self.sampling, seed=self.seed, system=self.system)

    def _there(self) -> list[str]:
        return [name for name, folder in self.models.items() if (Path(folder) / "config.json").is_file()]

    def _best(self) -> str:
        if not self._there():
            looked = ", ".join(dict.fromkeys(self.models.values()))
            raise UserError(
                f"chat: this run has no model yet (looked for {looked}). Run lit-rlhf first, name a run that has one "
                "by run=, or a model by chat.model="
            )
        best = self.models[self._there()[0]]
        return [name for name, folder in self.models.items() if folder == best][-1]  # an untuned checkpoint is no "sft"

    def _folder(self, key: str, name: str) -> str:
        if name in self.models and name not in self._there():
            raise UserError(
                f"chat.{key}={name}: {self.models[name]} is not there; this run has "
                f"{', '.join(self._there()) or 'no models'}"
            )
        if name not in self.models and not Path(name).expanduser().is_dir() and "/" not in name:
            raise UserError(
                f"chat.{key}={name}: no such model or folder; give one of {', '.join(self._there()) or '(none yet)'}, "
                "a folder, or the owner/name of a model on the Hub"
            )
        return self.models.get(name) or str(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
