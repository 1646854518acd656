"""Talking to a model, or to two side by side; what a person thinks of the answers becomes records."""

from lit_rlhf.apps.chat.app import Chat
from lit_rlhf.apps.chat.assistant import Assistant, load_assistant
from lit_rlhf.apps.chat.conversation import Answer, Conversation
from lit_rlhf.apps.chat.judgements import Judgements

__all__ = ["Answer", "Assistant", "Chat", "Conversation", "Judgements", "load_assistant"]
