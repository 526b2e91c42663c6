"""The image, tried by hand: from a fresh directory it serves as a user who owns none of its files.

No Docker engine is needed; what one would do on top (namespaces, volumes) is not shown here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from engine.kernels.levels import LEVELS, usable_levels
from service.cli import _make_parser
from tests.deploy.dockerfile import stages
from tests.deploy.image import Image
from tests.e2e.stack import running
from tests.engine.native import needs_compiler
from tests.paths import REPOSITORY

USER = 54321  # whom no file of this machine knows
FILES = stages(REPOSITORY / "Dockerfile")
IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("image"))
    for directory in (image.home / ".cache", image.root / "tmp"):
        directory.mkdir(parents=True)
        if IS_ROOT:
            os.chown(directory, USER, USER)
    return image


def as_user() -> list[str]:
    """The words before a command that let it run as another user; skips where that is forbidden."""
    if not IS_ROOT:
        return []
    user = [
        shutil.which("setpriv") or "setpriv",
        f"--reuid={USER}",
        f"--regid={USER}",
        "--clear-groups",
    ]
    # It may read what only root may, since this Python may be installed there; and not write.
    user += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    done = subprocess.run([*user, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"forbidden here: {done.stderr.strip()}")
    return user


@pytest.fixture
def temporary() -> Iterator[str]:
    """A directory for sockets, with a short name."""
    with TemporaryDirectory() as directory:
        if IS_ROOT:
            os.chown(directory, USER, USER)
        yield directory


@needs_compiler
def test_it_serves_as_a_user_who_can_write_nothing_but_the_cache(
    image: Image, tmp_path: Path, temporary: str
) -> None:
    words = [*image.server.words("ENTRYPOINT"), *image.server.words("CMD")]
    assert words == ["tokenwire", "serve", "--hostname=0.0.0.0", "--grpc-host=0.0.0.0"]
    # The test's command line begins with the checkout's command: the image's takes its place.
    command = ["sh", "-c", 'shift 2; exec "$0" serve "$@"', str(image.prefix / "bin" / "tokenwire")]
    prefix = ["env", f"--chdir={image.home}", *as_user(), *command]
    environment = {**image.environment(), "TMPDIR": temporary}
    before = _files(image.root)
    with running(tmp_path / "log", *words[2:], prefix=prefix, environment=environment) as stack:
        assert stack.generate()["details"]["generated_tokens"] == 8
        programs = [child.exe() for child in stack.children() if child.name() == "envoy"]
        log = stack.log()
    assert len(programs) == 1
    assert "native CPU kernels" in log
    new = _files(image.root) - before
    if IS_ROOT:  # its owner could write everywhere
        assert {path for path in new if image.home / ".cache" not in path.parents} == set()
    if usable_levels():  # compiled beforehand: there is no compiler, and nothing was compiled
        assert [path for path in new if path.suffix == ".so"] == []


@needs_compiler
def test_there_is_a_library_for_each_level_of_processors(image: Image) -> None:
    folder = image.site_packages / "tokenwire" / "engine" / "kernels" / "prebuilt"
    levels = {path.name.split("-")[1] for path in folder.iterdir()}
    assert levels == {level.name for level in LEVELS}


@needs_compiler
def test_health_is_asked_by_a_command_of_the_image(image: Image) -> None:
    (check,) = image.server.texts("HEALTHCHECK")
    assert check.endswith('CMD ["tokenwire", "health"]')
    done = subprocess.run(
        [image.prefix / "bin" / "tokenwire", "health", "--grpc-port=1"],
        env=image.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "not serving\n", "")


def test_nothing_runs_as_root_and_volumes_belong_to_the_user() -> None:
    server = FILES["server"]
    assert server.texts("USER") == ["1000:1000"]
    instructions = [name for name, _ in server.instructions]
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    owned = server.texts("RUN")[0]
    assert "useradd --create-home --uid 1000 tokenwire" in owned
    assert "--owner tokenwire --group tokenwire --mode 700" in owned
    for volume in server.words("VOLUME"):
        assert volume in owned.split()
    caches = [server.variables()[name] for name in ("HF_HOME", "TRITON_CACHE_DIR")]
    assert all(path.startswith("/home/tokenwire/.cache/") for path in caches)


def test_the_image_has_no_build_tools_but_what_triton_needs() -> None:
    assert FILES["server"].base == "${DEVICE}"
    assert FILES["cpu"].instructions == []
    assert "gcc" in FILES["cuda"].texts("RUN")[0]
    assert FILES["server"].texts("COPY") == ["--from=packages /opt/tokenwire /opt/tokenwire"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packages_are_those_of_the_lock_with_hashes(device: str) -> None:
    packages = FILES["packages"]
    assert (["requirements-runtime-${DEVICE}.lock"], "./") in packages.copies()
    assert (REPOSITORY / f"requirements-runtime-{device}.lock").is_file()
    installs = [text for text in packages.texts("RUN") if "pip install" in text]
    assert "--no-deps --require-hashes -r requirements-runtime-${DEVICE}.lock" in installs[0]


def test_what_is_copied_is_in_the_build_context() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    copied = {name for stage in FILES.values() for names, _ in stage.copies() for name in names}
    assert copied >= {"engine", "service", "protos", "envoy", "models", "pyproject.toml"}
    assert copied & set(ignored) == set()
    for name in copied:
        assert list(REPOSITORY.glob(name.replace("${DEVICE}", "*"))), name


def test_the_command_is_one_that_exists() -> None:
    _make_parser().parse_args(FILES["server"].words("CMD"))


def _files(root: Path) -> set[Path]:
    """All files below a directory, links not followed."""
    return {Path(folder) / name for folder, _, names in os.walk(root) for name in names}
