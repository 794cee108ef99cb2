"""Replicas before any of them starts: settings that fit the run, and those that do not."""

from pathlib import Path

import pytest

from lethe.cli import main
from lethe.replicas import NAME, Replicas, application, deployed, prepared
from lethe.serve import KEY_FILE, Place
from lora.errors import ConfigError, RunError
from tests.lethe.test_served_classifier import run

__all__ = ["run"]
pytest.importorskip("ray.serve")


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    """A run with users' histories, as far as replicas ask for it before they start."""
    made = tmp_path / "personal"
    made.mkdir()
    (made / "config.yaml").write_text("kind: personal\n")
    return made


def test_a_classifiers_replicas_follow_the_load(run: Path, tmp_path: Path) -> None:
    place = Place(data=tmp_path)
    fixed = deployed(run, place, Replicas(3))._bound_deployment
    assert (fixed.name, fixed.num_replicas) == (NAME, 3)
    scaling = deployed(run, place, Replicas(2, 6, ongoing=8))._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 8)
    with pytest.raises(ConfigError, match="there are 4 at least"):
        deployed(run, place, Replicas(4, 2))


def test_divided_users_have_a_number_that_stays(histories: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--most-replicas 6: users with histories are divided"):
        deployed(histories, Place(data=tmp_path), Replicas(2, 6))
    (tmp_path / "data" / "users-0-of-2").mkdir(parents=True)
    with pytest.raises(RunError, match="serve with --replicas 2"):
        prepared(histories, Place(data=tmp_path / "data"), 3, say=print)


def test_rays_own_commands_get_the_same(run: Path, tmp_path: Path) -> None:
    told = {"run": str(run), "data": str(tmp_path / "data"), "replicas": "2", "most": "5", "cpus": "0.5"}
    made = application(told)._bound_deployment
    assert made.ray_actor_options["num_cpus"] == 0.5
    assert (tmp_path / "data" / KEY_FILE).stat().st_mode & 0o077 == 0
    for wrong in ({"data": "x"}, {**told, "replica": "2"}):
        with pytest.raises(ConfigError, match=r"docs/operate\.md"):
            application(wrong)


def test_options_that_do_not_fit_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["--most-replicas", "3"], "--replicas"),
        (["--rate", "0"], "--rate 0, --burst 200: give a rate above 0"),
        (["--burst", "0"], "burst of at least 1"),
        (["--ray", "auto"], "--replicas"),
        (["--replicas", "2", "--grpc-port", "8421"], "--grpc-port"),
    ):
        assert main(["serve", "--run", str(run), *words]) == 2
        assert why in capsys.readouterr().err
