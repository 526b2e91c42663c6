"""The handlers of the RPCs, by their names; what answers them stands beside this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from engine.protocol.adapters import LoadAdapter

from ..call_record import current_record
from ..codec import convert, presenter
from ..codec.presenter import InvocationKind, Reply
from ..errors import missing_field, unhealthy
from ..generation.adapter_changes import AdapterChanges
from ..generation.engines import Engines
from ..generation.limits import Limits
from ..generation.load import LoadMeter
from ..generation.metrics import Metrics
from ..generation.parameters import TextRequest
from ..generation.pipeline import Pipeline
from ..generation.server_info import ServerInfo
from ..images.images import Images
from ..openai.chat import ChatRequest
from ..openai.completions import CompletionsRequest
from ..openai.responses.request import ResponsesRequest
from ..siblings.siblings import Siblings
from ..text.tokenizer import TextTokenizer
from ..workers.lanes import Lanes
from . import docs
from .call import Call
from .chats import Chats
from .completions import Completions
from .conversations import Conversations
from .generations import Generations
from .image_prompts import ImagePrompts
from .loads import Loads
from .models import Models
from .replies import read
from .responses import Responses
from .texts import Texts
from .token_lists import TokenLists
from .whole_replies import WholeReplies


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
        self._client = client
        self._server = server
        self._metrics = metrics
        self._meter = meter
        self._siblings = siblings
        prompts = ImagePrompts(images, tokenizer, server.limits)
        conversations = Conversations(server, tokenizer, lanes, prompts, metrics)
        generations, replies = Generations(pipeline, server.compute_type), WholeReplies()
        self._texts = Texts(generations, prompts, replies)
        self._chats = Chats(generations, conversations, replies, server)
        self._completions = Completions(generations, prompts, replies, tokenizer, server)
        self._responses = Responses(generations, conversations, replies, server)
        self._token_lists = TokenLists(pipeline, tokenizer, server, prompts, conversations)
        self._models = Models(server, AdapterChanges(client, server.adapters))
        self._loads = Loads(meter, pipeline)
        self._scraper = ThreadPoolExecutor(1, "metrics")

    @property
    def limits(self) -> Limits:
        """Those in force."""
        return self._server.limits

    async def generate(self, request: TextRequest, call: Call) -> Reply:
        """Generates a whole text."""
        return await self._texts.generate(request, call)

    async def generate_stream(self, request: TextRequest, call: Call) -> AsyncGenerator[Reply]:
        """Generates a text as one message per token."""
        return await self._texts.generate_stream(request, call)

    async def compat_generate(self, request: TextRequest, call: Call) -> AsyncGenerator[Reply]:
        """Generate or GenerateStream; by default the text includes the prompt."""
        return await self._texts.compat_generate(request, call)

    async def chat(self, request: ChatRequest, call: Call) -> AsyncGenerator[Reply]:
        """Continues a conversation."""
        return await self._chats.answer(request, call)

    async def completions(self, request: CompletionsRequest, call: Call) -> AsyncGenerator[Reply]:
        """Continues one or several prompts."""
        return await self._completions.answer(request, call)

    async def responses(self, request: ResponsesRequest, call: Call) -> AsyncGenerator[Reply]:
        """Continues a conversation in the shape of OpenAI's Responses API."""
        return await self._responses.answer(request, call)

    async def chat_unary(self, request: ChatRequest, call: Call) -> Reply:
        """Chat for callers that want a unary method: typed only, since no REST path has it."""
        return await self._chats.answer_unary(request, call)

    async def completions_unary(self, request: CompletionsRequest, call: Call) -> Reply:
        """Completions for callers that want a unary method: typed only."""
        return await self._completions.answer_unary(request, call)

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
        return read(self._token_lists.messages(inputs, call), call)

    async def chat_tokenize(self, request: ChatRequest, call: Call) -> Reply:
        """The prompt of a conversation, and its tokens: typed only, too."""
        return await self._token_lists.whole(request, call)

    def chat_tokenize_stream(self, request: ChatRequest, call: Call) -> AsyncGenerator[Reply]:
        """The same as a stream."""
        return read(self._token_lists.messages(request, call), call)

    async def list_models(self, _: None, call: Call) -> Reply:
        """The model that is served, and the adapters beside it."""
        return call.presenter.list_models(self._server)

    async def get_model(self, model_id: str, call: Call) -> Reply:
        """The model or adapter of this name."""
        return self._models.find(model_id, call)

    async def load_adapter(self, wanted: LoadAdapter, call: Call) -> Reply:
        """Loads an adapter, for callers that the authenticator knows as admins."""
        return await self._models.load_adapter(wanted, call)

    async def unload_adapter(self, name: str, call: Call) -> Reply:
        """Takes an adapter away, for admins."""
        return await self._models.unload_adapter(name, call)

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
        return self._loads.now()

    def watch_load(self, interval: float | None, call: Call) -> AsyncGenerator[Reply]:
        """How busy the server is, again and again: typed only."""
        return self._loads.watch(interval, call)

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
