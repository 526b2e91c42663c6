"""The handlers of the RPCs: each converts its request, passes it on and presents the result.

A failure before a stream's headers are sent is raised and gets a status of its own. A later one is
presented: as an event to REST callers, as a status to gRPC callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar
from urllib.parse import unquote

from engine.protocol.adapters import LoadAdapter

from ..call_record import current_record, note_answer, note_error
from ..codec import convert, headers, presenter
from ..codec.presenter import InvocationKind, Reply
from ..errors import (
    ErrorKind,
    ServiceError,
    fields_named,
    internal,
    missing_field,
    overloaded,
    unhealthy,
    unknown_model,
)
from ..generation.adapter_changes import AdapterChanges
from ..generation.engines import Engines
from ..generation.generator import Generation, TokenEvent
from ..generation.limits import Limits
from ..generation.load import LoadMeter, watch_interval
from ..generation.metrics import Metrics
from ..generation.parameters import Parameters, Prompt, TextRequest
from ..generation.pipeline import Pipeline
from ..generation.server_info import ServerInfo
from ..generation.turns import round_robin
from ..images.images import Images
from ..openai import chat_answer, completions
from ..openai.chat import (
    ChatRequest,
)
from ..openai.chat_answer import ChatAnswer, ChatStream
from ..openai.completions import (
    CompletionAnswer,
    CompletionsRequest,
    CompletionStream,
)
from ..openai.head import Head
from ..openai.responses.request import ResponsesRequest, responses_fields
from ..openai.responses.stream import ResponseStream, answer
from ..openai.usage import StreamUsage, Usage
from ..siblings.siblings import Siblings
from ..text.tokenizer import TextTokenizer
from ..workers.gather import gather
from ..workers.lanes import Lanes
from . import docs
from .call import Call
from .conversations import Conversations
from .image_prompts import ImagePrompts
from .token_lists import TokenLists
from .whole_replies import WholeReplies

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

KEEP_ALIVE_S = 15.0  # TGI's interval: axum's KeepAlive
_MAX_WATCHERS = 128  # of the load


class TextGenerationServicer:
    """tokenwire.v1.TextGenerationService."""

    def __init__(
        self,
        pipeline: Pipeline,
        tokenizer: TextTokenizer,
        client: Engines,
        server: ServerInfo,
        metrics: Metrics,
        meter: LoadMeter,
        lanes: Lanes,
        siblings: Siblings | None = None,
        images: Images | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._client = client
        self._server = server
        self._metrics = metrics
        self._meter = meter
        self._num_watchers = 0
        self._siblings = siblings
        self._image_prompts = ImagePrompts(images, tokenizer, server.limits)
        self._conversations = Conversations(server, tokenizer, lanes, self._image_prompts, metrics)
        self._token_lists = TokenLists(
            pipeline, tokenizer, server, self._image_prompts, self._conversations
        )
        self._adapter_changes = AdapterChanges(client, server.adapters)
        self._scraper = ThreadPoolExecutor(1, "metrics")
        self._replies = WholeReplies()

    @property
    def limits(self) -> Limits:
        """Those in force."""
        return self._server.limits

    async def generate(self, request: TextRequest, call: Call) -> Reply:
        """Generates a whole text."""
        inputs = await self._image_prompts.of_text(request.inputs, request.images)
        result = await self._run(inputs, request.parameters, call)
        return await self._replies.made([result], partial(call.presenter.generate, result))

    async def generate_stream(self, request: TextRequest, call: Call) -> AsyncGenerator[Reply]:
        """Generates a text as one message per token."""
        self._pipeline.check_adapter(request.parameters)
        inputs = await self._image_prompts.of_text(request.inputs, request.images)
        events = self._stream(inputs, request.parameters, call)
        return self._presented(events, [inputs], call, call.presenter.generate_stream)

    async def compat_generate(self, request: TextRequest, call: Call) -> AsyncGenerator[Reply]:
        """Generate or GenerateStream; by default the text includes the prompt."""
        inputs = await self._image_prompts.of_text(request.inputs, request.images)
        parameters = request.parameters
        if parameters.return_full_text is None:
            parameters = replace(parameters, return_full_text=True)
        if not request.stream:
            result = await self._run(inputs, parameters, call)
            present = partial(call.presenter.compat_generate, result)
            return _alone(await self._replies.made([result], present))
        self._pipeline.check_adapter(parameters)
        events = self._stream(inputs, parameters, call)
        return self._presented(events, [inputs], call, call.presenter.compat_generate_stream)

    async def chat(self, request: ChatRequest, call: Call) -> AsyncGenerator[Reply]:
        """Continues a conversation."""
        conversation = await self._conversations.of_chat(request, call)
        wanted, prompt = conversation.request, conversation.prompt
        head = self._head("chatcmpl-", wanted)
        with fields_named(wanted.field_names):
            if not wanted.stream:
                present = call.presenter.chat
                return _alone(await self._answer(wanted, prompt, head, call, present))
            self._pipeline.check_adapter(wanted.parameters)
        messages = self._chat_deltas(wanted, prompt, head, call)
        return self._presented(messages, [prompt], call, _as_it_is, openai=True)

    async def completions(self, wanted: CompletionsRequest, call: Call) -> AsyncGenerator[Reply]:
        """Continues one or several prompts."""
        wanted.check(self._server.limits)
        head = self._head("cmpl-", wanted)
        with fields_named(completions.FIELD_NAMES):
            wanted = await self._pictured(wanted)
            if not wanted.stream:
                present = call.presenter.completions
                return _alone(await self._complete(wanted, head, call, present))
            self._pipeline.check_adapter(wanted.parameters)
        messages = self._completion_deltas(wanted, head, call)
        return self._presented(messages, wanted.prompts, call, _as_it_is, openai=True)

    async def responses(self, wanted: ResponsesRequest, call: Call) -> AsyncGenerator[Reply]:
        """Continues a conversation in the shape of OpenAI's Responses API."""
        with responses_fields(wanted):
            wanted.check(self.limits)
            conversation = await self._conversations.of(wanted.chat, call)
            chat_request, prompt = conversation.request, conversation.prompt
        wanted = replace(wanted, chat=chat_request)  # with the tools in force
        head = self._head("resp_", chat_request)
        with responses_fields(wanted):
            if not chat_request.stream:
                result = await self._run(prompt, chat_request.parameters, call)
                reply = await self._replies.made(
                    [result], lambda: call.presenter.response(answer(wanted, result, head))
                )
                return _alone(reply)
            self._pipeline.check_adapter(chat_request.parameters)
        stream = ResponseStream(wanted, head)
        messages = self._response_events(wanted, prompt, stream, call)
        failed = partial(call.presenter.response_failure, stream)
        return self._presented(messages, [prompt], call, _as_it_is, failed=failed)

    async def chat_unary(self, request: ChatRequest, call: Call) -> Reply:
        """Chat for callers that want a unary method: typed only, since no REST path has it."""
        _check_unary(request.stream)
        conversation = await self._conversations.of_chat(request, call)
        wanted = conversation.request
        with fields_named(wanted.field_names):
            head = self._head("chatcmpl-", wanted)
            present = convert.chat_completion
            return await self._answer(wanted, conversation.prompt, head, call, present)

    async def completions_unary(self, wanted: CompletionsRequest, call: Call) -> Reply:
        """Completions for callers that want a unary method: typed only."""
        _check_unary(wanted.stream)
        wanted.check(self._server.limits)
        with fields_named(completions.FIELD_NAMES):
            wanted = await self._pictured(wanted)
            head = self._head("cmpl-", wanted)
            return await self._complete(wanted, head, call, convert.completion)

    async def invocations(
        self, request: TextRequest | ChatRequest | CompletionsRequest, call: Call
    ) -> AsyncGenerator[Reply]:
        """CompatGenerate, Chat or Completions, depending on the fields that are set."""
        kind: InvocationKind
        match request:
            case ChatRequest():
                kind, begun = "chat", self.chat(request, call)
            case CompletionsRequest():
                kind, begun = "completions", self.completions(request, call)
            case _:
                kind, begun = "generate", self.compat_generate(request, call)
        async with aclosing(await begun) as replies:
            async for reply in replies:
                yield call.presenter.invocation(kind, reply)

    async def tokenize(self, inputs: str, call: Call) -> Reply:
        """Splits text into tokens: typed only, since the REST path has the stream."""
        return await self._token_lists.whole(inputs, call)

    def tokenize_stream(self, inputs: str, call: Call) -> AsyncGenerator[Reply]:
        """Splits text into tokens, some of which are in each message."""
        return _read(self._token_lists.messages(inputs, call), call)

    async def chat_tokenize(self, request: ChatRequest, call: Call) -> Reply:
        """The prompt of a conversation, and its tokens: typed only, too."""
        return await self._token_lists.whole(request, call)

    def chat_tokenize_stream(self, request: ChatRequest, call: Call) -> AsyncGenerator[Reply]:
        """The same as a stream."""
        return _read(self._token_lists.messages(request, call), call)

    async def list_models(self, _: None, call: Call) -> Reply:
        """The model that is served, and the adapters beside it."""
        return call.presenter.list_models(self._server)

    async def get_model(self, model_id: str, call: Call) -> Reply:
        """The model or adapter of this name.

        Raises:
            ServiceError: there is none.
        """
        # Clients write the slashes of a name in a path as %2F, and Envoy leaves them so.
        name = unquote(model_id) if call.is_rest else model_id
        found = self._server.find_model(name)
        if found is None:
            raise unknown_model(name)
        return call.presenter.get_model(self._server, found)

    async def load_adapter(self, wanted: LoadAdapter, call: Call) -> Reply:
        """Loads an adapter, for callers that the authenticator knows as admins.

        Raises:
            ServiceError: it cannot be loaded.
        """
        wanted = replace(wanted, call=call.gateway_id)
        return call.presenter.adapter_loaded(await self._adapter_changes.load(wanted))

    async def unload_adapter(self, name: str, call: Call) -> Reply:
        """Takes an adapter away, for admins.

        Raises:
            ServiceError: there is none of this name.
        """
        await self._adapter_changes.unload(name, call.gateway_id)
        return call.presenter.adapter_unloaded(name)

    async def list_adapters(self, _: None, __: Call) -> Reply:
        """The adapters that are loaded, for admins: typed only."""
        return convert.adapters_response(self._server)

    async def open_api(self, _: None, __: Call) -> Reply:
        """The OpenAPI document: the contract with our additions."""
        return presenter.document(docs.JSON_TYPE, docs.open_api(self._server.model_id))

    async def docs(self, asset: str, _: Call) -> Reply:
        """The interactive documentation."""
        return presenter.document(*docs.file(asset))

    async def info(self, _: None, call: Call) -> Reply:
        """The model, the limits, and the part of the steps that were replayed from recordings."""
        return call.presenter.info(self._server, self._meter.load().replayed_share)

    async def health(self, _: None, call: Call) -> Reply:
        """Answers while an engine is connected and its step loop runs.

        Raises:
            ServiceError: otherwise.
        """
        if not self._client.is_healthy:
            raise unhealthy()
        return call.presenter.health()

    async def get_load(self, _: None, __: Call) -> Reply:
        """How busy the server is: typed only, since no REST path has it."""
        return convert.load_response(self._meter.load())

    async def watch_load(self, interval: float | None, call: Call) -> AsyncGenerator[Reply]:
        """How busy the server is, again and again: typed only.

        Raises:
            ServiceError: the interval has not a possible value, too many callers watch, or the
                server shuts down.
        """
        interval_s = watch_interval(interval)
        if self._num_watchers >= _MAX_WATCHERS:
            raise overloaded()
        self._num_watchers += 1
        try:
            async with aclosing(self._loads(interval_s)) as loads:
                call.end_unread_by(loads.aclose)
                async for load in loads:
                    yield load
            raise call.failure or unhealthy()
        finally:
            self._num_watchers -= 1

    async def abort(self, request_id: str, _: Call) -> Reply:
        """Ends the calls of an id: typed only.

        Raises:
            ServiceError: there is no id, or the call may run where nobody answers.
        """
        if not request_id:
            raise missing_field("request_id")
        record = current_record()
        caller = None if record is None else record.caller
        count = self._pipeline.abort(request_id, caller)
        if self._siblings is not None:
            count = await self._siblings.abort(request_id, caller, count)
        return convert.abort_response(count)

    async def metrics(self, _: None, call: Call) -> Reply:
        """All series, in the form that the header `accept` asks for.

        They are put together by a thread of their own, in milliseconds, and wait for no request.
        """
        accept = call.metadata.get("accept", "")
        loop = asyncio.get_running_loop()
        collect = None if self._siblings is None else await self._siblings.series()
        shown = await loop.run_in_executor(self._scraper, self._metrics.render, accept, collect)
        return presenter.document(*shown)

    async def _pictured(self, request: CompletionsRequest) -> CompletionsRequest:
        """Prompts with the images that their Markdown shows."""
        prompts = [await self._image_prompts.of_text(prompt) for prompt in request.prompts]
        return replace(request, prompts=tuple(prompts))

    async def _loads(self, interval_s: float) -> AsyncGenerator[Reply]:
        """The load, until the server shuts down."""
        while True:
            yield convert.load_response(self._meter.load())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._pipeline.closed(), interval_s)
                return

    async def _run(self, prompt: Prompt, parameters: Parameters, call: Call) -> Generation:
        result = await self._pipeline.run(prompt, parameters, call.received)
        await call.send_headers(headers.of_generation(result, self._server.compute_type))
        return result

    def _stream(
        self, prompt: Prompt, parameters: Parameters, call: Call
    ) -> AsyncGenerator[TokenEvent]:
        return self._pipeline.stream(prompt, parameters, call.received)

    async def _answer(
        self,
        wanted: ChatRequest,
        prompt: str,
        head: Head,
        call: Call,
        present: Callable[[Sequence[ChatAnswer]], Reply],
    ) -> Reply:
        results = await self._pipeline.run_choices(
            prompt, wanted.parameters, wanted.num_choices, call.received
        )
        await call.send_headers(headers.of_choices(results, self._server.compute_type))
        return await self._replies.made(
            results,
            lambda: present([chat_answer.answer(wanted, result, head) for result in results]),
        )

    async def _complete(
        self,
        wanted: CompletionsRequest,
        head: Head,
        call: Call,
        present: Callable[[CompletionAnswer], Reply],
    ) -> Reply:
        results = await gather(
            self._pipeline.run_choices(prompt, wanted.parameters, wanted.num_choices, call.received)
            for prompt in wanted.prompts
        )
        done = [result for choices in results for result in choices]
        decode = self._tokenizer.decode
        answer = await self._replies.run(done, lambda: wanted.answer(head, results, decode))
        await call.send_headers(headers.of_generations(answer.choices, self._server.compute_type))
        return await self._replies.made(done, partial(present, answer))

    def _choices(
        self, prompt: Prompt, wanted: ChatRequest | CompletionsRequest, call: Call
    ) -> AsyncGenerator[TokenEvent]:
        return self._pipeline.stream(prompt, wanted.parameters, call.received, wanted.num_choices)

    async def _chat_deltas(
        self, wanted: ChatRequest, prompt: str, head: Head, call: Call
    ) -> AsyncGenerator[Reply]:
        finished = []
        answers = [ChatStream(wanted, head, index) for index in range(wanted.num_choices)]
        generated = self._choices(prompt, wanted, call)
        async with aclosing(_renaming(generated, wanted.field_names)) as events:
            async for event in events:
                for part in answers[event.choice].push(event):
                    yield call.presenter.chat_stream(part)
                if event.generation is not None:
                    finished.append(event.generation)
        if wanted.include_usage:
            usage = StreamUsage(head=head, usage=Usage.of_choices([finished]))
            yield call.presenter.chat_usage(usage)

    async def _response_events(
        self, wanted: ResponsesRequest, prompt: str, stream: ResponseStream, call: Call
    ) -> AsyncGenerator[Reply]:
        for event in stream.begin():
            yield call.presenter.response_event(event)
        generated = self._stream(prompt, wanted.chat.parameters, call)
        with responses_fields(wanted):
            async with aclosing(generated) as tokens:
                async for token in tokens:
                    for event in stream.push(token):
                        yield call.presenter.response_event(event)

    async def _completion_deltas(
        self, wanted: CompletionsRequest, head: Head, call: Call
    ) -> AsyncGenerator[Reply]:
        finished: list[list[Generation]] = [[] for _ in wanted.prompts]
        parts = [
            CompletionStream(wanted, head, index, self._echoed(wanted, index))
            for index in range(len(wanted.prompts) * wanted.num_choices)
        ]
        streams = [self._choices(prompt, wanted, call) for prompt in wanted.prompts]
        async with aclosing(round_robin(streams)) as turns:
            async for number, item in turns:
                if isinstance(item, ServiceError):
                    item.rename_field(completions.FIELD_NAMES)
                    yield call.presenter.stream_error(item)
                    continue
                part = parts[number * wanted.num_choices + item.choice].push(item)
                yield call.presenter.completions_stream(part)
                if part.generation is not None:
                    finished[number].append(part.generation)
        if wanted.include_usage:
            usage = StreamUsage(head=head, usage=Usage.of_choices(finished))
            yield call.presenter.completions_usage(usage)

    def _echoed(self, wanted: CompletionsRequest, index: int) -> str:
        """The text that the continuation number `index` begins with."""
        if not wanted.echo:
            return ""
        prompt = wanted.prompts[index // wanted.num_choices]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _head(
        self,
        prefix: Literal["chatcmpl-", "cmpl-", "resp_"],
        wanted: ChatRequest | CompletionsRequest,
    ) -> Head:
        head = Head.begin(prefix, wanted.parameters.adapter_id, self._server)
        note_answer(head.id)
        return head

    async def _presented(
        self,
        messages: AsyncGenerator[_T],
        prompts: Sequence[Prompt],
        call: Call,
        present: Callable[[_T], Reply],
        *,
        openai: bool = False,
        failed: Callable[[ServiceError], Sequence[Reply]] | None = None,
    ) -> AsyncGenerator[Reply]:
        """Sends a stream's headers; yields its messages, failure and end mark."""
        failed = failed or call.presenter.stream_failure
        await call.begin_stream(headers.of_stream(prompts, self._server.compute_type))
        filler = call.presenter.keep_alive()
        if filler is not None:
            call.keep_alive(filler, KEEP_ALIVE_S)
        call.end_unread_by(messages.aclose)
        try:
            async with aclosing(messages):
                async for message in messages:
                    yield present(message)
            if call.failure is not None:
                raise call.failure
        except ServiceError as error:
            note_error(error.kind.error_type)
            for reply in failed(error):
                yield reply
        except Exception:
            logger.exception("a stream failed unexpectedly")
            note_error(ErrorKind.INTERNAL.error_type)
            for reply in failed(internal()):
                yield reply
        if openai and (end := call.presenter.stream_end()) is not None:
            yield end


def _check_unary(stream: bool) -> None:
    """Refuses a stream where there is one reply.

    Raises:
        ServiceError: the caller wants a stream.
    """
    if stream:
        raise ServiceError(
            ErrorKind.VALIDATION, "`stream` must not be set: this method is unary", field="stream"
        )


async def _read(messages: AsyncGenerator[Reply], call: Call) -> AsyncGenerator[Reply]:
    """Messages, until the caller does not read them any more.

    Raises:
        ServiceError: it does not.
    """
    async with aclosing(messages):
        call.end_unread_by(messages.aclose)
        async for message in messages:
            yield message
    if call.failure is not None:
        raise call.failure


async def _alone(reply: Reply) -> AsyncGenerator[Reply]:
    """The reply of a call that asked for no stream."""
    yield reply


def _as_it_is(reply: Reply) -> Reply:
    """Presents what is a reply already."""
    return reply


async def _renaming(
    events: AsyncGenerator[TokenEvent], names: Mapping[str, str]
) -> AsyncGenerator[TokenEvent]:
    """The same, with the endpoint's own names of fields in its failure."""
    with fields_named(names):
        async with aclosing(events):
            async for event in events:
                yield event
