"""The engine gives the tokens of `transformers.generate`, for every architecture."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    GPTNeoXJapaneseConfig,
    GraniteMoeHybridConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    Zamba2Config,
)

from benchmarks.architectures import ARCHITECTURES as TRIED
from engine.attention.kv_cache import KVCache, LayerShape
from engine.attention.paged import AttentionBackend, ReferenceAttention
from engine.batch.model_input import AttentionInput
from engine.batch.recorded_rows import TableWidths
from engine.build import build_engine
from engine.engine import Engine
from engine.executor import Forward
from engine.kernels import cpu as cpu_kernels
from engine.model.loading import _load_weights, load_model
from engine.model.model_runner import ModelRunner
from engine.model.passes import fuse_rotation, layers_in_use, pack_layers
from engine.model.prepare import prepare
from engine.model.self_check import attach_paged_attention
from engine.protocol.config import EngineConfig
from engine.protocol.errors import ModelLoadError
from engine.protocol.request import Request, SamplingParams
from engine.replay.cpu_graphs import CpuGraphs
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from tests.engine.fakes import run, token_ids
from tests.engine.model.architectures import (
    ARCHITECTURES,
    CPU,
    NUM_NEW_TOKENS,
    PECULIAR,
    build_model,
    generate,
    make_prompts,
)
from tests.on_demand import on_demand

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK_SIZE = 4
MAX_STEP_TOKENS = 16
_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ATTENTION: dict[str, Any] = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "attention in gpt_neox_japanese": lambda: GPTNeoXJapaneseConfig(**_TINY, num_attention_heads=4),
    "state in rwkv": lambda: RwkvConfig(**_TINY, context_length=64),
    "state in recurrent gemma": lambda: RecurrentGemmaConfig(**_TINY, **_ATTENTION),
    "shared layers in zamba2": lambda: Zamba2Config(
        **_TINY,
        **_ATTENTION,
        n_mamba_heads=8,
        mamba_d_state=16,
        mamba_ngroups=1,
        hybrid_layer_ids=[1, 3],
        layers_block_type=["mamba", "hybrid"] * 2,
    ),
}


SAMPLES: dict[str, Collection[str]] = {
    "reference": {"llama", "gemma3", "gptj", "bloom"},
    "native": {"llama", "gemma3", "llama4"},
    "cpu_graphs": {*ARCHITECTURES, *PECULIAR},
}


def make_engine(
    name: str, backend: str, *, num_blocks: int, max_step_tokens: int = MAX_STEP_TOKENS
) -> Engine:
    """An engine with the model of an architecture."""
    model = build_model({**ARCHITECTURES, **PECULIAR}[name]())
    loaded = attach_paged_attention(model, CPU, torch.float32)
    attention: AttentionBackend = ReferenceAttention()
    kernels = cpu_kernels.load() if backend != "reference" else None
    if backend != "reference":
        if kernels is None:
            pytest.skip("no native kernels here")
        pack_layers(loaded, kernels, layers_in_use(loaded))
        attention = kernels
    cache = KVCache(loaded.layers, num_blocks, BLOCK_SIZE, torch.float32, CPU)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE),
        max_step_tokens=max_step_tokens,
        max_num_seqs=40,
    )
    forward: Forward = ModelRunner(loaded, cache, attention).forward
    if backend == "cpu_graphs":
        assert kernels is not None
        fuse_rotation(loaded, kernels)
        steps = CpuGraphs(forward, kernels, max_tokens=MAX_STEP_TOKENS, widths=TableWidths(128))
        steps.verify(511, BLOCK_SIZE)
        assert steps.num_graphs == 1
        forward = steps
    return Engine(forward, scheduler, CPU)


def combinations() -> list[Any]:
    """Every architecture with recorded steps of our kernels; with the others a few, or all."""
    return [
        pytest.param(name, backend, marks=() if name in sample else on_demand)
        for name in (*ARCHITECTURES, *PECULIAR)
        for backend, sample in SAMPLES.items()
    ]


@pytest.mark.parametrize(("name", "backend"), combinations())
def test_greedy_tokens_are_those_of_transformers(name: str, backend: str) -> None:
    prompts, expected = make_prompts(), generate(name)
    assert len({token_id for tokens in expected for token_id in tokens}) > 5, "tokens differ"
    assert max(map(len, prompts)) > MAX_STEP_TOKENS
    engine = make_engine(name, backend, num_blocks=17)
    outputs = run(
        engine,
        *(
            Request(
                request_id=str(index),
                prompt_token_ids=prompt,
                max_new_tokens=NUM_NEW_TOKENS,
                prompt_logprobs=index % 4 == 0,
            )
            for index, prompt in enumerate(prompts)
        ),
    )
    assert [token_ids(outputs[str(index)]) for index in range(len(prompts))] == expected
    stats = engine.stats()
    assert stats.num_cached_tokens > 0
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("backend", ["reference", "native", "cpu_graphs"])
def test_prompt_logprobs_are_those_of_transformers(backend: str) -> None:
    prompt = make_prompts()[3]
    with torch.inference_mode():
        logits = build_model(ARCHITECTURES["qwen3"]())(torch.tensor([prompt])).logits[0]
    expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    request = Request(
        request_id="r", prompt_token_ids=prompt, max_new_tokens=1, prompt_logprobs=True
    )
    outputs = run(make_engine("qwen3", backend, num_blocks=19), request)["r"]
    first, *values = [value for output in outputs for value in output.prompt_logprobs]
    assert first is None
    assert values == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("backend", ["reference", "native", "cpu_graphs"])
def test_same_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption(
    backend: str,
) -> None:
    def request(name: str, prompt: tuple[int, ...], seed: int) -> Request:
        sampling = SamplingParams(
            do_sample=True, seed=seed, temperature=0.7, top_p=0.95, repetition_penalty=1.2
        )
        return Request(
            request_id=name, prompt_token_ids=prompt, max_new_tokens=10, sampling=sampling
        )

    wanted = request("wanted", make_prompts()[2], 2**64 - 1)
    others = [request(str(i), (5 + i, 6, 7), i) for i in range(32)]
    alone = token_ids(run(make_engine("llama", backend, num_blocks=40), wanted)["wanted"])
    assert len(set(alone)) > 3
    roomy = make_engine("llama", backend, num_blocks=200, max_step_tokens=128)
    assert token_ids(run(roomy, *others[:9], wanted, *others[9:])["wanted"]) == alone
    assert roomy.stats().num_preemptions == 0
    tight = make_engine("llama", backend, num_blocks=11)
    assert token_ids(run(tight, others[0], wanted, others[1])["wanted"]) == alone
    assert tight.stats().num_preemptions > 0


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_does_not_fit_a_paged_cache_is_refused(name: str, scale: float) -> None:
    model = build_model(UNSUPPORTED[name](), scale)
    with pytest.raises(ModelLoadError, match=type(model).__name__) as caught:
        attach_paged_attention(model, CPU, torch.float32)
    assert "\n" not in str(caught.value)
    reasons = {
        "attention": "its layers compute attention themselves",
        "state": "a state that the engine cannot keep",
        "cache": "a state that the engine cannot keep",
        "shared": "layers share a cache",
    }
    assert reasons[name.split()[0]] in str(caught.value)


@pytest.mark.parametrize("kinds", [["attention"] * 4, ["attention", "mamba"] * 2], ids=str)
def test_a_class_that_may_keep_a_state_is_judged_by_its_layers(kinds: list[str]) -> None:
    config = GraniteMoeHybridConfig(
        **{**_TINY, **_ATTENTION},
        layer_types=kinds,
        num_local_experts=0,
        shared_intermediate_size=48,
        mamba_n_heads=4,
        mamba_d_head=16,
    )
    loaded = attach_paged_attention(build_model(config), CPU, torch.float32)
    states = loaded.recurrence.states if loaded.recurrence is not None else {}
    assert len(loaded.layers) == kinds.count("attention")
    assert len(states) == kinds.count("mamba")


class TestLoad:
    """Loading checkpoints from a disk, complete and broken."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        """A small model, saved."""
        build_model(ARCHITECTURES["llama"]()).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @staticmethod
    def load_error(path: Path, **options: Any) -> str:
        """The message with which a checkpoint is refused."""
        config = EngineConfig(
            model_id=str(path), socket_path=path / "socket", device="cpu", **options
        )
        with pytest.raises(ModelLoadError) as caught:
            load_model(config)
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        return message

    def test_of_a_complete_checkpoint_finds_its_shapes(self, checkpoint: Path) -> None:
        loaded = load_model(
            EngineConfig(model_id=str(checkpoint), socket_path=checkpoint / "s", device="cpu")
        )
        assert loaded.layers == dict.fromkeys(range(3), LayerShape(2, 16, 16))
        assert loaded.dtype is torch.float32
        assert loaded.device == CPU

    def test_onto_a_gpu_goes_by_no_other_device(self, checkpoint: Path) -> None:
        """Here onto torch's device without memory: what was in the host's would stay there."""
        config = EngineConfig(model_id=str(checkpoint), socket_path=checkpoint / "s")
        shape = AutoConfig.from_pretrained(checkpoint)
        meta = torch.device("meta")
        model = _load_weights(config, shape, torch.bfloat16, meta)
        states = [*model.parameters(), *model.buffers()]
        assert {state.device for state in states} == {meta}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        on_host = _load_weights(config, shape, torch.bfloat16, CPU)
        assert {parameter.device for parameter in on_host.parameters()} == {CPU}

    @pytest.mark.parametrize("name", ["Qwen 2 VL", "Ministral 3 with images", "LLaVA"])
    def test_of_a_checkpoint_with_an_image_part(self, name: str, tmp_path: Path) -> None:
        (architecture,) = (one for one in TRIED if one.name == name)
        architecture.build().save_pretrained(tmp_path)
        loaded = load_model(
            EngineConfig(model_id=str(tmp_path), socket_path=tmp_path / "s", device="cpu")
        )
        assert loaded.layers == dict.fromkeys(range(4), LayerShape(2, 16, 16))
        ids = torch.arange(3, 60)
        with torch.inference_mode():
            expected = architecture.build()(ids.unsqueeze(0)).logits[0]
            cache = KVCache(loaded.layers, 4, 16, torch.float32, CPU)
            batch = AttentionInput(
                slot_mapping=torch.arange(57),
                block_tables=torch.arange(4).int().unsqueeze(0),
                query_start_loc=torch.tensor([0, 57]).int(),
                context_lens=torch.tensor([57]).int(),
            )
            actual = loaded.logits(ids, torch.arange(57), cache.layers, batch, ReferenceAttention())
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    def test_of_a_missing_directory(self, tmp_path: Path) -> None:
        self.load_error(tmp_path / "missing")

    def test_of_an_empty_directory(self, tmp_path: Path) -> None:
        self.load_error(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-thing"}'])
    def test_of_a_broken_config(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "config.json").write_text(text)
        self.load_error(checkpoint)

    @pytest.mark.parametrize("size", [0, 7, 100, 20_000])
    def test_of_truncated_weights(self, checkpoint: Path, size: int) -> None:
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])
        self.load_error(checkpoint)

    def test_of_weights_that_are_missing(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        self.load_error(checkpoint)

    def test_of_a_tensor_that_is_missing(self, checkpoint: Path) -> None:
        # transformers would initialise it randomly, warn, and the model would generate nonsense.
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        assert "up_proj" in self.load_error(checkpoint)

    def test_of_weights_of_another_shape(self, checkpoint: Path) -> None:
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.norm.weight"] = torch.zeros(3)
        save_file(tensors, weights, metadata={"format": "pt"})
        self.load_error(checkpoint)

    def test_of_hardly_any_weights_names_a_few(self, checkpoint: Path) -> None:
        save_file({"x": torch.ones(1)}, checkpoint / "model.safetensors", {"format": "pt"})
        assert re.search(
            r"the checkpoint lacks (\S+, ){2}\S+ and \d+ more$", self.load_error(checkpoint)
        )

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1.mlp.up_proj.weight_scale",
            "model.layers.1.self_attn.q_proj.bias",
            "model.layers.3.mlp.up_proj.weight",
            "lm_head.bias",
        ],
    )
    def test_of_tensors_that_would_be_left_out(self, checkpoint: Path, name: str) -> None:
        self.add(checkpoint, name)
        message = self.load_error(checkpoint)
        assert message.endswith(f"the model that it describes leaves out {name}")

    def test_of_more_layers_than_the_configuration_has(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
        assert "leaves out model.layers.2.input_layernorm.weight, " in self.load_error(checkpoint)

    def test_of_parts_that_models_go_without(self, checkpoint: Path) -> None:
        """For images, to predict several tokens, or from before transformers computed them."""
        self.add(
            checkpoint,
            "vision_tower.layers.0.self_attn.q_proj.weight",
            "model.layers.3.eh_proj.weight",
            "model.layers.3.mlp.up_proj.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.0.self_attn.k_scale",
        )
        load_model(EngineConfig(model_id=str(checkpoint), socket_path=checkpoint / "s"))

    @staticmethod
    def add(checkpoint: Path, *names: str) -> None:
        """Puts tensors into a checkpoint."""
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights) | {name: torch.ones(2) for name in names}
        save_file(tensors, weights, metadata={"format": "pt"})

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_of_weights_that_are_not_finite(self, checkpoint: Path, value: float) -> None:
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights)
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][3, 5] = value
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelLoadError) as caught:
            load_model(EngineConfig(model_id=str(checkpoint), socket_path=checkpoint / "s"))
        assert str(caught.value) == (
            f"LlamaForCausalLM computes logits that are not finite: {name} has values that are not"
        )

    def test_of_a_model_that_continues_no_texts(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_text('{"model_type": "clip"}')
        assert self.load_error(checkpoint).endswith("models of type clip do not continue texts")

    def test_of_a_wrong_field_says_what_is_wrong_with_it(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": "64"}))
        assert "'hidden_size' expected int, got str" in self.load_error(checkpoint)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"hidden_act": "odd"},
                "its configuration has 'odd' in hidden_act, which is not known",
            ),
            (
                {"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}},
                "its configuration has 'odd' in rope_parameters.rope_type, which is not known",
            ),
            ({"dtype": "odd"}, "its configuration has 'odd' in dtype, which is not known"),
            (
                {"num_key_value_heads": 0},
                "integer division or modulo by zero (its configuration: num_key_value_heads is 0)",
            ),
            (
                {"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}},
                "(its configuration: rope_parameters.factor is '2')",
            ),
            (
                {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
                ": Missing required keys in `rope_parameters` for 'rope_type'='linear': {'factor'}",
            ),
        ],
    )
    def test_of_values_that_are_not_known_names_the_field(
        self, checkpoint: Path, changes: dict[str, Any], message: str
    ) -> None:
        self.change(checkpoint, changes)
        assert self.load_error(checkpoint).endswith(message)

    def test_of_a_layer_that_the_model_does_not_have_names_the_field(self, tmp_path: Path) -> None:
        build_model(ARCHITECTURES["qwen2"]()).save_pretrained(tmp_path)
        types = json.loads((tmp_path / "config.json").read_text())["layer_types"]
        self.change(tmp_path, {"layer_types": ["linear_attention", *types[1:]]})
        with pytest.raises(ModelLoadError) as caught:
            load_model(EngineConfig(model_id=str(tmp_path), socket_path=tmp_path / "s"))
        assert str(caught.value) == (
            "Qwen2ForCausalLM does not run on paged attention: its configuration has "
            "'linear_attention' in layer_types, which is not known"
        )

    @pytest.mark.parametrize("name", ["flash_attention_2", "odd", "paged|eager"])
    @pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
    def test_does_without_the_attention_of_the_machine_that_saved_it(
        self, checkpoint: Path, field: str, name: str
    ) -> None:
        self.change(checkpoint, {field: name})
        load_model(EngineConfig(model_id=str(checkpoint), socket_path=checkpoint / "s"))

    @staticmethod
    def change(checkpoint: Path, changes: dict[str, Any]) -> None:
        """Changes fields of config.json."""
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | changes))

    def test_of_a_model_without_positions(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        changed = config | {"max_position_embeddings": 0}
        (checkpoint / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelLoadError, match=r"has 0 positions \(max_position_embeddings\)"):
            prepare(EngineConfig(model_id=str(checkpoint), socket_path=checkpoint / "s"))

    @pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json"])
    def test_with_a_broken_tokenizer_is_up_to_the_service(
        self, checkpoint: Path, name: str
    ) -> None:
        (checkpoint / name).write_text("{}")
        (checkpoint / "generation_config.json").write_text('{"eos_token_id": "two"}')
        config = EngineConfig(
            model_id=str(checkpoint), socket_path=checkpoint / "s", max_batch_total_tokens=512
        )
        assert build_engine(config)[1].vocab_size == 128

    def test_with_an_unknown_dtype(self, checkpoint: Path) -> None:
        self.load_error(checkpoint, dtype="float33")
