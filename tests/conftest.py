"""The small model of checkpoints/scenes, by this engine and by diffusers' own pipeline."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import chown

import psycopg
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormContinuous
from openai import OpenAI
from tiny_z_image import write_checkpoint
from torch.nn.modules.module import register_module_forward_hook

from backends import Backend, backend_names, get_backend
from bench.serving.servers import Running, servers, started
from stages.config import ModelConfig
from stages.loading import load_scheduler, load_transformer
from stages.network import Network
from stages.pipeline import Pipeline

ROOT = Path(__file__).parent.parent

# Ray asks local clients for a token by default, and `serve status` is another process than the server's.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Several threads wait for each other by spinning: where another process has one of their cores, ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=backend_names(), help="the one backend to test, which must be able to run")


# Fixtures that start Ray.
RAY = {"cluster", "colocated", "narrow", "observed", "server", "site"}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with Ray, and put those of the shared server last: it then runs beside no other server."""
    for item in items:
        if RAY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
    items.sort(key=lambda item: "server" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """The shipped model, which here takes sizes besides those that it draws well."""
    shipped = ModelConfig.read(ROOT / "configs" / "scenes.yaml")
    return shipped.model_copy(update={"sizes": (*shipped.sizes, "64x64", "192x128", "128x192")})


@pytest.fixture(scope="session")
def backend() -> Backend:
    return get_backend("cpu")


@pytest.fixture(scope="session")
def scheduler(config: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    return load_scheduler(config)


@pytest.fixture(scope="session")
def transformer(config: ModelConfig, backend: Backend) -> QwenImageTransformer2DModel:
    """As the engine loads it, without adapters."""
    return load_transformer(config, backend).module


@pytest.fixture(scope="session")
def network(config: ModelConfig, backend: Backend) -> Network:
    """As the engine runs it."""
    return Network.load(config, backend)


@pytest.fixture(scope="session")
def pipeline(config: ModelConfig, backend: Backend) -> Pipeline:
    return Pipeline(config, backend)


@pytest.fixture(scope="session")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a tiny random Z-Image."""
    return write_checkpoint(tmp_path_factory.mktemp("z-image"))


@pytest.fixture(scope="session")
def gaudi_python() -> str:
    """The interpreter of an environment with what Gaudi's libraries pin."""
    if "GAUDI_PYTHON" not in os.environ:
        pytest.skip("GAUDI_PYTHON names no interpreter; `make test-pools` does")
    return os.environ["GAUDI_PYTHON"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL of this session's own, on a socket in its directory; it refuses to be root's."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("there is no PostgreSQL; Debian's package postgresql has it")
    user = "postgres" if os.getuid() == 0 else None

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs[-1] / program, *arguments], user=user, cwd="/", check=True, timeout=120, stdout=subprocess.DEVNULL
        )

    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        if user:
            chown(directory, user)
        data = f"{directory}/data"
        run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", data)
        options = f"-c listen_addresses='' -c unix_socket_directories={directory} -c fsync=off"
        run("pg_ctl", "start", "-w", "-D", data, "-l", f"{directory}/log", "-o", options)
        stack.callback(run, "pg_ctl", "stop", "-m", "immediate", "-D", data)
        yield f"postgresql://postgres@/{{name}}?host={directory}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/here/database.sqlite3"
    template: str = request.getfixturevalue("postgres")
    name = f"test_{os.urandom(4).hex()}"
    with psycopg.connect(template.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return template.format(name=name)


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """The application of serve_config.yaml, started once for all tests that need no other."""
    model = ROOT / "configs" / "scenes.yaml"
    with started(servers(model)[0], model) as running:
        yield running


@pytest.fixture(scope="session")
def url(server: Running) -> str:
    return server.url


@pytest.fixture(scope="session")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def diffusers_base(config: ModelConfig) -> QwenImagePipeline:
    """What a user of diffusers runs for the base model."""
    reference = QwenImagePipeline.from_pretrained(config.source, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="session")
def lightning_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the config that Qwen-Image-Lightning tells its users to set."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=math.log(3),
        invert_sigmas=False,
        max_image_seq_len=8192,
        max_shift=math.log(3),
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=None,
        stochastic_sampling=False,
        time_shift_type="exponential",
        use_beta_sigmas=False,
        use_dynamic_shifting=True,
        use_exponential_sigmas=False,
        use_karras_sigmas=False,
    )


@pytest.fixture(scope="session")
def diffusers_distilled(config: ModelConfig, lightning_scheduler: FlowMatchEulerDiscreteScheduler) -> QwenImagePipeline:
    """What a user of diffusers runs for the distilled model."""
    reference = QwenImagePipeline.from_pretrained(config.source, scheduler=lightning_scheduler, dtype=torch.float32)
    reference.load_lora_weights(config.adapters["distilled"].source, adapter_name="distilled")
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture
def blocks_run() -> Iterator[list[int]]:
    """A list that grows by one number for each forward pass of any transformer: how many rows its blocks saw."""
    passes: list[int] = []
    attentions = 0

    def observe(module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        nonlocal attentions
        if isinstance(module, Attention):
            attentions += len(output[0])
        elif isinstance(module, AdaLayerNormContinuous):  # after the blocks
            passes.append(attentions)
            attentions = 0

    handle = register_module_forward_hook(observe)
    yield passes
    handle.remove()
