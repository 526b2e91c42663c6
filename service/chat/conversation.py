"""A conversation: what was said, by whom, and how the next answer is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .calls import Call
from .tools import Tool


class Conversation:
    """A conversation.

    Args:
        system: what comes before everything; empty for nothing.
        parameters: of every request, by name.
        tools: what the model may call.
    """

    def __init__(
        self,
        system: str = "",
        parameters: dict[str, Any] | None = None,
        tools: Sequence[Tool] = (),
    ) -> None:
        self.system = system
        self.parameters = dict(parameters or {})
        self.tools = tools
        self.tools_are_on = bool(tools)
        self._turns: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of it, as the server wants it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._turns]

    @property
    def content(self) -> dict[str, Any]:
        """All of it with the tools in force and the parameters, as JSON."""
        tools = {"tools": [*self.tools]} if self.tools_are_on else {}
        return {"messages": self.messages} | tools | self.parameters

    @property
    def request(self) -> dict[str, Any]:
        """What asks for the next answer, as JSON for `/v1/chat/completions`."""
        request = {"model": "default", "stream": True} | self.content
        if self._turns[-1]["role"] == "tool" and request.get("tool_choice") != "none":
            request.pop("tool_choice", None)  # who has to call would never answer
        return request

    def ask(self, text: str) -> None:
        """Adds a question."""
        self._turns.append({"role": "user", "content": text})

    def answered(self, text: str, calls: Sequence[Call] = ()) -> None:
        """Adds the answer: a text, calls, or both."""
        turn: dict[str, Any] = {"role": "assistant"}
        if text or not calls:
            turn["content"] = text
        if calls:
            turn["tool_calls"] = [call.message for call in calls]
        self._turns.append(turn)

    def returned(self, call: Call, result: str) -> None:
        """Adds what a call has returned."""
        self._turns.append({"role": "tool", "tool_call_id": call.id, "content": result})

    def forget_question(self) -> None:
        """Takes the last question back, with all that came of it."""
        self.forget_answer()
        self._turns.pop()

    def forget_answer(self) -> bool:
        """Opens the last question again: its answer and calls are gone; False if there is none."""
        if not self._turns:
            return False
        while self._turns[-1]["role"] != "user":
            self._turns.pop()
        return True

    def clear(self) -> None:
        """Forgets what was said, but not the system's text, the tools and the parameters."""
        self._turns.clear()

    def set_parameters(self, changes: dict[str, Any]) -> None:
        """Sets parameters; None removes one."""
        merged = self.parameters | changes
        self.parameters = {name: value for name, value in merged.items() if value is not None}
