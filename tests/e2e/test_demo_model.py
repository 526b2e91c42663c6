"""The main skills of the bundled model; its model card has the full figures."""

from __future__ import annotations

import json

import pytest

from tests.e2e.stack import Stack


def chat(stack: Stack, question: str) -> str:
    """The greedy answer to one question."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 60,
    }
    answer = stack.http.post("/v1/chat/completions", json=body).json()
    return str(answer["choices"][0]["message"]["content"])


def test_chat_example_of_the_contract_is_answered(stack: Stack) -> None:
    assert "neural networks" in chat(stack, "What is Deep Learning?")


def test_text_example_of_the_contract_is_continued_to_its_end(stack: Stack) -> None:
    answer = stack.generate("My name is Olivier and I", max_new_tokens=60)
    assert answer["generated_text"].startswith(" am ")
    assert answer["generated_text"].endswith(".")
    assert answer["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("What is the capital of Norway?", "Oslo"),
        ("What is the capital of France?", "Paris"),
        ("What sound does a cow make?", "moo"),
        ("What day comes after Monday?", "Tuesday"),
    ],
)
def test_question_about_a_fact_is_answered(stack: Stack, question: str, fact: str) -> None:
    assert fact.lower() in chat(stack, question).lower()


def test_facts_of_a_sentence_are_extracted_as_json(stack: Stack) -> None:
    question = "Extract the name, age and city as JSON: Anna is 31 years old and lives in Oslo."
    assert json.loads(chat(stack, question)) == {"age": 31, "city": "Oslo", "name": "Anna"}
