"""Conversations to continue: from their messages to a prompt; answers are in `chat_answer.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..errors import ErrorKind, ServiceError, missing_field
from ..generation.generation import Token
from ..generation.json_values import count_values
from ..generation.limits import Limits, check_choices, check_count
from ..generation.parameters import Parameters
from ..generation.server_info import ServerInfo
from ..images.source import ImageSource
from ..text.escaping import new_mark
from ..text.tokenizer import TextTokenizer
from ..workers.courtesy import giving_way
from .call_formats import think
from .call_formats.dialect import Dialect
from .call_formats.pieces import Reader
from .image_parts import IMAGE, sourced, sources
from .template_fields import TemplateFields
from .tools import Tool, Toolbox

# The form of calls in answers: the contract's, or the one that OpenAI's clients expect.
ToolCallFormat = Literal["tgi", "openai"]
# What this endpoint calls the fields of `/generate`; the others have the same names.
_FIELD_NAMES = {
    "inputs": "messages",
    "parameters.adapter_id": "model",
    "parameters.max_new_tokens": "max_tokens",
    "parameters.min_new_tokens": "min_tokens",
    "parameters.repetition_penalty": "presence_penalty",
    "parameters.top_n_tokens": "top_logprobs",
    "parameters.grammar": "response_format",
    "parameters.grammar.other": "response_format",
    "parameters.grammar.type": "response_format.type",
    "parameters.grammar.value": "response_format.value",
}
_TOOL_CALL_HEADER = "x-tool-call-format"
_OPENAI_HEADER = "x-stainless-lang"
_USER = "user"
_TAKES_TEXT = "is string"  # in templates that take a content of parts, or a text


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn as received: `content` is a string, a list of parts, or None with tool calls.

    A part is JSON, or an ImageSource where the endpoint has told images apart already.
    """

    role: str | None
    content: Any = None
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to continue. `parameters` already has the names of `/generate`.

    `reads_markdown`: whether Markdown in what users say may be images, as in TGI.
    """

    messages: tuple[Message, ...]
    parameters: Parameters
    stream: bool = False
    logprobs: bool = False
    n: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    tool_prompt: str | None = None
    tool_call_format: ToolCallFormat = "tgi"
    include_usage: bool = False
    dialect: Dialect = field(default_factory=Dialect)
    template: TemplateFields = field(default_factory=TemplateFields)
    escape_special_tokens: bool | None = None
    reads_markdown: bool = True

    def check(self, limits: Limits) -> None:
        """Checks what only conversations have.

        Raises:
            ServiceError: the request is malformed, or asks for what the server does not do.
        """
        self._check_arguments(limits.max_request_values)
        if not self.messages:
            raise missing_field("messages")
        check_choices(self.n, limits)
        self.template.check()

    def _check_arguments(self, max_values: int) -> None:
        """Checks the arguments of calls that are texts, which a template may want as values.

        Raises:
            ServiceError: there are too many values in all of them together.
        """
        count = 0
        for index, message in enumerate(self.messages):
            for number, call in enumerate(message.tool_calls):
                arguments = call["function"]["arguments"]
                if isinstance(arguments, str):
                    count += count_values(arguments.encode(errors="replace"))
                field = f"messages[{index}].tool_calls[{number}].function.arguments"
                check_count(field, count, max_values, "JSON values")

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def field_names(self) -> dict[str, str]:
        """What this endpoint calls the fields of `/generate`, where the names differ."""
        return {**_FIELD_NAMES, "parameters.grammar": "tools"} if self.tools else _FIELD_NAMES

    def answering(self, prompt: str, toolbox: Toolbox | None, dialect: Dialect) -> ChatRequest:
        """The same request for a prompt, in which only these tools can be called."""
        begun = None
        if self.template.continue_final_message:
            begun = _text("", self.messages[-1].content)
        dialect = dialect.after(prompt, begun)
        grammar = self.parameters.grammar
        if toolbox is not None:
            grammar = dialect.call_grammar(toolbox, grammar)
        elif grammar is not None:
            grammar = dialect.constrained(grammar)
        parameters = replace(self.parameters, grammar=grammar)
        tools = () if toolbox is None else toolbox.tools
        return replace(self, tools=tools, parameters=parameters, dialect=dialect)

    def reader(self) -> Reader | None:
        """Reads the answer; None where it can be nothing but text."""
        grammar = self.parameters.grammar
        beginnings = () if grammar is None else grammar.beginnings
        return self.dialect.reader(self.tools, beginnings)

    def answer_text(self, token: Token) -> str:
        """What a token adds to the text that the reader reads: control tokens only as markers."""
        is_read = not token.special or token.text in self.dialect.markers
        return token.text if is_read else ""

    def texts(self) -> Iterator[tuple[str, str]]:
        """Role and text of each message, as far as it has them."""
        for message in self.messages:
            content = message.content
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            yield message.role or "", "".join(text for text in texts if isinstance(text, str))

    def with_sources(self) -> ChatRequest:
        """The same conversation with its images told apart from its texts.

        Where special tokens in texts are plain text, so is Markdown.

        Raises:
            ServiceError: a part for an image has no URL.
        """
        reads = self.reads_markdown and not self.escape_special_tokens
        messages = [
            replace(
                item,
                content=sourced(
                    f"messages[{index}].content",
                    item.content,
                    markdown=reads and item.role == _USER,
                ),
            )
            for index, item in enumerate(self.messages)
        ]
        return replace(self, messages=tuple(messages))

    def image_sources(self) -> list[ImageSource]:
        """The images of all messages, once they are told apart."""
        return [source for item in self.messages for source in sources(item.content)]

    def template_messages(self, *, takes_images: bool = False) -> list[dict[str, Any]]:
        """The conversation as chat templates expect it.

        Args:
            takes_images: whether contents with images stay lists of parts.

        Raises:
            ServiceError: a message has no role or a content of the wrong shape.
        """
        messages = enumerate(giving_way(self.messages))
        return [_template_message(index, item, takes_images) for index, item in messages]


@dataclass(frozen=True, slots=True)
class Draft:
    """What the model's template makes a prompt of, and what the answer may be.

    Attributes:
        request: as it came.
        toolbox: the tools in force, if any.
        dialect: how the model writes.
        messages: for the template.
        tools: likewise; None if there are none, or the last message tells of them.
        variables: likewise, beside these.
        mark: stands in spellings of special tokens that are plain text; empty if there are none.
    """

    request: ChatRequest
    toolbox: Toolbox | None
    dialect: Dialect
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    mark: str = ""

    @classmethod
    def of(
        cls, request: ChatRequest, tokenizer: TextTokenizer, limits: Limits, dialect: Dialect
    ) -> Draft:
        """Chooses the tools.

        Raises:
            ServiceError: the request is malformed.
        """
        request.check(limits)
        toolbox = Toolbox.choose(
            request.tools, request.tool_choice, many=request.parallel_tool_calls
        )
        takes_images = limits.max_images > 0
        if takes_images:
            request = _with_images(request, limits)
        messages = request.template_messages(takes_images=takes_images)
        if takes_images and _TAKES_TEXT not in tokenizer.chat_template:
            messages = [{**item, "content": _parts(item["content"])} for item in messages]
        tools: list[dict[str, Any]] | None = None
        if toolbox is not None:
            if tokenizer.template_takes_tools:
                tools = [tool.definition() for tool in toolbox.tools]
            if tools is None or request.tool_prompt is not None:
                has_envelope = dialect.is_own_envelope
                text = toolbox.prompt(request.tool_prompt, has_envelope=has_envelope)
                messages[-1]["content"] = _with_text(messages[-1]["content"], text)
        variables, mark = request.template.variables(), ""
        if request.escape_special_tokens:
            mark, hide = new_mark(), tokenizer.special_tokens.hide
            # An assistant's thoughts come back in its content, where templates look for them.
            messages = [
                hide(item, mark, think.TAGS if item["role"] == "assistant" else frozenset())
                for item in messages
            ]
            tools, variables = hide(tools, mark), hide(variables, mark)
        return cls(request, toolbox, dialect, messages, tools, variables, mark)

    def conversation(self, rendered: str, tokenizer: TextTokenizer) -> Conversation:
        """The conversation that the template has made this text of.

        Raises:
            ServiceError: a tool cannot be called in the model's form.
        """
        prompt = rendered
        if self.mark:
            prompt = tokenizer.special_tokens.reveal(rendered, self.mark)
        return Conversation(self.request.answering(prompt, self.toolbox, self.dialect), prompt)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that can be continued: the request with its tools in force, and the prompt."""

    request: ChatRequest
    prompt: str

    @classmethod
    def of(
        cls, request: ChatRequest, tokenizer: TextTokenizer, limits: Limits, dialect: Dialect
    ) -> Conversation:
        """Chooses the tools, and puts messages and tools into the model's chat template.

        Raises:
            ServiceError: the request is malformed, or the template refuses it.
        """
        draft = Draft.of(request, tokenizer, limits, dialect)
        prompt = tokenizer.render_chat(draft.messages, draft.tools, **draft.variables)
        return draft.conversation(prompt, tokenizer)


