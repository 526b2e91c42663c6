"""Tokenizers and engines to test grammars with, and a decoder that does not use the tokenizer's."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.attention.kv_cache import KVCache
from engine.attention.paged import ReferenceAttention
from engine.build import build_engine
from engine.engine import Engine
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraints import Constraints
from engine.grammar.masks import TokenMasks
from engine.grammar.matcher import Matcher
from engine.model.loaded import LoadedModel
from engine.model.model_runner import ModelRunner
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.errors import GrammarError
from engine.protocol.request import FinishReason, Request, SamplingParams
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from tests.engine.fakes import run, token_ids
from tests.paths import DEMO_MODEL

KINDS = ("demo", "bpe", "unigram")  # of tokenizers: byte-level, and two with a byte fallback
_CPU = torch.device("cpu")
_BLOCK_SIZE = 16
_END = {"demo": "<|end|>", "bpe": "</s>", "unigram": "</s>"}
_SPECIAL = ("<unk>", "<s>", "</s>")
_MERGES = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("th", "e"), ('"', ":"), ("▁", "▁"), ("t", "r")]
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@cache
def tokenizer(kind: str) -> Tokenizer:
    """The bundled model's tokenizer, or one like those of SentencePiece."""
    if kind == "demo":
        return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)] + ["é", "日", "本"]
    pieces += ["".join(pair) for pair in _MERGES]
    if kind == "bpe":
        ids = {piece: index for index, piece in enumerate(pieces)}
        model = models.BPE(ids, _MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    else:
        scores = [(piece, -1.0 - index / 100) for index, piece in enumerate(pieces)]
        model = models.Unigram(scores, unk_id=0, byte_fallback=True)
    result = Tokenizer(model)
    result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=kind == "unigram")
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    result.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    return result


@cache
def eos_of(kind: str) -> frozenset[int]:
    """The token that ends a text."""
    token_id = tokenizer(kind).token_to_id(_END[kind])
    assert token_id is not None
    return frozenset({token_id})


@cache
def compiler(kind: str) -> GrammarCompiler:
    """One compiler for all tests, as an engine has one for all requests."""
    return GrammarCompiler(tokenizer(kind).to_str(), tokenizer(kind).get_vocab_size())


def compile_source(source: str, kind: str = "demo") -> Matcher:
    """A matcher at the beginning of a text."""
    return compiler(kind).compile(source, eos_of(kind))


@cache
def _masks(kind: str) -> TokenMasks:
    return TokenMasks(tokenizer(kind).get_vocab_size(), num_threads=1)


def takes(source: str, text: str) -> bool:
    """Whether a grammar allows a whole text, in the tokens of the bundled model."""
    matcher = compiler("demo").compile(source, frozenset({0}))
    try:
        matcher.advance(tokenizer("demo").encode(text, add_special_tokens=False).ids)
    except GrammarError:
        return False
    return bool(matcher.raw.is_accepting())


def allowed(matcher: Matcher, kind: str = "demo") -> set[int]:
    """The tokens that may come next.

    Raises:
        GrammarError: the mask is invalid.
    """
    (words,) = _masks(kind).start([matcher]).result()
    matcher.check()
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def encode(text: str, kind: str = "demo") -> list[int]:
    """The tokenizer's own tokens of a text, without a space that it would prepend."""
    full: list[int] = tokenizer(kind).encode(text, add_special_tokens=False).ids
    if kind == "demo" or not text:
        return full
    if spell(full[:1], kind) == b" " and not text.startswith(" "):
        return full[1:]
    bare = tokenizer(kind).encode("\n" + text, add_special_tokens=False).ids
    return [*chain(bare[next(i for i, t in enumerate(bare) if spell([t], kind) == b"\n") + 1 :])]


def spell(ids: Iterable[int], kind: str = "demo") -> bytes:
    """The bytes of tokens, from their pieces in the vocabulary."""
    return b"".join(_bytes_of(token_id, kind) for token_id in ids)


