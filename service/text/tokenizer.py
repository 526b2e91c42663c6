"""Text to tokens and back, and a model's special tokens. Loaded from the model's own files."""

from __future__ import annotations

import asyncio
import json
import logging
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar, TypeVarTuple, cast

from jinja2 import Environment, TemplateError, UndefinedError, meta
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from engine.protocol.errors import first_line

from ..checkpoint.path import GGUF
from ..checkpoint.tokenizer_files import converted_files
from ..errors import ErrorKind, ServiceError
from ..workers.turns import Turns
from .escaping import EscapedText, SpecialTokens
from .long_texts import LONG_CHARS, LONG_LIST_CHARS, LONG_MESSAGES, LongTexts, TooManyTokensError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_DEVELOPER = "developer"  # who instructs the model, since OpenAI's models of 2024
_SLICE = 2048  # tokens that are looked at together
_LOCAL_DECODERS = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


class TokenSpan(NamedTuple):
    """A token of a text, and the bytes of its UTF-8 form that it covers."""

    token_id: int
    text: str
    start: int
    stop: int


class TextTokenizer:
    """The model's tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        eos_token_ids: tokens that end a text.
        num_workers: threads that tokenise.

    Attributes:
        long_texts: the processes for long texts. Without them, as in these processes themselves,
            all texts are tokenised here.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int],
        num_workers: int = 2,
    ) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenizer")
        self._turns = Turns(num_workers)
        self.long_texts: LongTexts | None = None
        self.eos_token_ids = eos_token_ids
        self.special_ids = _special_ids(tokenizer)
        self._bos_id = tokenizer.bos_token_id
        self._texts: dict[int, str] = {}
        self._anchor = _anchor(self._backend)
        self._texts_after = _TextsAfter(self._backend, self._anchor)
        self._added = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        self._special_tokens: SpecialTokens | None = None
        self._special_tokens_lock = Lock()
        self._max_token_chars = max(map(len, self._backend.get_vocab()), default=1)

    @classmethod
    def load(
        cls,
        model_id: str,
        revision: str | None = None,
        *,
        num_workers: int = 2,
        config_path: Path | None = None,
        trust_remote_code: bool = False,
    ) -> TextTokenizer:
        """Loads the tokenizer of a model directory, GGUF file or hub id.

        `config_path` is a tokenizer_config.json whose chat template replaces the model's own, and
        `trust_remote_code` says whether code in the checkpoint may run.

        Raises:
            ValueError: there is no tokenizer, it has no fast form, it is code that may not run, or
                the configuration is broken.
        """
        try:
            tokenizer, eos_ids = _load(model_id, revision, trusted=trust_remote_code)
            if config_path is not None:
                tokenizer.chat_template = json.loads(config_path.read_bytes()).get("chat_template")
        except Exception as error:  # a broken checkpoint can fail in any way
            reason = _reason(error, trusted=trust_remote_code)
            if files := converted_files(Path(model_id)):
                what = (
                    f"it has no tokenizer.json, and transformers makes none of {', '.join(files)}"
                )
                reason = f"{what}: {reason}"
            raise ValueError(f"cannot load the tokenizer of {model_id}: {reason}") from error
        if not tokenizer.is_fast:
            raise ValueError(f"No fast tokenizer or tokenizer.json for {model_id}")
        return cls(tokenizer, eos_ids, num_workers)

    def to_json(self) -> str:
        """The tokenizer.json, as text."""
        return str(self._backend.to_str())

    def fit(self, vocab_size: int) -> None:
        """Leaves the model only ends that it has, and warns of other tokens that it lacks.

        Args:
            vocab_size: width of the model's logits and of its embedding.

        Raises:
            ValueError: every prompt would have a token that the model lacks, or there is no other.
        """
        around = self._backend.encode("").ids  # what it puts around every text
        known = set(self._backend.get_vocab().values())
        if (
            max(around, default=0) >= vocab_size
            or min(known - self.special_ids, default=0) >= vocab_size
        ):
            raise ValueError(
                f"the tokenizer does not belong to this model: of every text it makes token ids "
                f"that the model, which has {vocab_size}, lacks"
            )
        if missing := sorted(token_id for token_id in known if token_id >= vocab_size):
            logger.warning(
                "the model has %d token ids and lacks %d of the tokenizer's, from %d on: texts "
                "with one of them are refused",
                vocab_size,
                len(missing),
                missing[0],
            )
        self.eos_token_ids = frozenset(index for index in self.eos_token_ids if index < vocab_size)

    async def encode(
        self, text: str, *, truncate: int | None = None, max_tokens: int = sys.maxsize
    ) -> tuple[int, ...]:
        """Token ids of a text, with the special tokens that the model wants around it.

        `truncate` is the number of last tokens to keep, special ones at the front included. A text
        that begins with the beginning-of-text token does not get a second one.

        Raises:
            TooManyTokensError: there are more than `max_tokens`.
            ServiceError: the text is long and takes too long, or too many long ones wait.
        """
        if truncate is not None:
            text = self._end(text, truncate)
        if self.long_texts is not None and len(text) > LONG_CHARS:
            return await self.long_texts.encode(text, truncate, max_tokens)
        return await self._run(self.encode_now, text, truncate, max_tokens)

    def encode_now(self, text: str, truncate: int | None, max_tokens: int) -> tuple[int, ...]:
        """The same as `encode`, for any text, in the caller's thread.

        Raises:
            TooManyTokensError: there are more than `max_tokens`.
        """
        encoding = self._encode(text, truncate)
        if len(encoding) > max_tokens + 1:  # one may not count
            raise TooManyTokensError(len(encoding))
        ids = encoding.ids
        return tuple(ids[1:] if self._begins_twice(ids) else ids)

    async def spans(self, text: str, *, is_prompt: bool = False) -> list[TokenSpan]:
        """The tokens of a text with byte offsets; of a prompt the same tokens as `encode` gives."""
        slices = await self._run(lambda: list(self.span_slices(text, is_prompt=is_prompt)))
        return [span for spans in slices for span in spans]

    def span_slices(self, text: str, *, is_prompt: bool) -> Iterator[list[TokenSpan]]:
        """The same as `spans`, slice by slice, in the caller's thread."""
        if isinstance(text, EscapedText):
            encoding, origins = self.special_tokens.encode(text)
            offsets = [(origins[start], origins[stop]) for start, stop in encoding.offsets]
        else:
            encoding = self._encode(text)
            offsets = encoding.offsets
        ids = encoding.ids
        starts = _byte_offsets(text)
        raw = text.encode()
        first = 1 if is_prompt and self._begins_twice(ids) else 0
        for index in range(first, len(ids), _SLICE):
            part = slice(index, index + _SLICE)
            yield [
                TokenSpan(
                    token_id,
                    raw[starts[start] : starts[stop]].decode(errors="replace"),
                    starts[start],
                    starts[stop],
                )
                for token_id, (start, stop) in zip(ids[part], offsets[part], strict=True)
            ]

    def _begins_twice(self, ids: Sequence[int]) -> bool:
        return len(ids) > 1 and ids[0] == ids[1] == self._bos_id

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text = self._backend.decode(token_ids, skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token, decoded alone."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text

    @property
    def text_after(self) -> Callable[[int], str] | None:
        """What a token adds to any text of whole characters; None if that depends on the text."""
        return None if self._anchor is None else self._texts_after.__getitem__

    def too_long(self, text: str, max_tokens: int) -> bool:
        """Whether a text must have more tokens than this, as far as its length alone tells."""
        return len(text) > max_tokens * self._max_token_chars

    @property
    def template_takes_tools(self) -> bool:
        """Whether the model's chat template renders tools."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):  # named templates: transformers takes this one for tools
            return "tool_use" in template or _takes_tools(template.get("default", ""))
        return bool(template) and _takes_tools(str(template))

    @property
    def chat_template(self) -> str:
        """The chat template, the one for tools where there are several; empty if there is none."""
        template = self._tokenizer.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use", template.get("default", ""))
        return str(template)

    def added_token(self, text: str) -> int | None:
        """The id of a token that was added to the vocabulary for just this text."""
        return self._added.get(text)

    @property
    def special_tokens(self) -> SpecialTokens:
        """The special tokens as texts spell them. The first look takes as long as loading."""
        with self._special_tokens_lock:
            if self._special_tokens is None:
                self._special_tokens = SpecialTokens(self._backend)
            return self._special_tokens

    def processes_for_list(self, text: str) -> LongTexts | None:
        """The processes that have to list the tokens of a text, if it is long."""
        return self.long_texts if len(text) > LONG_LIST_CHARS else None

    def processes_for_chat(self, num_bytes: int, num_messages: int) -> LongTexts | None:
        """The processes that have to render a conversation, if it is long."""
        is_long = num_bytes > LONG_CHARS or num_messages > LONG_MESSAGES
        return self.long_texts if is_long else None

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, made by the model's template in transformers' sandbox.

        OpenAI's role `developer` is `system` to a template that does not know it. `variables` are
        further ones of the template, `continue_final_message` among them, with which the last
        message is left open.

        Raises:
            ServiceError: the model has no template, or the template refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ServiceError(ErrorKind.TEMPLATE, "template not found")
        try:
            template = self._tokenizer.get_chat_template(tools=cast("list[Any] | None", tools))
            text = self._tokenizer.apply_chat_template(
                messages if _DEVELOPER in template else _without_developers(messages),
                tools=cast("list[Any] | None", tools),
                tokenize=False,
                **{"add_generation_prompt": True, **variables},
            )
        except UndefinedError as error:
            raise ServiceError(ErrorKind.TEMPLATE, f"undefined value ({error})") from error
        except TemplateError as error:
            raise ServiceError(ErrorKind.TEMPLATE, f"syntax error: {error}") from error
        except Exception as error:  # a template is a program: it may raise anything
            raise ServiceError(ErrorKind.TEMPLATE, str(error)) from error
        assert isinstance(text, str)
        return text

    async def _run(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        async with self._turns.place():
            return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    def _encode(self, text: str, truncate: int | None = None) -> Encoding:
        # As a batch of one: `encode` would hold the interpreter's lock all the time.
        if isinstance(text, EscapedText):
            return self.special_tokens.encode(text)[0]
        if truncate is None:
            return self._backend.encode_batch([text])[0]
        end = self._end(text, truncate)
        encoding = self._backend.encode_batch([end], add_special_tokens=False)[0]
        room = max(truncate - self._backend.num_special_tokens_to_add(is_pair=False), 0)
        encoding.truncate(room, direction="left")
        return self._backend.post_process(encoding)

    def _end(self, text: str, truncate: int) -> str:
        """What the last tokens are made of: they are not longer than twice as many longest ones."""
        return text[-2 * truncate * self._max_token_chars :]


class _TextsAfter(dict[int, str]):
    """What each token adds to a text of whole characters, decoded when it is first asked for.

    Args:
        backend: decodes.
        anchor: a token of one letter, which stands for the text.
    """

    def __init__(self, backend: Tokenizer, anchor: int | None) -> None:
        super().__init__()
        self._backend = backend
        self._anchor = anchor

    def __missing__(self, token_id: int) -> str:
        assert self._anchor is not None
        before = self._decode([self._anchor])
        text = self[token_id] = self._decode([self._anchor, token_id]).removeprefix(before)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=False))


def _load(
    model_id: str, revision: str | None, *, trusted: bool
) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
    """The tokenizer of a model, and the tokens that end a text."""
    if model_id.endswith(GGUF):
        from .gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(Path(model_id))
    # Without a yes or no transformers asks at the terminal.
    tokenizer = AutoTokenizer.from_pretrained(
        model_id, revision=revision, trust_remote_code=trusted
    )
    return tokenizer, _eos_ids(model_id, revision, tokenizer)


def _reason(error: Exception, *, trusted: bool) -> str:
    """One line on why a tokenizer cannot be loaded."""
    if not trusted and "trust_remote_code" in str(error):
        return "it is code that comes with the model, which runs only with --trust-remote-code"
    return first_line(error)


def _without_developers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**item, "role": "system"} if item.get("role") == _DEVELOPER else item for item in messages
    ]


@cache
def _takes_tools(template: str) -> bool:
    """Whether a template reads the variable `tools`."""
    try:
        return "tools" in meta.find_undeclared_variables(Environment().parse(template))  # noqa: S701
    except TemplateError:  # a tag that only transformers knows
        return "tools" in template


def _anchor(backend: Tokenizer) -> int | None:
    """A token of one letter, if the decoder looks at no token together with whole characters."""
    if not _is_local(backend):
        return None
    ids = (backend.token_to_id(letter) for letter in string.ascii_letters)
    return next(
        (index for index in ids if index is not None and len(backend.decode([index])) == 1), None
    )


def _is_local(backend: Tokenizer) -> bool:
    """Whether text made of whole characters stays the same whatever token follows.

    Decoders of GPT-2's kind put bytes together; those of SentencePiece's kind replace the mark of a
    space in each token, put bytes together, and strip the beginning of the whole text.
    """
    if backend.decoder is None:
        return False
    spec = json.loads(backend.decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    names = [step["type"] for step in steps]
    if "Fuse" in names and "Replace" in names[names.index("Fuse") :]:
        return False  # of several tokens' text together
    return all(step["type"] in _LOCAL_DECODERS and not step.get("stop") for step in steps)


def _byte_offsets(text: str) -> Sequence[int]:
    """Byte offset of each character in UTF-8, and of the end: tokenizers count characters."""
    if text.isascii():
        return range(len(text) + 1)
    sizes = (1 + (c > "\x7f") + (c > "\u07ff") + (c > "\uffff") for c in text)
    return list(accumulate(sizes, initial=0))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {index for index, tok in added if tok.special}


def _eos_ids(
    model_id: str, revision: str | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The tokenizer's end-of-text token, or the list in generation_config.json if there is one."""
    eos: Any = None
    with suppress(OSError):  # no generation_config.json: nothing to replace
        eos = GenerationConfig.from_pretrained(model_id, revision=revision or "main").eos_token_id
    if isinstance(eos, list):
        return frozenset(eos)
    known = (eos, tokenizer.eos_token_id)
    return frozenset(index for index in known if index is not None)
