"""The tokenizer of the demo model, and the encoding of documents for training."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from source import Document, Message
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = [BOS, PAD, END, "<|system|>", "<|user|>", ASSISTANT, "<|tool|>"]
TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

# A space belongs to the lower-case word after it, but is a piece of its own before capitals and
# digits: so names have the same tokens in a sentence and inside JSON quotes, which makes them easy
# to copy.
PIECES = Regex(
    r"'(?:s|t|re|ve|m|ll|d)\b| ?[\p{Ll}\p{Lo}\p{Lm}\p{M}]+|\p{Lu}+(?!\p{Ll})|\p{Lu}[\p{Ll}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}\p{M}]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits on the given texts."""
    tokenizer = byte_level_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE_FILE.read_text(encoding="utf-8"),
    )


def byte_level_bpe() -> Tokenizer:
    """Return an untrained tokenizer that splits text into `PIECES`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    """Return a document as the text to learn, with its special tokens."""
    if not document.messages:
        return BOS + document.prompt + document.completion + END
    return templated(tokenizer, document, document.messages, for_answer=False)


def prompt_of(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    """Return the part of a document that the model is given at evaluation."""
    if not document.messages:
        return BOS + document.prompt
    return templated(tokenizer, document, document.messages[:-1], for_answer=True)


def templated(
    tokenizer: PreTrainedTokenizerFast,
    document: Document,
    messages: tuple[Message, ...],
    for_answer: bool,
) -> str:
    """Render messages with the chat template, together with the tools of their document."""
    tools: list[Any] = list(document.tools)
    text = tokenizer.apply_chat_template(
        list(messages), tools=tools or None, tokenize=False, add_generation_prompt=for_answer
    )
    return str(text)


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the ids of each document and which of them to learn.

    All of a plain text is learned, but of a conversation only the turns of the assistant: questions
    and tool definitions are random, and learning to predict them is wasted work.
    """
    start = tokenizer.convert_tokens_to_ids(ASSISTANT)
    end = tokenizer.eos_token_id
    texts = [rendered(tokenizer, document) for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        ids: list[int] = encoding.ids
        learning = not document.messages
        learned = []
        for token in ids:
            learned.append(learning)
            if document.messages and token in (start, end):
                learning = token == start
        yield ids, learned
