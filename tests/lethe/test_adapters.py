"""`lethe adapters` against a live service."""

import json
from pathlib import Path

import pytest

from lethe.cli import main
from lora.peft_files import CONFIG
from server.service.adapters import NewAdapter
from tests.server.service.conftest import (  # noqa: F401 - fixtures
    Encoder,
    drawn,
    free_port,
    log,
    personal,
    site,
    site_url,
    text_encoder,
    url,
)
from tests.server.service.site import Site


@pytest.fixture(autouse=True)
def place(url: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("LETHE_URL", url)
    monkeypatch.setenv("LETHE_KEY", site.key("operator"))


def test_an_adapter_goes_out_for_vllm_and_in_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "ana"
    assert main(["adapters", "export", "user-003", str(folder), "--for", "vllm"]) == 0
    told = capsys.readouterr().out
    assert f"--max-lora-rank 8 --lora-modules user-003={folder}" in told.replace("\n", "")
    assert json.loads((folder / CONFIG).read_text())["r"] <= 8
    assert main(["adapters", "import", "copy", str(folder), "--owner", "zoë", "--model", "base"]) == 0
    assert "copy is at version" in capsys.readouterr().out
    assert main(["adapters", "list"]) == 0
    assert capsys.readouterr().out.startswith("copy  version")
    assert main(["adapters", "export", "user-003", str(folder)]) == 2, "what is there already is not written over"
    assert [file.name for file in folder.parent.iterdir()] == ["ana"]


def test_what_vllm_would_not_serve_is_not_written(
    site: Site,  # noqa: F811
    text_encoder: Encoder,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("enc", drawn(layout, 1)[0], layout, "tiny-bert", 2, None))
    assert main(["adapters", "export", "enc", str(tmp_path / "out" / "enc"), "--for", "vllm"]) == 2
    assert "decoders only" in capsys.readouterr().err and not [*(tmp_path / "out").iterdir()]
    assert main(["adapters", "export", "enc", str(tmp_path / "enc"), "--for", "peft"]) == 0
    assert (tmp_path / "enc" / CONFIG).is_file()


def test_a_wrong_key_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LETHE_KEY", "lethe_wrong")
    assert main(["adapters", "list"]) == 2
    assert "not valid" in capsys.readouterr().err
