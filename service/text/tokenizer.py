"""Text to tokens and back, and a model's special tokens. Loaded from the model's own files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, cast

from jinja2 import Environment, TemplateError, UndefinedError, meta
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..errors import ErrorKind, ServiceError

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


@dataclass(frozen=True, slots=True)
class TokenSpan:
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
        self.eos_token_ids = eos_token_ids
        self.special_ids = _special_ids(tokenizer)
        self._bos_id = tokenizer.bos_token_id
        self._texts: dict[int, str] = {}
        self._max_token_chars = max(map(len, self._backend.get_vocab()), default=1)

    @classmethod
    def load(
        cls,
        model_id: str,
        revision: str | None = None,
        *,
        num_workers: int = 2,
        config_path: Path | None = None,
    ) -> TextTokenizer:
        """Loads the tokenizer of a model directory or hub id.

        `config_path` is a tokenizer_config.json whose chat template replaces the model's own.

        Raises:
            ValueError: there is no tokenizer, it has no fast form, or the configuration is broken.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision)
            if config_path is not None:
                tokenizer.chat_template = json.loads(config_path.read_bytes()).get("chat_template")
        except Exception as error:  # a broken checkpoint can fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load the tokenizer of {model_id}: {reason}") from error
        if not tokenizer.is_fast:
            raise ValueError(f"No fast tokenizer or tokenizer.json for {model_id}")
        return cls(tokenizer, _eos_ids(model_id, revision, tokenizer), num_workers)

    def to_json(self) -> str:
        """The tokenizer.json, as text."""
        return str(self._backend.to_str())

    async def encode(self, text: str, *, truncate: int | None = None) -> tuple[int, ...]:
        """Token ids of a text, with the special tokens that the model wants around it.

        `truncate` is the number of last tokens to keep, special ones at the front included. A text
        that begins with the beginning-of-text token does not get a second one.
        """
        ids = (await self._run(self._encode, text, truncate)).ids
        return tuple(ids[1:] if self._begins_twice(ids) else ids)

    async def spans(self, text: str, *, is_prompt: bool = False) -> list[TokenSpan]:
        """The tokens of a text with byte offsets; of a prompt the same tokens as `encode` gives."""
        spans = await self._run(self._spans, text)
        if is_prompt and self._begins_twice([span.token_id for span in spans[:2]]):
            return spans[1:]
        return spans

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

    def render_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The prompt for a conversation, made by the model's template in transformers' sandbox.

        Raises:
            ServiceError: the model has no template, or the template refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ServiceError(ErrorKind.TEMPLATE, "template not found")
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=cast("list[Any] | None", tools),
                tokenize=False,
                add_generation_prompt=True,
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
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    def _encode(self, text: str, truncate: int | None = None) -> Encoding:
        if truncate is None:
            return self._backend.encode(text)
        # The last tokens cannot begin further back than twice their number of longest tokens.
        end = text[-2 * truncate * self._max_token_chars :]
        encoding = self._backend.encode(end, add_special_tokens=False)
        room = max(truncate - self._backend.num_special_tokens_to_add(is_pair=False), 0)
        encoding.truncate(room, direction="left")
        return self._backend.post_process(encoding)

    def _spans(self, text: str) -> list[TokenSpan]:
        encoding = self._encode(text)
        starts = _byte_offsets(text)
        raw = text.encode()
        return [
            TokenSpan(
                token_id,
                raw[starts[start] : starts[stop]].decode(errors="replace"),
                starts[start],
                starts[stop],
            )
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]


@cache
def _takes_tools(template: str) -> bool:
    """Whether a template reads the variable `tools`."""
    try:
        return "tools" in meta.find_undeclared_variables(Environment().parse(template))  # noqa: S701
    except TemplateError:  # a tag that only transformers knows
        return "tools" in template


def _byte_offsets(text: str) -> list[int]:
    """Byte offset of each character in UTF-8, and of the end: tokenizers count characters."""
    offsets = [0]
    for char in text:
        offsets.append(offsets[-1] + len(char.encode()))
    return offsets


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
