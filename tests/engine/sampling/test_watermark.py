"""Green lists are those of transformers, whose detector finds the engine's watermark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, WatermarkDetector, WatermarkingConfig
from transformers.generation.logits_process import WatermarkLogitsProcessor

from engine.build import build_engine
from engine.engine import Engine
from engine.protocol.config import EngineConfig
from engine.protocol.request import Request, SamplingParams
from engine.sampling.sampler import sample
from engine.sampling.watermark import Watermark
from engine.scheduling.sequence import Sequence
from tests.engine.fakes import BLOCK_SIZE, FakeModel, make_engine, run, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HASH_KEY = 15485863
NUM_TOKENS = 200  # of a text for the detector
Z_LIMIT = 4.0  # one text in 31,000 without a watermark exceeds it
MODEL = LlamaConfig(
    vocab_size=250,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 5}


def make_sequence(token_ids: tuple[int, ...] = (1, 2), **sampling: Any) -> Sequence:
    """A sequence with these sampling parameters."""
    request = make_request("r", token_ids, **sampling)
    return Sequence(request)


def make_request(
    request_id: str, prompt: tuple[int, ...], num_tokens: int = NUM_TOKENS, **sampling: Any
) -> Request:
    """A request with these sampling parameters."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_new_tokens=num_tokens,
        sampling=SamplingParams(**sampling),
    )


def reference(vocab_size: int, gamma: float, delta: float) -> WatermarkLogitsProcessor:
    """The processor of transformers."""
    return WatermarkLogitsProcessor(
        vocab_size=vocab_size,
        device="cpu",
        greenlist_ratio=gamma,
        bias=delta,
        hashing_key=HASH_KEY,
        seeding_scheme="lefthash",
        context_width=1,
    )


def z_score(token_ids: list[int], gamma: float = 0.5, delta: float = 2.0) -> float:
    """The excess of green tokens over the expected number, in standard deviations."""
    config = WatermarkingConfig(
        greenlist_ratio=gamma,
        bias=delta,
        hashing_key=HASH_KEY,
        seeding_scheme="lefthash",
        context_width=1,
    )
    found = WatermarkDetector(MODEL, "cpu", config)(torch.tensor([token_ids]), return_dict=True)
    return float(found.z_score[0])


