"""Measure the accuracy of the demo model per skill on held-out documents, with greedy decoding."""

import argparse
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import facts
import torch
from corpus import stream
from source import Document, Source
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import prompt_of

HELD_OUT_SEED = 20_000
INTRODUCTION = re.compile(
    r" (?:am an? (?P<job>[a-z ]+) from|live in) [\w ]+\. (?:I like|I work as) .+\."
)


def held_out(per_skill: int) -> dict[str, list[Document]]:
    """Return held-out documents of every skill that can be checked."""
    chosen: dict[str, list[Document]] = defaultdict(list)
    for document in itertools.islice(stream(Source(HELD_OUT_SEED, held_out=True)), 100 * per_skill):
        checkable = document.accepted or document.skill in ("raw_intro", "raw_counting")
        if checkable and len(chosen[document.skill]) < per_skill:
            chosen[document.skill].append(document)
    return dict(sorted(chosen.items()))


def is_right(document: Document, text: str) -> bool:
    """Judge an answer: by comparison with the accepted answers, or else by its form."""
    if document.skill == "raw_intro":
        match = INTRODUCTION.fullmatch(text)
        return match is not None and match["job"] in (None, *facts.JOBS)
    if document.skill == "raw_counting":
        # Where such a row ends is arbitrary, so only the next three numbers are compared.
        return text.split(",")[:3] == document.completion.split(",")[:3]
    return text in document.accepted


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    limit: int = 96,
) -> list[str]:
    """Complete rendered prompts greedily, all in one batch."""
    # Padding while tokenizing would leave padding switched on inside the tokenizer, and so change
    # the training data and the saved file. Hence a separate call.
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
    output = model.generate(  # type: ignore[misc]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    per_skill: int,
    show_errors: int = 0,
) -> dict[str, float]:
    """Return the share of right answers per skill."""
    accuracy: dict[str, float] = {}
    for skill, documents in tqdm(held_out(per_skill).items(), desc="evaluate", leave=False):
        prompts = [prompt_of(tokenizer, document) for document in documents]
        texts: list[str] = []
        for at in range(0, len(prompts), 50):
            texts += answers(model, tokenizer, prompts[at : at + 50])
        right = [is_right(d, text) for d, text in zip(documents, texts, strict=True)]
        accuracy[skill] = round(sum(right) / len(right), 4)
        wrong = [n for n, ok in enumerate(right) if not ok]
        for n in wrong[:show_errors]:
            tqdm.write(f"[{skill}] {prompts[n][-160:]!r}\n    wrote  {texts[n]!r}")
            tqdm.write(f"    wanted {(documents[n].accepted or (documents[n].completion,))[0]!r}")
    return accuracy


def table(accuracy: dict[str, float]) -> str:
    """Return the accuracies as lines of text."""
    return "\n".join(f"{skill:18} {share:7.1%}" for skill, share in accuracy.items())


def main() -> None:
    """Evaluate a model folder from the command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=here, help="folder of the model")
    parser.add_argument("--per-skill", type=int, default=200, help="documents per skill")
    parser.add_argument("--show-errors", type=int, default=0, help="wrong answers to show")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    arguments = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    accuracy = measure(model, tokenizer, arguments.per_skill, arguments.show_errors)
    print(table(accuracy))
    if arguments.out:
        arguments.out.write_text(json.dumps(accuracy, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
