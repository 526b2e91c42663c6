"""Train the demo model on the generated corpus, and measure what it learned.

Example: python models/demo/train.py --minutes 50 --out models/demo
"""

import argparse
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import stream
from evaluate import measure, table
from source import Document, Source
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from vocabulary import encode, rendered, train_tokenizer
from wiring import wire_copying

VOCABULARY = 4096
TOKENIZER_DOCUMENTS = 40_000
WIDTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)  # of batches, in tokens
COPYING = 0.4  # share of the run over which the copying exercises fade out
Layers = Callable[..., Any]
Batch = tuple[torch.Tensor, torch.Tensor]
Encoded = tuple[list[int], list[bool]]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh model of about four million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on a fixed part of the corpus."""
    documents = itertools.islice(stream(Source(seed=0)), TOKENIZER_DOCUMENTS)
    # Rendering the conversations needs a tokenizer with the chat template; a small one will do.
    renderer = train_tokenizer([], 300)
    return train_tokenizer((rendered(renderer, document) for document in documents), VOCABULARY)


def padded(rows: list[Encoded], width: int) -> Batch:
    """Return inputs and targets, int64 [rows, width]; -100 marks targets not to learn."""
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for row, (ids, learned) in enumerate(rows):
        values = torch.tensor(ids)
        inputs[row, : len(ids)] = values
        # The target of a position is the next token.
        wanted = torch.where(torch.tensor(learned), values, -100)
        targets[row, : len(ids) - 1] = wanted[1:]
    return inputs, targets


def batches(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, tokens: int
) -> Iterator[Batch]:
    """Yield batches of about `tokens` tokens, each of documents of similar length.

    Each row has one document, so no attention is spent on unrelated text. Only a few shapes occur;
    the layers are compiled once for each.
    """
    waiting: dict[int, list[Encoded]] = defaultdict(list)
    while True:
        for item in encode(tokenizer, list(itertools.islice(documents, 64))):
            width = next((w for w in WIDTHS if w >= len(item[0])), None)
            if width is None:
                continue
            rows = waiting[width]
            rows.append(item)
            if len(rows) >= max(1, tokens // width):
                yield padded(rows, width)
                rows.clear()


def backward(
    model: LlamaForCausalLM, layers: Layers, step: list[Batch], device: torch.device
) -> float:
    """Add up the gradients of all batches of a step; return the mean loss per learned token."""
    learned = sum(int((targets != -100).sum()) for _, targets in step)
    total = 0.0
    for inputs, targets in step:
        mask = (targets != -100).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = layers(input_ids=inputs.to(device), use_cache=False).last_hidden_state
            # Only the learned positions need logits, which are much of the work at this size.
            logits = model.lm_head(hidden[mask])
        loss = (
            functional.cross_entropy(logits.float(), targets.to(device)[mask], reduction="sum")
            / learned
        )
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def learning_rate(progress: float, peak: float, warm_up: float = 0.01) -> float:
    """Return the rate at a progress from 0 to 1: linear warm-up, then linear decay to 0."""
    if progress < warm_up:
        return peak * (progress + 0.001) / (warm_up + 0.001)
    return peak * (1 - progress) / (1 - warm_up)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for everything else.

    Muon needs far fewer tokens than AdamW here. Its updates are scaled to the size of those of
    AdamW, so both use the same learning rate.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
    ]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in half precision; each file is replaced atomically."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        half = LlamaForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.generation_config = model.generation_config
        half.half().save_pretrained(name)  # type: ignore[no-untyped-call]
        tokenizer.save_pretrained(name)
        for path in Path(name).iterdir():
            path.chmod(0o644)  # weights are written readable by the owner only
            path.replace(out / path.name)


def training_source(tokenizer: PreTrainedTokenizerFast, seed: int) -> Source:
    """Return the source of training documents."""
    source = Source(seed)
    # The model copies a rare piece of a word only if it has copied that piece in training.
    source.pieces = [
        piece for piece in tokenizer.get_vocab() if piece.isascii() and piece.isalpha()
    ]
    return source


def update(
    model: LlamaForCausalLM,
    layers: Layers,
    optimizers: list[torch.optim.Optimizer],
    step: list[Batch],
    rate: float,
) -> float:
    """Make one step of the optimizers; return the mean loss per learned token."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    loss = backward(model, layers, step, model.device)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return loss


def check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Measure and save a model during its training."""
    model.eval()  # type: ignore[no-untyped-call]
    tqdm.write(table(measure(model, tokenizer, 16)))
    save(model, tokenizer, out)
    model.train()


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> dict[str, float]:
    """Train for the given minutes or steps; return the figures of the run."""
    optimizers = make_optimizers(model)
    source = training_source(tokenizer, options.seed)
    parts = batches(stream(source), tokenizer, options.tokens)
    layers = torch.compile(model.model, dynamic=False) if options.compile else model.model
    started = checked = time.monotonic()
    total = options.steps or options.minutes * 60
    seen = count = 0
    smooth = 0.0
    bar = tqdm(total=round(total), unit="step" if options.steps else "s")
    model.train()
    while True:
        done = count if options.steps else time.monotonic() - started
        if done >= total:
            break
        source.copying = options.copying * max(0.0, 1 - done / total / COPYING)
        rate = learning_rate(done / total, options.lr)
        step = list(itertools.islice(parts, options.parts))
        loss = update(model, layers, optimizers, step, rate)
        count += 1
        seen += sum(inputs.numel() for inputs, _ in step)
        smooth = loss if count == 1 else 0.98 * smooth + 0.02 * loss
        bar.update(round(done) - bar.n)
        bar.set_postfix(step=count, loss=f"{smooth:.4f}", lr=f"{rate:.1e}", tokens=seen)
        if options.check and time.monotonic() - checked > options.check * 60:
            tqdm.write(f"{done / total:.0%} loss {smooth:.4f}")
            check(model, tokenizer, options.out)
            checked = time.monotonic()
    bar.close()
    model.eval()  # type: ignore[no-untyped-call]
    minutes = round((time.monotonic() - started) / 60, 1)
    return {"steps": count, "tokens": seen, "minutes": minutes, "loss": round(smooth, 4)}


def options_from_command_line() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=50.0, help="time to train")
    length.add_argument("--steps", type=int, help="steps to train, instead of a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--resume", type=Path, help="folder of a model to train further")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per forward pass")
    parser.add_argument("--parts", type=int, default=2, help="forward passes per step")
    parser.add_argument(
        "--copying", type=float, default=0.5, help="share of copying exercises at the start"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the layers, which needs a C++ compiler",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the corpus and the weights")
    parser.add_argument("--check", type=float, default=0, help="minutes between quick checks")
    parser.add_argument("--per-skill", type=int, default=200, help="held-out documents per skill")
    return parser.parse_args()


def main() -> None:
    """Train, save and evaluate."""
    options = options_from_command_line()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch._dynamo.config.recompile_limit = 2 * len(WIDTHS)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.resume)
        model = LlamaForCausalLM.from_pretrained(options.resume, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        wire_copying(model)
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    figures = train(model, tokenizer, options)
    save(model, tokenizer, options.out)
    accuracy = measure(model, tokenizer, options.per_skill, show_errors=3)
    print(figures, table(accuracy), sep="\n")
    report = json.dumps({"training": figures, "accuracy": accuracy}, indent=2)
    (options.out / "accuracy.json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
