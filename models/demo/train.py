"""Train the demo model from scratch on the generated corpus, and measure what it learned.

Example: python models/demo/train.py --minutes 50 --out models/demo
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import stream
from evaluate import measure, table
from source import Document
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
    documents = itertools.islice(stream(seed=0), TOKENIZER_DOCUMENTS)
    # A small untrained tokenizer supplies the chat template to render the conversations with.
    renderer = train_tokenizer([], 300)
    return train_tokenizer((rendered(renderer, document) for document in documents), VOCABULARY)


def padded(rows: list[Encoded], width: int) -> Batch:
    """Return inputs and targets of equally long rows; -100 marks targets not to learn."""
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

    Rows start with their own document, so no attention is spent on unrelated text. Only a few
    shapes occur, for which the math library prepares its kernels once.
    """
    waiting: dict[int, list[Encoded]] = defaultdict(list)
    while True:
        for item in encode(tokenizer, list(itertools.islice(documents, 64))):
            grain = 16 if len(item[0]) <= 128 else 32
            width = math.ceil(len(item[0]) / grain) * grain
            rows = waiting[width]
            rows.append(item)
            if len(rows) >= max(1, tokens // width):
                yield padded(rows, width)
                rows.clear()


def backward(model: LlamaForCausalLM, step: list[Batch], device: torch.device) -> float:
    """Add up the gradients of all parts of a step; return the mean loss per learned token."""
    learned = sum(int((targets != -100).sum()) for _, targets in step)
    total = 0.0
    for inputs, targets in step:
        mask = (targets != -100).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=inputs.to(device)).last_hidden_state
            # Only the learned positions need logits, a good part of the work at this size.
            logits = model.lm_head(hidden[mask])
        loss = (
            functional.cross_entropy(logits.float(), targets.to(device)[mask], reduction="sum")
            / learned
        )
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def learning_rate(progress: float, peak: float, warm_up: float = 0.02) -> float:
    """Return the rate at a progress from 0 to 1: linear warm-up, then a cosine to 2 %."""
    if progress < warm_up:
        return peak * (progress + 0.001) / (warm_up + 0.001)
    along = (progress - warm_up) / (1 - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(along, 1.0))))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.97), fused=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in half precision, replacing each file at once."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        half = LlamaForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.generation_config = model.generation_config
        half.half().save_pretrained(name)  # type: ignore[no-untyped-call]
        tokenizer.save_pretrained(name)
        for path in Path(name).iterdir():
            path.chmod(0o644)  # weights are written readable by their owner alone
            path.replace(out / path.name)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> dict[str, float]:
    """Train for the given minutes or steps; return the figures of the run."""
    device = model.device
    optimizer = make_optimizer(model)
    documents = stream(options.seed, copying=options.copying)
    parts = batches(documents, tokenizer, options.tokens)
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
        rate = learning_rate(done / total, options.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step = list(itertools.islice(parts, options.parts))
        loss = backward(model, step, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        seen += sum(inputs.numel() for inputs, _ in step)
        smooth = loss if count == 1 else 0.98 * smooth + 0.02 * loss
        bar.update(round(done) - bar.n)
        bar.set_postfix(step=count, loss=f"{smooth:.4f}", lr=f"{rate:.1e}", tokens=seen)
        if options.check and time.monotonic() - checked > options.check * 60:
            model.eval()  # type: ignore[no-untyped-call]
            tqdm.write(table(measure(model, tokenizer, 16)))
            save(model, tokenizer, options.out)
            model.train()
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
    parser.add_argument("--copying", type=float, default=0.0, help="share of copying exercises")
    parser.add_argument("--seed", type=int, default=1, help="seed of the corpus and the weights")
    parser.add_argument("--check", type=float, default=0, help="minutes between quick checks")
    parser.add_argument("--per-skill", type=int, default=200, help="held-out documents per skill")
    return parser.parse_args()


def main() -> None:
    """Train, save and evaluate."""
    options = options_from_command_line()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
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
