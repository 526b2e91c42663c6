"""Settings from flags and variables, and the errors for wrong ones."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.protocol.config import GRAPH_SIZES
from service import cli
from service.access.certificates import TlsFiles
from service.access.keys import parse_keys
from service.bundled import PACKAGE, demo_model
from service.launch.options import SettingsError
from service.launch.settings import OPTIONS, Settings
from service.launch.sources import add_arguments, load, without_settings
from service.launch.unsupported import UNSUPPORTED, unsupported_variables


def parse(*flags: str, **variables: str) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return load(vars(parser.parse_args(flags)), variables)


def run_cli(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code and what was written to stderr."""
    try:
        code = cli.main(list(argv))
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = without_settings(os.environ)
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)


def test_defaults_are_the_documented_ones() -> None:
    settings = parse()
    assert settings == Settings()
    assert (settings.port, settings.grpc_port, settings.hostname) == (8080, 50051, "127.0.0.1")
    assert settings.max_concurrent_requests == 128
    assert settings.model_id == "tokenwire/demo"
    assert settings.model_path.endswith("models/demo")


def test_flag_wins_over_variable_and_variable_over_default() -> None:
    assert parse("--port", "1", PORT="2").port == 1
    assert parse(PORT="2").port == 2
    assert parse("--grpc-port", "1", TOKENWIRE_GRPC_PORT="2").grpc_port == 1
    assert parse(TOKENWIRE_GRPC_PORT="2").grpc_port == 2


def test_empty_variable_counts_as_absent() -> None:
    assert parse(REVISION="", PORT=" ").revision is None


def test_old_names_of_max_input_tokens_are_accepted() -> None:
    assert parse("--max-input-length", "7").max_input_tokens == 7
    assert parse(MAX_INPUT_LENGTH="7").max_input_tokens == 7
    assert parse(MAX_INPUT_LENGTH="7", MAX_INPUT_TOKENS="8").max_input_tokens == 8


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], True),
        (["--prefix-caching"], True),
        (["--prefix-caching", "false"], False),
        (["--prefix-caching=0"], False),
    ],
)
def test_switches_work_alone_and_with_a_value(flags: list[str], expected: bool) -> None:
    assert parse(*flags).prefix_caching is expected


def test_cors_origins_come_from_repeated_flags_or_a_list() -> None:
    flags = ("--cors-allow-origin", "https://a", "--cors-allow-origin", "https://b")
    assert parse(*flags).cors_allow_origin == ("https://a", "https://b")
    assert parse(CORS_ALLOW_ORIGIN="https://a, https://b").cors_allow_origin == (
        "https://a",
        "https://b",
    )


@pytest.mark.parametrize(
    ("raw", "level"),
    [("info", "info"), ("WARN", "warning"), ("info,h2=off", "info"), ("h2=off,debug", "debug")],
)
def test_log_level_takes_tgi_filters(raw: str, level: str) -> None:
    assert parse(LOG_LEVEL=raw).log_level == level


def test_hostname_of_the_machine_is_not_taken_for_the_setting() -> None:
    assert parse(HOSTNAME="pod-7f9c").hostname == "127.0.0.1"
    assert parse(HOSTNAME="0.0.0.0").hostname == "0.0.0.0"
    with pytest.raises(SettingsError, match="`hostname` must be an IP address"):
        parse("--hostname", "pod-7f9c")


def test_unknown_variable_of_ours_is_refused_with_the_closest_match() -> None:
    with pytest.raises(SettingsError, match="TOKENWIRE_GRPC_PROT; did you mean TOKENWIRE_GRPC_"):
        parse(TOKENWIRE_GRPC_PROT="1")
    with pytest.raises(SettingsError, match="TOKENWIRE_MODEL_ID; did you mean MODEL_ID"):
        parse(TOKENWIRE_MODEL_ID="x")


def test_foreign_variables_are_ignored() -> None:
    assert parse(SOMETHING="1", CUDA_VISIBLE_DEVICES="0") == Settings()