def _with_images(request: ChatRequest, limits: Limits) -> ChatRequest:
    """The request with its images told apart, and plain texts beside them, if there are any.

    Images' marks are special tokens: a text that spells one would count as an image.

    Raises:
        ServiceError: there are too many, or one is malformed.
    """
    request = request.with_sources()
    num_images = len(request.image_sources())
    check_count("messages", num_images, limits.max_images, "images")
    return replace(request, escape_special_tokens=True) if num_images else request


def _template_message(index: int, message: Message, takes_images: bool) -> dict[str, Any]:
    path = f"messages[{index}]"
    if message.role is None:
        raise missing_field(f"{path}.role")
    if message.content is None and not message.tool_calls:
        raise missing_field(f"{path}.content")
    content: str | list[dict[str, Any]]
    if takes_images and any(sources(message.content)):
        content = [_template_part(path, part) for part in message.content]
    else:
        content = _text(path, message.content)
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_calls:
        turn["tool_calls"] = [_parsed_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        turn["reasoning_content"] = message.reasoning_content
        # The name of gpt-oss's template for it, which refuses it beside content before calls.
        is_refused = bool(message.tool_calls and turn["content"])
        turn["thinking"] = "" if is_refused else message.reasoning_content
    return turn


def _template_part(path: str, part: Any) -> dict[str, Any]:
    if isinstance(part, ImageSource):
        return {"type": "image"}
    return {"type": "text", "text": _part_text(path, part)}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_text(content: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    """A message's content with a text at its end."""
    if isinstance(content, str):
        return content + text
    return [*content, {"type": "text", "text": text}]


def _text(path: str, content: Any) -> str:
    """The text of a message's content; parts are joined without a separator, as in TGI."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(path, part) for part in content)
    raise _bad_content(path)


def _part_text(path: str, part: Any) -> str:
    if isinstance(part, dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == IMAGE:
            raise _text_only(f"`{IMAGE}` is", f"{path}.content")
    if isinstance(part, ImageSource):
        raise _text_only("images are", part.field)
    raise _bad_content(path)


def _text_only(what: str, field: str) -> ServiceError:
    text = f"the model takes text only; {what} not supported"
    return ServiceError(ErrorKind.VALIDATION, text, field=field)


def _bad_content(path: str) -> ServiceError:
    return ServiceError(
        ErrorKind.SHAPE,
        f"{path}.content: data did not match any variant of untagged enum MessageContent",
        field=f"{path}.content",
    )


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI's clients send them as a string."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
            json.dumps(arguments, ensure_ascii=False).encode()  # fails for half a surrogate pair
        except (ValueError, RecursionError):
            return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


def dialect_of(tokenizer: TextTokenizer, server: ServerInfo) -> Dialect:
    """How a model writes calls and reasoning, by its template and the server's settings."""
    return Dialect.of(
        tokenizer.chat_template,
        tokenizer.added_token,
        takes_tools=tokenizer.template_takes_tools,
        calls=server.tool_call_parser,
        reasoning=server.reasoning_parser,
    )


def tool_call_format(
    setting: str, metadata: Mapping[str, str], tools: Sequence[Tool]
) -> ToolCallFormat:
    """The form of calls: the caller's header decides, else the server's setting.

    With `auto` the request decides: who defines tools by OpenAI's key reads OpenAI's form, and all
    others the contract's. OpenAI's own SDKs, known by a header, can read OpenAI's only.

    Raises:
        ServiceError: the header has another value.
    """
    wanted = metadata.get(_TOOL_CALL_HEADER, setting)
    if wanted == "auto":
        by_parameters = bool(tools) and not any(tool.by_contract for tool in tools)
        return "openai" if by_parameters or _OPENAI_HEADER in metadata else "tgi"
    if wanted == "openai":
        return "openai"
    if wanted == "tgi":
        return "tgi"
    raise ServiceError(
        ErrorKind.VALIDATION,
        f"the header `{_TOOL_CALL_HEADER}` must be `tgi`, `openai` or `auto`. Given: {wanted}",
        field=_TOOL_CALL_HEADER,
    )
