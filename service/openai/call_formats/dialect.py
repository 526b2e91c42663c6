"""How a model writes: the form of its calls and of its reasoning, told by its chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...errors import ErrorKind, ServiceError
from ...grammar.spec import Grammar
from ..tools import Tool, Toolbox
from . import think
from .call_format import CallFormat, Marker, Wanted, up_to
from .choice_reader import ChoiceReader
from .deepseek_v3 import DeepSeekV3
from .glm4 import Glm4
from .granite import Granite
from .harmony import Harmony
from .hermes import Hermes
from .kimi_k2 import KimiK2
from .llama3 import Llama3
from .mistral import Mistral
from .pieces import Reader
from .qwen3_coder import Qwen3Coder
from .think import PlainReader, ThinkReader
from .tokenwire import Tokenwire

_TOKENWIRE, _HARMONY = Tokenwire(), Harmony()
# In the order in which templates are asked: the surest marks first.
_FORMATS: tuple[CallFormat, ...] = (
    _HARMONY, DeepSeekV3(), Mistral(), KimiK2(), Granite(),
    Qwen3Coder(), Glm4(), Hermes(), Llama3(), _TOKENWIRE,
)  # fmt: skip
_MARKED = _FORMATS[:5]  # no other template has their marks


def _as_text(text: str) -> Any:
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a model writes calls and reasoning.

    Attributes:
        calls: the form of its calls.
        reasoning: that of its reasoning.
        template: its chat template.
        marker: finds the tokens of markers.
        is_open: whether the prompt ends inside of the reasoning.
        is_answer: whether it ends behind it, so that there is none.
    """

    calls: CallFormat = _TOKENWIRE
    reasoning: Literal["none", "think", "harmony"] = "none"
    template: str = ""
    marker: Marker = field(default=_as_text, repr=False)
    is_open: bool = False
    is_answer: bool = False

    @classmethod
    def of(
        cls,
        template: str,
        token_of: Callable[[str], int | None],
        *,
        takes_tools: bool,
        calls: str = "auto",
        reasoning: str = "auto",
    ) -> Dialect:
        """The dialect of a chat template, unless settings say what it is.

        Args:
            template: the chat template.
            token_of: the id of the token that is added to the vocabulary for a text, if any.
            takes_tools: whether the template renders tools.
            calls: the setting of the form of calls.
            reasoning: that of the form of reasoning.
        """
        call_format = _call_format(template, calls, takes_tools=takes_tools)
        return cls(
            calls=call_format,
            reasoning=_reasoning(template, reasoning),
            template=template,
            marker=lambda text: _marker(text, token_of),
        )

    def after(self, prompt: str, begun: str | None = None) -> Dialect:
        """The dialect of an answer to a prompt, which may have begun the reasoning.

        `begun` is the text of the message that the answer continues, if it does.
        """
        if begun is not None:
            is_open = begun.rfind(think.START) > begun.rfind(think.END)
            return replace(self, is_open=is_open, is_answer=not is_open)
        end = prompt.rstrip()
        is_open, is_over = end.endswith(think.START), end.endswith(think.END)
        return replace(self, is_open=is_open, is_answer=is_over)

    @property
    def markers(self) -> frozenset[str]:
        """Texts of special tokens that must be read."""
        tags = think.TAGS if self.reasoning == "think" else frozenset()
        channels = _HARMONY.markers if self.reasoning == "harmony" else frozenset()
        return self.calls.markers | tags | channels

    @property
    def is_own_envelope(self) -> bool:
        """Whether calls have TGI's form, which the prompt has to describe."""
        return self.calls is _TOKENWIRE

    def call_grammar(self, toolbox: Toolbox, answer: Grammar | None = None) -> Grammar:
        """What an answer must look like in which tools may or must be called.

        Where it may be no call, it fits `answer`; without that it may be any text.
        """
        if answer is None or not toolbox.may_answer:
            return self._calls(toolbox)
        if self.calls is _HARMONY:
            answer = self.constrained(answer)
        return replace(
            self._calls(replace(toolbox, may_answer=False), or_json=True),
            other=answer,
            beginnings=self.calls.beginnings(toolbox.tools),
        )

    def _calls(self, toolbox: Toolbox, *, or_json: bool = False) -> Grammar:
        if self.is_own_envelope:
            return self.constrained(toolbox.grammar())
        for index, tool in enumerate(toolbox.tools):
            _check_name(index, tool.name)
        wanted = Wanted(
            tools=toolbox.tools, or_text=toolbox.may_answer, many=toolbox.many, or_json=or_json
        )
        rule = self.calls.rule(wanted, self.marker, self.template)
        grammar = Grammar(kind="rule", value=rule)
        # Harmony's rule has the reasoning already.
        return grammar if self.calls is _HARMONY else self.constrained(grammar)

    def constrained(self, grammar: Grammar) -> Grammar:
        """A grammar of an answer, which begins only after the reasoning."""
        if self.is_answer or self.reasoning == "none":
            return grammar
        if self.reasoning == "harmony":
            return replace(grammar, lead=_HARMONY.lead(self.marker))
        rest = [*up_to(self.marker(think.END)), {"text": "lines"}]
        whole = [self.marker(think.START), *rest]
        return replace(grammar, lead=rest if self.is_open else {"optional": whole})

    def reader(self, tools: Sequence[Tool], beginnings: tuple[str, ...] = ()) -> Reader | None:
        """Reads an answer; None where it can be nothing but text.

        `beginnings` are those of calls, where what does not begin so is no call.
        """
        reader: Reader | None = self.calls.reader(tools) if tools else None
        if reader is not None and beginnings:
            reader = ChoiceReader(reader, beginnings)
        if self.reasoning == "harmony" and self.calls.name != "harmony":
            return _HARMONY.reader(tools)
        if self.reasoning == "harmony":
            return self.calls.reader(tools)
        if self.reasoning == "think" and not self.is_answer:
            return ThinkReader(reader or PlainReader(), is_open=self.is_open)
        return reader


def _check_name(index: int, name: str) -> None:
    """Checks a name that stands among markers, where some characters would end it.

    Raises:
        ServiceError: it has one of those.
    """
    if not name.strip() or any(char in name for char in "<>[]{}\n\r\t \"'"):
        path = f"tools[{index}].function.name"
        text = f"{path} must not have white space, quotation marks or brackets. Given: {name}"
        raise ServiceError(ErrorKind.TOOL, text, field=path)


def _marker(text: str, token_of: Callable[[str], int | None]) -> Any:
    token_id = token_of(text)
    return text if token_id is None else {"token": token_id}


def _call_format(template: str, setting: str, *, takes_tools: bool) -> CallFormat:
    if setting != "auto":
        return next(item for item in _FORMATS if item.name == setting)
    if _TOKENWIRE.is_described(template):
        return _TOKENWIRE
    if takes_tools:
        return next(item for item in _FORMATS if item.fits(template))
    # A template that renders calls of an earlier turn with marks of their own tells enough.
    return next(item for item in (*_MARKED, _TOKENWIRE) if item.fits(template))


def _reasoning(template: str, setting: str) -> Literal["none", "think", "harmony"]:
    match setting:
        case "none" | "think" | "harmony":
            return setting
    if _HARMONY.fits(template):
        return "harmony"
    return "think" if think.END in template else "none"