def test_kubernetes_service_links_are_not_taken_for_settings() -> None:
    links = {
        "TOKENWIRE_SERVICE_HOST": "10.0.0.7",
        "TOKENWIRE_SERVICE_PORT": "80",
        "TOKENWIRE_SERVICE_PORT_HTTP": "80",
        "TOKENWIRE_PORT": "tcp://10.0.0.7:80",
        "TOKENWIRE_PORT_80_TCP": "tcp://10.0.0.7:80",
        "TOKENWIRE_PORT_80_TCP_ADDR": "10.0.0.7",
        "TOKENWIRE_GRPC_PORT": "tcp://10.0.0.8:50051",
    }
    assert parse(**links) == Settings()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--port", "x"], "--port must be a whole number. Given: x"),
        (["--port", "65536"], "`port` must be 0 to 65535. Given: 65536"),
        (["--waiting-served-ratio", "nan"], "--waiting-served-ratio must be a number"),
        (["--json-output", "maybe"], "--json-output must be true or false"),
        (["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype must be one of fp8_e4m3fn, fp8_e5m2"),
        (["--validation-workers", "0"], "`validation_workers` must be >= 1. Given: 0"),
        (["--max-batch-prefill-tokens", "0"], "`max_batch_prefill_tokens` must be >= 1"),
        (["--cuda-memory-fraction", "1.5"], "`cuda_memory_fraction` must be 0.01 to 1"),
        (["--watermark-gamma", "0"], "`watermark_gamma` must be > 0 and < 1. Given: 0.0"),
        (["--watermark-gamma", "1"], "`watermark_gamma` must be > 0 and < 1. Given: 1.0"),
        (["--watermark-delta", "-1"], "`watermark_delta` must be 0 to 100. Given: -1.0"),
        (
            ["--max-input-tokens", "10", "--max-total-tokens", "10"],
            "`max_input_tokens` must be < `max_total_tokens`. Given: 10 and 10",
        ),
        (
            ["--max-total-tokens", "100", "--max-batch-total-tokens", "99"],
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 100 and 99",
        ),
        (["--tls-key", "k"], "`tls_certificate` and `tls_key` must be given together"),
        (["--grpc-tls-cert=c"], "`grpc_tls_certificate` and `grpc_tls_key` must be given together"),
        (["--tls-client-ca=c"], "`tls_client_ca` needs `tls_certificate` and `tls_key`"),
        (["--api-key-exempt=info"], "--api-key-exempt must be one of none, health, metrics, "),
        (["--grpc-tls-cert=c", "--grpc-tls-key=k"], "--gateway-socket or --gateway-port is needed"),
        (["--api-key=secret"], "use --api-key-file, which `tokenwire key` fills"),
        (["--num-threads", "100000"], "`num_threads` must be 1 to 1024. Given: 100000"),
        (["--engine-socket", "/" + "x" * 107], "`engine_socket` must be <= 107 bytes"),
        (["--quantize", "int3"], "--quantize must be one of "),
        (["--num-shard=0"], "`num_shard` must be 1 to 64. Given: 0"),
        (["--num-shard=9999"], "`num_shard` must be 1 to 64. Given: 9999"),  # processes
        (["--sharded=true"], "`sharded` needs `num_shard`, which must be >= 2 with it"),
        (["--sharded=true", "--num-shard=1"], "`sharded` needs `num_shard`"),
        (["--rope-factor=2"], "--rope-factor is not supported: "),
        (["--cuda-graphs", "8,few"], "--cuda-graphs must be a whole number. Given: few"),
        (["--cuda-graphs", "8,-1"], "`cuda_graphs` must be >= 0. Given: -1"),
        (["--disable-custom-kernels"], "use --native-kernels=false"),
        (["--no-such-flag"], "unknown flag --no-such-flag"),
        (["--max-batch", "3"], "unknown flag --max-batch"),
    ],
)
def test_wrong_settings_get_one_line_and_exit_code_2(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run_cli("health", *flags, capsys=capsys)
    assert code == 2
    assert stderr.count("\n") == 1
    assert text in stderr


def test_wrong_variable_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENWIRE_NUM_THREADS", "all")
        code, stderr = run_cli("health", capsys=capsys)
    assert (code, stderr) == (
        2,
        "tokenwire health: TOKENWIRE_NUM_THREADS must be a whole number. Given: all\n",
    )


def test_unsupported_flags_that_ask_for_what_is_done_anyway_are_accepted() -> None:
    flags = ("--usage-stats", "off", "--disable-usage-stats")
    assert parse(*flags) == Settings()


def test_leftover_tgi_variables_are_warned_of_but_do_not_stop_the_server() -> None:
    leftovers = {"ROPE_FACTOR": "2", "SHARD_UDS_PATH": "a", "NGROK_EDGE": "a", "SPECULATE": "0"}
    assert parse(**leftovers) == Settings()
    names = {warning.split(" ")[0] for warning in unsupported_variables(leftovers)}
    assert names == {"ROPE_FACTOR", "SHARD_UDS_PATH", "NGROK_EDGE"}


@pytest.mark.parametrize(
    ("flags", "variables", "num_shards"),
    [
        ((), {}, 1),
        (("--num-shard", "2"), {}, 2),
        (("--sharded=true",), {"NUM_SHARD": "4"}, 4),
        (("--num-shard=2", "--sharded=false"), {}, 1),
        ((), {"NUM_SHARD": "4", "SHARDED": "false"}, 1),
    ],
)
def test_shards_are_chosen_by_tgis_two_options(
    flags: tuple[str, ...], variables: dict[str, str], num_shards: int
) -> None:
    assert parse(*flags, **variables).engine_config(Path("socket")).num_shards == num_shards


def test_adapters_have_names_of_their_own_or_are_named_by_where_they_are() -> None:
    expected = (("a", "/x=y"), ("org/b", "org/b"))
    assert parse("--lora-adapters=a=/x=y", "--lora-adapters=org/b").adapters == expected
    assert parse(LORA_ADAPTERS="a=/x=y, org/b").adapters == expected
    assert parse(LORA_ADAPTERS=" a = /x=y , org/b ").adapters == expected
    assert parse(LORA_ADAPTERS="").adapters == ()
    assert parse(LORA_ADAPTERS="a=/x").engine_config(Path("s")).adapters == (("a", "/x"),)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("=/x", "`lora_adapters` has entries of the form name=directory. Given: =/x"),
        ("a=", "`lora_adapters` has entries of the form name=directory. Given: a="),
        ("a=/x,a=/y", "`lora_adapters` has a more than once"),
        ("tgi=/x", "`lora_adapters`: tgi is a name of the model itself"),
        ("tokenwire/demo=/x", "`lora_adapters`: tokenwire/demo is a name of the model itself"),
        ("/tokenwire/demo=/x", "`lora_adapters`: /tokenwire/demo is a name of the model itself"),
        ("a\nb=/x", "`lora_adapters`: a name has control characters: 'a\\nb'"),
        ("x" * 257, "`lora_adapters`: a name must be <= 256 characters. Given: 257"),
    ],
)
def test_wrong_adapters_are_named(value: str, reason: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse(LORA_ADAPTERS=value)
    assert str(refused.value) == reason


def test_more_adapters_may_come_from_a_directory() -> None:
    flags = ("--lora-adapter-directory=/a", "--max-loras=2", "--max-cpu-loras=3")
    config = parse(*flags, LORA_ADAPTERS="a=/x,b=/y,c=/z").engine_config(Path("s"))
    assert (config.adapter_directory, config.max_loras, config.max_cpu_loras) == (Path("/a"), 2, 3)


def test_adapters_are_rounded_only_if_asked() -> None:
    assert parse().engine_config(Path("s")).lora_dtype is None
    assert parse("--lora-dtype=float16").engine_config(Path("s")).lora_dtype == "float16"
    with pytest.raises(SettingsError, match="--lora-dtype must be one of bfloat16, float16"):
        parse("--lora-dtype=int8")


@pytest.mark.parametrize("flags", [("--max-loras=3",), ("--lora-adapters=a=/a,b=/b,c=/c",)])
def test_no_more_adapters_are_loaded_or_on_the_device_than_there_can_be(
    flags: tuple[str, ...],
) -> None:
    with pytest.raises(SettingsError, match=r"`max_cpu_loras` must be >= .* Given: 2"):
        parse("--max-cpu-loras=2", *flags)


def test_no_option_is_both_supported_and_not() -> None:
    assert not UNSUPPORTED.keys() & {option.name for option in OPTIONS}


def test_children_get_exactly_the_same_settings() -> None:
    settings = Settings(
        model_id="-odd name",
        dtype="bfloat16",
        cuda_graphs=(2, 3),
        run_ahead=False,
        port=1,
        prefix_caching=False,
        json_output=True,
        cors_allow_origin=("https://a", "https://b"),
        api_key_file=Path("keys"),
        api_key_exempt=("none",),
        tls_certificate=Path("chain"),
        tls_key=Path("key"),
        tls_client_ca=Path("ca"),
        engine_socket=Path("/run/engine.sock"),
        drain_seconds=0.5,
    )
    environment = {"PORT": "7", "REVISION": "main", "TOKENWIRE_DEVICE": "cuda", "PATH": "/bin"}
    assert parse(*settings.to_argv(), **without_settings(environment)) == settings
    assert without_settings(environment) == {"PATH": "/bin"}


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-certificate"])
def test_certificates_have_a_short_and_a_long_name(flag: str) -> None:
    tls = parse(flag, "c", "--tls-key=k", "--tls-client-ca=a").tls
    assert tls == TlsFiles(Path("c"), Path("k"), Path("a"))
    assert parse(TOKENWIRE_GRPC_TLS_CERT="c", TOKENWIRE_GRPC_TLS_KEY="k").grpc_tls == TlsFiles(
        Path("c"), Path("k")
    )


def test_health_needs_no_key_unless_it_is_said() -> None:
    assert parse().api_key_exempt == ("health",)
    assert parse("--api-key-exempt=none").api_key_exempt == ("none",)
    assert parse("--api-key-exempt=docs,metrics").api_key_exempt == ("docs", "metrics")


def test_browsers_may_call_from_everywhere_only_without_keys() -> None:
    listed = ("--cors-allow-origin", "https://a")
    assert parse().allowed_origins == ("*",)
    assert parse("--api-key-file=keys").allowed_origins == ()
    assert parse(*listed).allowed_origins == ("https://a",)
    assert parse("--api-key-file=keys", *listed).allowed_origins == ("https://a",)


def test_made_key_is_on_stderr_and_its_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "alice"]) == 0
    captured = capsys.readouterr()
    assert parse_keys(captured.out).name_of(captured.err.strip()) == "alice"


