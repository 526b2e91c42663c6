"""Makes a valid request from parameters. It applies the rules of `limits.py` in TGI's order."""

from __future__ import annotations

import secrets

from engine.protocol.images import Image
from engine.protocol.request import SamplingParams

from ..call_record import stage
from ..errors import ErrorKind, ServiceError
from ..grammar.checker import GrammarChecker
from ..images.pictured import PicturedText
from ..text.long_texts import TooManyTokensError
from ..text.tokenizer import TextTokenizer
from ..workers.pause import pause
from .adapters import Adapters
from .limits import (
    BEST_OF_RULES,
    INPUT_RULES,
    RULES,
    STREAM_RULES,
    TOO_LONG,
    Limits,
    check,
    check_lengths,
    check_token_ids,
    check_vocabulary,
)
from .parameters import GenerationRequest, Parameters, Prompt

_LONG = 32 * 1024  # tokens of a prompt


def random_seed() -> int:
    """An unpredictable unsigned 64-bit number."""
    return secrets.randbits(64)


class Validator:
    """Validates requests against one set of limits, with one tokenizer."""

    def __init__(
        self,
        limits: Limits,
        tokenizer: TextTokenizer,
        grammars: GrammarChecker,
        adapters: Adapters | None = None,
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._adapters = adapters or Adapters()

    def check_stream(self, parameters: Parameters) -> None:
        """Checks what streams do not support, before anything else.

        Raises:
            ServiceError: the request cannot be streamed.
        """
        check(STREAM_RULES, parameters, self._limits)

    def check_best_of(self, parameters: Parameters) -> None:
        """Checks `best_of` of a request without a stream.

        Raises:
            ServiceError: too many candidates.
        """
        check(BEST_OF_RULES, parameters, self._limits)

    def check_adapter(self, parameters: Parameters) -> str:
        """The adapter that is asked for; empty for the model alone.

        Raises:
            ServiceError: there is no such adapter.
        """
        return self._adapters.chosen(parameters)

    async def validate(self, prompt: Prompt, parameters: Parameters) -> GenerationRequest:
        """Checks everything, in TGI's order, and fills in every default.

        Raises:
            ServiceError: the first rule that is broken.
        """
        with stage("validate", from_begin=True):
            adapter = self.check_adapter(parameters)
            token_ids, images, max_new_tokens = await self._checked(prompt, parameters)
        if len(token_ids) > _LONG:  # which takes milliseconds to check, and to send to the engine
            await pause()
        source = ""
        if parameters.grammar is not None:
            with stage("grammar"):
                source = await self._grammars.check(parameters.grammar)
        return GenerationRequest(
            inputs=self._text(prompt, parameters),
            prompt_token_ids=token_ids,
            sampling=_sampling(parameters),
            max_new_tokens=max_new_tokens,
            stop=parameters.stop,
            return_full_text=bool(parameters.return_full_text),
            details=parameters.details,
            decoder_input_details=parameters.decoder_input_details,
            best_of=max(parameters.best_of or 1, 1),
            grammar=source,
            adapter=adapter,
            stop_token_ids=frozenset(parameters.stop_token_ids),
            min_new_tokens=parameters.min_new_tokens or 0,
            ignore_eos=parameters.ignore_eos,
            priority=parameters.priority or 0,
            detokenize=parameters.detokenize,
            prompt_top_n_tokens=parameters.prompt_top_n_tokens,
            images=images,
        )

    async def _checked(
        self, prompt: Prompt, parameters: Parameters
    ) -> tuple[tuple[int, ...], tuple[Image, ...], int]:
        """The prompt's tokens and images, and how many more tokens there may be.

        Raises:
            ServiceError: the first rule that is broken.
        """
        limits = self._limits
        check(RULES, parameters, limits)
        if prompt == "":
            raise _empty()
        check(INPUT_RULES, parameters, limits)
        token_ids = await self._token_ids(prompt, parameters)
        images: tuple[Image, ...] = ()
        if isinstance(prompt, PicturedText):
            token_ids, images = _expanded(prompt, token_ids)
        max_new_tokens = parameters.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = max(limits.max_total_tokens - len(token_ids), 0)
        check_lengths(len(token_ids), max_new_tokens, limits)
        return token_ids, images, max_new_tokens

    async def _token_ids(self, prompt: Prompt, parameters: Parameters) -> tuple[int, ...]:
        if isinstance(prompt, PicturedText):
            return await self._tokenise(prompt.text, parameters)
        if isinstance(prompt, str):
            return await self._tokenise(prompt, parameters)
        check_token_ids(prompt, self._limits)
        return prompt if parameters.truncate is None else prompt[-parameters.truncate :]

    def _text(self, prompt: Prompt, parameters: Parameters) -> str:
        """The prompt's text; of token ids only if the answer shall have it."""
        if isinstance(prompt, str):
            return prompt
        wants_text = parameters.return_full_text and parameters.detokenize
        return self._tokenizer.decode(list(prompt)) if wants_text else ""

    async def _tokenise(self, inputs: str, parameters: Parameters) -> tuple[int, ...]:
        limits = self._limits
        if parameters.truncate is None and self._tokenizer.too_long(
            inputs, limits.max_total_tokens
        ):
            raise ServiceError(
                ErrorKind.VALIDATION,
                f"`inputs` must have less than {limits.max_input_tokens} tokens. "
                f"Given: {len(inputs)} characters",
                field="inputs",
                code=TOO_LONG,
            )
        try:
            token_ids = await self._tokenizer.encode(
                inputs, truncate=parameters.truncate, max_tokens=limits.max_total_tokens
            )
        except TooManyTokensError as error:
            check_lengths(error.count, parameters.max_new_tokens or 0, limits)
            raise
        if not token_ids:  # e.g. characters that the tokenizer's normalisation removes
            raise _empty()
        if len(token_ids) > _LONG:  # which have just been unpacked
            await pause()
        check_vocabulary(token_ids, limits)
        return token_ids


def _expanded(
    prompt: PicturedText, token_ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[Image, ...]]:
    """The prompt's tokens with those of its images, and the images.

    Raises:
        ServiceError: the template has not written a mark for each image.
    """
    try:
        return prompt.expanded(token_ids)
    except ValueError as error:
        raise marks_error(error) from None


def marks_error(reason: ValueError) -> ServiceError:
    """The error of a prompt that has not a mark for each image."""
    return ServiceError(ErrorKind.TEMPLATE, f"the template does not take these images: {reason}")


def _empty() -> ServiceError:
    return ServiceError(ErrorKind.VALIDATION, "`inputs` cannot be empty", field="inputs")


def _sampling(parameters: Parameters) -> SamplingParams:
    """The engine's parameters: TGI samples if anything differs from its neutral value."""
    temperature = parameters.temperature if parameters.temperature is not None else 1.0
    do_sample = (
        parameters.do_sample
        or temperature != 1.0
        or bool(parameters.min_p)
        or any(
            value is not None
            for value in (parameters.top_k, parameters.top_p, parameters.typical_p)
        )
    )
    return SamplingParams(
        do_sample=do_sample,
        seed=parameters.seed if parameters.seed is not None else random_seed(),
        temperature=temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        typical_p=parameters.typical_p,
        min_p=parameters.min_p or 0.0,
        repetition_penalty=(
            1.0 if parameters.repetition_penalty is None else parameters.repetition_penalty
        ),
        frequency_penalty=parameters.frequency_penalty or 0.0,
        top_n_tokens=parameters.top_n_tokens or 0,
        watermark=parameters.watermark,
        logit_bias=parameters.logit_bias,
    )
