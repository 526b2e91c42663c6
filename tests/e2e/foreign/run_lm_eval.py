"""lm-eval's `local-completions` against a server: a small task of its own, and a generation.

Prints one JSON document. The task stands in the working directory, so nothing is fetched.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

URL, QUESTION, _ = sys.argv[1:]
MODEL = Path(__file__).resolve().parents[3] / "models" / "demo"
ROWS = [
    {"question": "The capital of France is", "choices": ["Paris.", "blue.", "a fox."], "answer": 0},
    {"question": "The sky is", "choices": ["Paris.", "blue.", "seven."], "answer": 1},
    {"question": "One, two,", "choices": ["three", "Paris", "blue"], "answer": 0},
]
DATA = Path("rows.jsonl").resolve()
COMMON = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {DATA}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = f"""
task: choices
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
{COMMON}
"""
GENERATION = f"""
task: generation
output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, temperature: 0.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
{COMMON}
"""


def evaluate(**arguments):
    """The results of both tasks."""
    given = {"model": "tgi", "base_url": f"{URL}/v1/completions", "tokenizer": str(MODEL)}
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args={**given, **arguments},
        tasks=["choices", "generation"],
        task_manager=TaskManager(include_path=".", include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )


DATA.write_text("\n".join(map(json.dumps, ROWS)))
Path("choices.yaml").write_text(CHOICES)
Path("generation.yaml").write_text(GENERATION)
found = {}
WAYS = {
    "ids": {},  # without a token for the beginning of the text
    "ids after the beginning": {"add_bos_token": True},
    # The server puts that token before a text; lm-eval has to know.
    "texts": {"add_bos_token": True, "tokenized_requests": False},
}
for name, arguments in WAYS.items():
    results = evaluate(**arguments)
    samples = results["samples"]
    found[name] = {
        "accuracy": results["results"]["choices"]["acc,none"],
        "scores": [
            [row["question"] + " " + choice, len(row["question"]), float(score), bool(is_greedy)]
            for row, sample in zip(ROWS, samples["choices"], strict=True)
            for choice, ((score, is_greedy),) in zip(row["choices"], sample["resps"], strict=True)
        ],
        "texts": [
            [sample["doc"]["question"], sample["resps"][0][0]] for sample in samples["generation"]
        ],
    }
print(json.dumps(found))
