"""The bundled model, quantised, in a whole engine."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.build import build_engine
from engine.engine import Engine
from engine.kernels.int4 import PackedInt4Linear
from engine.kernels.int8 import PackedInt8Linear
from engine.kernels.packed_linear import PackedLinear
from engine.model.loading import load_model
from engine.model.passes import quantize_model
from engine.protocol.request import Request, SamplingParams
from tests.engine.fakes import run, token_ids
from tests.engine.model.quantized import config
from tests.engine.native import kernels_for, threads
from tests.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

# Questions to the bundled model, and a part of its answer in float32.
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is Deep Learning?": "layers",
    "What day comes after Monday?": "Tuesday",
    "What is 3 plus 4?": "7",
    "Hello": "",
}


def request(name: str, prompt: tuple[int, ...], **options: Any) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, max_new_tokens=24, **options)


def demo_engine(quantize: str | None) -> Engine:
    with threads(1):  # building an engine sets their number
        engine, _ = build_engine(config(DEMO_MODEL, quantize))
    return engine


def demo_prompts() -> dict[str, tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return {
        question: tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for question in QUESTIONS
    }


class TestEngines:
    """Engines with the quantised model."""

    def test_answer_as_without_quantisation(self) -> None:
        prompts = demo_prompts()
        tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        requests = [request(question, prompt) for question, prompt in prompts.items()]
        exact, rounded = (run(demo_engine(name), *requests) for name in (None, "int8"))
        for question, wanted in QUESTIONS.items():
            assert token_ids(rounded[question]) == token_ids(exact[question])
            assert wanted in tokenizer.decode(token_ids(rounded[question]))

    @pytest.mark.parametrize("quantize", ["int8", "int4"])
    def test_give_the_same_tokens_alone_and_among_others(self, quantize: str) -> None:
        prompts = list(demo_prompts().values())
        sampling = SamplingParams(do_sample=True, seed=7, temperature=0.9)
        requests = [
            request(f"{kind} {index}", prompt, sampling=params)
            for index, prompt in enumerate(prompts)
            for kind, params in (("greedy", SamplingParams()), ("sampled", sampling))
        ]
        together = run(demo_engine(quantize), *requests)
        engine = demo_engine(quantize)
        for item in requests:
            alone = run(engine, item)[item.request_id]
            assert token_ids(alone) == token_ids(together[item.request_id])

    def test_use_the_compiled_layers(self) -> None:
        kernels_for("whole")
        kinds = {}
        for quantize in ("int8", "int4"):
            loaded = load_model(config(DEMO_MODEL, quantize))
            quantize_model(loaded)
            kinds[quantize] = {type(module) for module in loaded.model.modules()}
        assert PackedInt8Linear in kinds["int8"]
        assert PackedInt4Linear in kinds["int4"]
        assert PackedLinear not in kinds["int8"]