def _bytes_of(token_id: int, kind: str) -> bytes:
    assert token_id not in special_ids(kind), f"{token_id} is a special token"
    piece = tokenizer(kind).id_to_token(token_id)
    assert piece is not None
    if kind == "demo":
        return bytes(_BYTE_OF[character] for character in piece)
    if piece.startswith("<0x") and len(piece) == len("<0x00>"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


@cache
def special_ids(kind: str) -> frozenset[int]:
    """Tokens that are not text."""
    return frozenset(tokenizer(kind).get_added_tokens_decoder())


class Outcome(NamedTuple):
    """The result of a request; `tokens` are without the end token."""

    tokens: list[int]
    reason: FinishReason | None
    error: str | None

    @property
    def finished(self) -> bool:
        """Whether the text is complete."""
        return self.reason is FinishReason.EOS_TOKEN


def make_request(name: str, source: str, kind: str = "demo", **options: object) -> Request:
    """A request for 200 tokens at a high temperature, with a seed of its own."""
    seed = sum(map(ord, name)) * 7919
    sampling = SamplingParams(do_sample=True, seed=seed, temperature=2.5)
    values: dict[str, object] = {
        "request_id": name,
        "prompt_token_ids": tuple(encode("Say it:", kind)),
        "max_new_tokens": 200,
        "sampling": sampling,
        "eos_token_ids": eos_of(kind),
        "grammar": source,
        **options,
    }
    return Request(**values)  # type: ignore[arg-type]


@cache
def _random_model(kind: str) -> LoadedModel:
    config = LlamaConfig(
        vocab_size=tokenizer(kind).get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return attach_paged_attention(model, _CPU, torch.float32)


def random_engine(kind: str = "demo", *, num_blocks: int = 4000) -> Engine:
    """An engine whose model has random weights."""
    loaded = _random_model(kind)
    vocab_size = tokenizer(kind).get_vocab_size()
    cache_ = KVCache(loaded.layers, num_blocks, _BLOCK_SIZE, torch.float32, _CPU)
    scheduler = Scheduler(
        BlockManager(num_blocks, _BLOCK_SIZE), max_step_tokens=4096, max_num_seqs=256
    )
    return Engine(
        ModelRunner(loaded, cache_, ReferenceAttention()).forward,
        scheduler,
        _CPU,
        vocab_size=vocab_size,
        constraints=Constraints(compiler(kind), TokenMasks(vocab_size)),
    )


def demo_engine(socket_path: Path) -> Engine:
    """The engine of the bundled model, as the server builds it."""
    config = EngineConfig(
        model_id=str(DEMO_MODEL),
        socket_path=socket_path,
        device="cpu",
        num_threads=1,
        max_batch_total_tokens=64_000,
    )
    engine, _ = build_engine(config)
    return engine


def generate(engine: Engine, *requests: Request) -> dict[str, Outcome]:
    """The results of requests that run together."""
    results: dict[str, Outcome] = {}
    for name, outputs in run(engine, *requests).items():
        tokens = token_ids(outputs)
        reason = outputs[-1].finish_reason
        if reason is FinishReason.EOS_TOKEN:
            tokens.pop()
        results[name] = Outcome(tokens, reason, outputs[-1].error)
    return results


def accepts(matcher: Matcher, text: str, kind: str = "demo") -> bool:
    """Whether a grammar allows a text, in the tokenizer's own tokens, and its end after it."""
    try:
        matcher.advance(encode(text, kind))
        return eos_of(kind) <= allowed(matcher, kind)
    except GrammarError:
        return False


def walk(matcher: Matcher, seed: int, kind: str = "demo", num_tokens: int = 60) -> list[int]:
    """Randomly chosen allowed tokens, without the end token."""
    rng = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        token_id = rng.choice(sorted(allowed(matcher, kind)))
        if token_id in eos_of(kind):
            break
        matcher.advance([token_id])
        tokens.append(token_id)
    return tokens
