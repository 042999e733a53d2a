"""Every test runs with strict dtype promotion, four virtual CPU devices and no network."""

import functools
import os
import socket
import typing

os.environ["JAX_PLATFORMS"] = os.environ.get("EFFJAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import jax
import jaxtyping
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jaxtyping import _decorator

from experiments import tpu

if os.environ["JAX_PLATFORMS"] == "cpu":
    # XLA takes most of the time: it compiles quickly here, for programs that hardly run.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_numpy_dtype_promotion", "strict")


def _remembered(make, key=lambda *given: given):
    made = {}

    @functools.wraps(make)
    def own(*args, **kwargs):
        name = (*key(*args), *kwargs.items())
        try:
            if name in made:
                return made[name][0]
        except TypeError:  # a default that has no hash
            return make(*args, **kwargs)
        found = make(*args, **kwargs)
        if found is not typing.Any:  # perhaps a name that is not there yet
            made[name] = found, args  # what an id is of lives on
        return found

    return own


# A function within a function is decorated again whenever the outer one runs. What jaxtyping and
# beartype make of a signature takes them milliseconds, a quarter of what it takes to trace a model:
# it is made once.
for _make in (_decorator._make_fn_with_signature, _decorator._apply_typechecker):
    setattr(_decorator, _make.__name__, _remembered(_make))
_decorator._destring_annotation = _remembered(
    _decorator._destring_annotation, lambda annotation, names: (annotation, id(names))
)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped():
    """Compiled programs go with their module: a process may map so much memory, and no more."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Only this machine can be reached."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests must not reach the network; tried {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def untyped():
    """Without the checks of annotations, which only tests have: what a user's mistake meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=tpu.CHIPS)
def compile_for_tpu(request):
    """Compile a jitted function for a TPU ahead of time, at shapes or arrays; once per chip."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")

    def compile_(function, *operands):
        return function.lower(*tpu.on_chip(request.param, operands)).compile()

    return compile_


@pytest.fixture
def lower_for_gpu():
    """Lower a jitted function for CUDA on any machine, at shapes or arrays: its program as text."""

    def lower(function, *operands, kind="NVIDIA A100-SXM4-80GB"):
        device = AbstractDevice(kind, num_cores=108, platform="cuda")
        # JAX 0.12 asks which GPU a Triton kernel is lowered for.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return function.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()

    return lower
