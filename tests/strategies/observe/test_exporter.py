import logging
import socket
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from lora.errors import ConfigError
from strategies.observe.exporter import LOOPBACK, METRICS_VARIABLE, Address, exported


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("lethe_depth", "A figure.", registry=registry).set(3)
    return registry


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", Address(9464)),
        (":9464", Address(9464)),
        ("localhost:9464", Address(9464, "localhost")),
        ("[::1]:80", Address(80, "::1")),
    ],
)
def test_addresses_are_read_and_loopback_is_the_default(text: str, address: Address) -> None:
    assert Address.read(text) == address


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", "localhost:x", "localhost:65536", "localhost:-1", "²"])
def test_what_is_no_address_is_an_error_that_shows_one(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"LETHE_METRICS={text}: give HOST:PORT, such as {LOOPBACK}:9464"):
        Address.read(text)


def test_the_environment_wins_over_the_port_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Address.given() is None
    assert Address.given(9000) == Address(9000, LOOPBACK)
    monkeypatch.setenv(METRICS_VARIABLE, "localhost:9001")
    assert Address.given(9000) == Address.given() == Address(9001, "localhost")


def test_metrics_are_served_while_the_block_runs_and_no_longer(registry: CollectorRegistry) -> None:
    with exported(registry, Address(0)) as address:
        assert address is not None
        text = urlopen(f"http://{address.host}:{address.port}/metrics", timeout=5).read().decode()
        (family,) = text_string_to_metric_families(text)
        assert [(sample.name, sample.value) for sample in family.samples] == [("lethe_depth", 3.0)]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((address.host, address.port), timeout=5)


def test_without_an_address_nothing_is_served(registry: CollectorRegistry) -> None:
    with exported(registry, None) as address:
        assert address is None


def test_a_taken_port_is_a_warning_and_the_block_runs(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken, caplog.at_level(logging.WARNING):
        port = taken.getsockname()[1]
        with exported(registry, Address(port)) as address:
            assert address is None
    (record,) = caplog.records
    assert f"{LOOPBACK}:{port} cannot be taken" in record.getMessage()
    assert f"{METRICS_VARIABLE}=HOST:PORT" in record.getMessage()


def test_a_host_that_is_not_here_is_a_warning_too(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    with exported(registry, Address(9464, "no-such-host.invalid")) as address:
        assert address is None
    assert "no-such-host.invalid:9464 cannot be taken" in caplog.text