def test_name_that_no_key_may_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = run_cli("key", "two words", capsys=capsys)
    assert code == 1
    assert stderr.startswith("tokenwire key: a name must have 1 to 64 letters")
    assert stderr.count("\n") == 1


def test_engine_gets_its_configuration() -> None:
    config = parse(
        "--max-batch-prefill-tokens=64", "--max-batch-size=3", "--cuda-memory-fraction=0.5"
    ).engine_config(Path("/run/engine.sock"))
    assert config.max_step_tokens == 64
    assert config.max_num_seqs == 3
    assert config.memory_fraction == 0.5
    assert config.socket_path == Path("/run/engine.sock")
    assert (config.watermark_gamma, config.watermark_delta) == (0.5, 2.0)
    assert (config.graph_sizes, config.run_ahead) == (GRAPH_SIZES, None)
    assert config.kv_cache_dtype is None
    config = parse(KV_CACHE_DTYPE="fp8_e5m2").engine_config(Path("/run/engine.sock"))
    assert config.kv_cache_dtype == "fp8_e5m2"


def test_graph_sizes_are_given_as_in_tgi() -> None:
    settings = parse("--cuda-graphs", "4,1", "--cuda-graphs=8", TOKENWIRE_RUN_AHEAD="true")
    assert settings.cuda_graphs == (4, 1, 8)
    assert settings.run_ahead is True
    assert parse(CUDA_GRAPHS="0").engine_config(Path("/run/engine.sock")).graph_sizes == (0,)