@pytest.mark.parametrize("gamma", [0.5, 0.25, 0.9])
@pytest.mark.parametrize("vocab_size", [2, 32, 4096, 128_256, 32_003])
def test_green_lists_are_those_of_transformers(vocab_size: int, gamma: float) -> None:
    ours, theirs = Watermark(vocab_size, CPU, gamma=gamma), reference(vocab_size, gamma, 2.0)
    for token_id in {0, 1, vocab_size // 3, vocab_size - 1}:
        expected = theirs._get_greenlist_ids(torch.tensor([token_id]))
        assert torch.equal(ours.green_ids(token_id), expected)


@pytest.mark.parametrize(("gamma", "delta"), [(0.5, 2.0), (0.25, 0.3)])
@pytest.mark.parametrize("vocab_size", [7, 32, 1003])
def test_scores_are_those_of_transformers(vocab_size: int, gamma: float, delta: float) -> None:
    ours = Watermark(vocab_size, CPU, gamma=gamma, delta=delta)
    last_ids = torch.tensor([0, 3, 6, 3])
    scores = torch.randn(4, vocab_size)
    expected = reference(vocab_size, gamma, delta)(last_ids.unsqueeze(1), scores)
    ours.apply(scores, [make_sequence((5, i), watermark=True) for i in last_ids.tolist()])
    assert torch.equal(scores, expected)


def test_the_last_token_counts_whether_generated_resumed_or_of_the_prompt() -> None:
    generated = make_sequence((1, 2), watermark=True)
    generated.append(9)
    resumed = Sequence(
        Request(
            request_id="r",
            prompt_token_ids=(4,),
            max_new_tokens=9,
            sampling=SamplingParams(watermark=True),
            resumed_token_ids=(7, 9),
        )
    )
    scores = torch.zeros(3, 50)
    Watermark(50, CPU).apply(scores, [generated, resumed, make_sequence((9,), watermark=True)])
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert scores.sum() == 3 * 25 * 2.0


def test_rows_that_do_not_ask_keep_their_scores() -> None:
    watermark = Watermark(50, CPU)
    before = torch.randn(5, 50)
    sequences = [make_sequence((i,), watermark=i in (1, 4)) for i in range(5)]
    together = before.clone()
    watermark.apply(together, sequences)
    assert torch.equal(together[[0, 2, 3]], before[[0, 2, 3]])
    for row in (1, 4):
        alone = before[row : row + 1].clone()
        watermark.apply(alone, sequences[row : row + 1])
        assert torch.equal(together[row], alone[0])
        assert not torch.equal(together[row], before[row])


def test_nothing_is_built_when_no_row_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    watermark = Watermark(50, CPU)
    monkeypatch.setattr(torch, "stack", pytest.fail)
    monkeypatch.setattr(watermark, "_green_bits", pytest.fail)
    watermark.apply(torch.zeros(2, 50), [make_sequence(), make_sequence()])


def test_lists_are_cached_within_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    pack = Watermark._pack

    def count(self: Watermark, last_token_id: int) -> torch.Tensor:
        made.append(last_token_id)
        return pack(self, last_token_id)

    monkeypatch.setattr(Watermark, "_pack", count)
    monkeypatch.setattr("engine.sampling.watermark._CACHE_BYTES", 2 * 7)  # two lists of 50 bits
    watermark = Watermark(50, CPU)
    for token_id in (1, 2, 1, 3, 1, 2):
        watermark.apply(torch.zeros(1, 50), [make_sequence((token_id,), watermark=True)])
    assert made == [1, 2, 3, 2]
    # A step may need more lists than are cached.
    sequences = [make_sequence((token_id,), watermark=True) for token_id in range(5)]
    scores = torch.zeros(5, 50)
    watermark.apply(scores, sequences)
    assert torch.equal(scores, reference(50, 0.5, 2.0)(torch.arange(5).unsqueeze(1), scores * 0))


def test_the_watermark_is_applied_before_all_filters_and_does_not_enable_sampling() -> None:
    watermark = Watermark(50, CPU)
    green = set(watermark.green_ids(2).tolist())
    best_green, best_red = min(green), min(set(range(50)) - green)
    logits = torch.zeros(1, 50)
    logits[0, best_green], logits[0, best_red] = 3.0, 4.0
    plain = make_sequence(top_k=1)
    marked = make_sequence(top_k=1, watermark=True)
    assert sample(logits.clone(), [plain], watermark).wait()[0].token_id == best_red
    token = sample(logits.clone(), [marked], watermark).wait()[0]
    assert (token.token_id, token.logprob) == (best_green, 0.0)
    # With the penalty first, the score would be -1 * 2 + 2 = 0; here it is (-1 + 2) / 2 = 0.5.
    logits = torch.full((1, 50), -9.0)
    logits[0, best_green], logits[0, best_red] = -1.0, 0.4
    marked = make_sequence((best_green, 2), repetition_penalty=2.0, watermark=True)
    assert sample(logits, [marked], watermark).wait()[0].token_id == best_green


def test_a_row_with_nan_changes_no_other() -> None:
    logits = torch.zeros(2, 50)
    logits[0] = float("nan")
    sequences = [make_sequence(watermark=True), make_sequence(watermark=True)]
    bad, good = sample(logits, sequences, Watermark(50, CPU)).wait()
    assert bad.logprob != bad.logprob
    assert good.logprob == good.logprob


def test_an_engine_without_a_watermark_refuses_it() -> None:
    scheduler = make_engine()._scheduler
    refused = Engine(FakeModel(4), scheduler, CPU).add(make_request("r", (1,), watermark=True))
    assert refused is not None
    assert refused.error == "this engine has no watermark"


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_watermarked_tokens_are_the_same_alone_in_a_batch_and_after_preemption(
    enable_prefix_caching: bool,
) -> None:
    def marked(request_id: str = "marked") -> Request:
        return make_request(request_id, (4, 5, 6), 20, watermark=True, **SAMPLED)

    others = [
        make_request(str(i), (4, 5, 6, i), 12, do_sample=True, seed=i, watermark=i % 2 == 0)
        for i in range(12)
    ]
    options: dict[str, Any] = {"enable_prefix_caching": enable_prefix_caching}
    alone = token_ids(run(make_engine(**options), marked())["marked"])
    unmarked = make_request("unmarked", (4, 5, 6), 20, **SAMPLED)
    assert token_ids(run(make_engine(**options), unmarked)["unmarked"]) != alone
    tight = make_engine(num_blocks=14, **options)
    outputs = run(tight, *others[:6], marked(), unmarked, *others[6:])
    assert tight.stats().num_preemptions > 0
    assert token_ids(outputs["marked"]) == alone
    for other in others:
        expected = run(make_engine(**options), other)[other.request_id]
        assert token_ids(outputs[other.request_id]) == token_ids(expected)


@pytest.mark.parametrize("num_before", [1, 6, 11])
def test_a_resumed_watermarked_request_continues_with_the_same_tokens(num_before: int) -> None:
    unbroken = token_ids(
        run(make_engine(), make_request("r", (1, 2, 3), 12, watermark=True, **SAMPLED))["r"]
    )
    resumed = Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        max_new_tokens=12,
        sampling=SamplingParams(watermark=True, **SAMPLED),
        resumed_token_ids=tuple(unbroken[:num_before]),
    )
    assert token_ids(run(make_engine(), resumed)["r"]) == unbroken[num_before:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, saved."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(MODEL).save_pretrained(path)
    return path


@pytest.mark.parametrize(("gamma", "delta"), [(0.5, 2.0), (0.25, 1.5)])
def test_transformers_detector_finds_only_watermarked_texts(
    checkpoint: Path, gamma: float, delta: float
) -> None:
    config = EngineConfig(
        model_id=str(checkpoint),
        socket_path=checkpoint / "socket",
        device="cpu",
        num_threads=1,
        block_size=BLOCK_SIZE,
        enable_native_kernels=False,
        watermark_gamma=gamma,
        watermark_delta=delta,
    )
    engine, _ = build_engine(config)
    requests = [
        make_request(f"{seed} {marked}", (3, 4), do_sample=True, seed=seed, watermark=marked)
        for seed in range(8)
        for marked in (True, False)
    ]
    outputs = run(engine, *requests)
    for request in requests:
        text = token_ids(outputs[request.request_id])
        assert len(text) == NUM_TOKENS
        assert (z_score(text, gamma, delta) > Z_LIMIT) == request.sampling.watermark


def test_a_gamma_outside_its_bounds_is_refused(tmp_path: Path) -> None:
    for gamma in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="watermark_gamma"):
            EngineConfig(model_id="m", socket_path=tmp_path, watermark_gamma=gamma)