def test_settings_of_the_watermark_have_the_names_of_tgi() -> None:
    settings = parse("--watermark-gamma=0.25", WATERMARK_GAMMA="0.3", WATERMARK_DELTA="1.5")
    config = settings.engine_config(Path("/run/engine.sock"))
    assert (config.watermark_gamma, config.watermark_delta) == (0.25, 1.5)


def test_gateway_gets_its_configuration() -> None:
    config = parse(
        "--grpc-host=0.0.0.0", "--gateway-port=5", "--port=6", "--max-concurrent-requests=9000"
    ).gateway_config(Path("descriptors.binpb"))
    assert (config.upstream_host, config.upstream_port) == ("127.0.0.1", 5)
    assert config.upstream_sockets == ()
    assert (config.listen_host, config.listen_port) == ("127.0.0.1", 6)
    assert config.max_requests > 9000


def test_the_gateway_is_reached_over_its_socket_if_there_is_one() -> None:
    settings = parse("--gateway-socket=/run/gateway.sock", "--gateway-port=5", "--grpc-host=::1")
    assert settings.gateway_config(Path("x")).upstream_sockets == (Path("/run/gateway.sock"),)
    assert settings.gateway_addresses == ["unix:/run/gateway.sock", "[::1]:5"]


def test_envoy_alone_needs_the_services_address(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("envoy", "envoy-config"):
        code, stderr = run_cli(command, capsys=capsys)
        assert code == 2
        assert "--gateway-socket, --gateway-port, --service-addresses or" in stderr


def test_servers_are_what_envoy_alone_spreads_requests_over(tmp_path: Path) -> None:
    flags = ("--service-addresses=10.0.0.1:1,gpu.internal:2", "--service-addresses", "[::1]:3")
    servers = parse(*flags, "--server-affinity=session,beginning").gateway_config(Path("x")).servers
    assert servers is not None
    assert [str(it) for it in servers.addresses] == ["10.0.0.1:1", "gpu.internal:2", "[::1]:3"]
    assert (servers.affinity, servers.max_load) == (("session", "beginning"), 1.5)
    path = tmp_path / "servers"
    path.write_text("10.0.0.1:1\n")
    config = parse(TOKENWIRE_SERVICE_ENDPOINTS_FILE=str(path)).gateway_config(Path("x"))
    assert config.servers is not None
    assert (config.servers.endpoints_file, config.servers.affinity) == (path, ())


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--service-addresses=10.0.0.1:1", "are for `tokenwire envoy`"),
        ("--service-endpoints-file=/servers", "are for `tokenwire envoy`"),
        ("--server-affinity=session", "`server_affinity` needs"),
    ],
)
def test_a_server_of_its_own_processes_spreads_requests_over_no_others(
    flag: str, complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint):
        parse(flag).gateway_config(Path("x"), sockets=(Path("/run/a.sock"),))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--service-addresses=10.0.0.1"], "not an address host:port: '10.0.0.1'"),
        (["--service-addresses=a:1,a:1"], "a:1 is there more than once"),
        (["--server-affinity=tenant"], "one of session, caller, beginning. Given: tenant"),
        (["--server-affinity=session,session"], "`server_affinity` has something more than once"),
        (["--server-affinity-load=0.9"], "`server_affinity_load` must be 1 to 100"),
        (["--server-affinity-load=2", "--gateway-port=1"], "needs `server_affinity`"),
        (["--service-addresses=a:1", "--gateway-port=1"], "cannot both be given"),
        (["--server-affinity=session", "--gateway-port=1"], "`server_affinity` needs"),
        (["--service-endpoints-file=/nowhere"], "--service-endpoints-file: [Errno 2]"),
        (["--service-addresses=a:1", "--service-endpoints-file=x"], "cannot both be given"),
        (["--service-addresses=a:1", "--service-resolvers=b:53"], "b:53 is not an IP address"),
        (["--service-addresses=a:1", "--service-resolvers=8600"], "`service_resolvers`: not an"),
        (["--service-addresses=10.0.0.1:1", "--service-resolvers=::1:53"], "not an address"),
        (["--service-addresses=10.0.0.1:1", "--service-resolvers=10.0.0.2:53"], "needs a name"),
    ],
)
def test_wrong_settings_of_servers_are_one_line(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("envoy", "envoy-config"):
        code, stderr = run_cli(command, *flags, capsys=capsys)
        assert code == 2
        assert complaint in stderr
        assert stderr.count("\n") == 1


def test_engine_alone_needs_a_socket(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = run_cli("engine", capsys=capsys)
    assert code == 2
    assert "--engine-socket" in stderr


def test_health_of_an_unreachable_server_is_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["health", "--grpc-port", "1"]) == 1
    assert capsys.readouterr().out == "not serving\n"


def test_model_that_cannot_be_loaded_is_one_line_and_exit_code_1() -> None:
    code = (
        "import sys, types\n"
        "from engine.protocol.errors import ModelLoadError\n"
        "def serve(config): raise ModelLoadError(f'cannot load {config.model_id}: no\\nconfig')\n"
        "sys.modules['engine.server'] = types.SimpleNamespace(serve=serve)\n"
        "from service import cli\n"
        f"sys.exit(cli.main(['engine', '--model-id={demo_model()}', '--engine-socket=s']))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=without_settings(os.environ) | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert (ended.returncode, ended.stderr) == (
        1,
        f"tokenwire engine: cannot load {demo_model()}: no config\n",
    )


def test_json_output_logs_one_object_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROPE_FACTOR", "2")
    cli.main(["engine", "--json-output"])
    first, _ = capsys.readouterr().err.splitlines()
    line = json.loads(first)
    assert line["level"] == "WARN"
    assert line["message"].startswith("ROPE_FACTOR has no effect")


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys\n"
        "from service import cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'grpc', 'transformers'} & sys.modules.keys()))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        env=without_settings(os.environ) | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert ended.returncode == 0, ended.stderr
    assert b"--max-total-tokens" in ended.stdout


def test_hosts_of_images_are_listed_by_their_own_variable() -> None:
    assert parse().allowed_media_domains == ()
    listed = parse(ALLOWED_MEDIA_DOMAINS="a.example,10.0.0.7:9000").allowed_media_domains
    assert listed == ("a.example", "10.0.0.7:9000")
    with pytest.raises(SettingsError, match=r"`allowed_media_domains`: .* Given: \*\.example"):
        parse("--allowed-media-domains=*.example")
