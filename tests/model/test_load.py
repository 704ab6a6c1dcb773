"""Checkpoints that are damaged, foreign or not what their config says are refused by name before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tuner.errors import ModelError
from tuner.model import load
from tuner.model.load import (
    base_fingerprint,
    find_checkpoint,
    load_base,
    load_tokenizer,
    padding_id,
    resolve_dtype,
    weight_files,
)
from tuner.recipe import ModelSection

CPU = torch.device("cpu")


def base(directory: Path, *, trainable: bool = False, **changes: Any) -> LlamaForCausalLM:
    options = {k: changes.pop(k) for k in ("param_dtype",) if k in changes}
    section = ModelSection(name_or_path=str(directory), **({"dtype": "float32"} | changes))
    return load_base(section, CPU, trainable=trainable, **options)  # type: ignore[return-value]


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(directory: Path) -> None:
    """Cuts the single weight file in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- weights ---


def test_a_sharded_checkpoint_is_the_single_file(tiny_model_dir: Path) -> None:
    whole = base(tiny_model_dir).state_dict()
    before = base_fingerprint(str(tiny_model_dir))
    shard(tiny_model_dir)
    assert [f.name[:11] for f in weight_files(tiny_model_dir)] == ["model-00001", "model-00002"]
    assert all(torch.equal(v, whole[k]) for k, v in base(tiny_model_dir).state_dict().items())
    assert base_fingerprint(str(tiny_model_dir)) != before


@pytest.mark.parametrize("size", [0, 4, 100, -100])
def test_a_truncated_weight_file_is_named(tiny_model_dir: Path, size: int) -> None:
    file = tiny_model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=rf"{file} \(\d+ bytes\) is truncated or is not a safetensors file"):
        base(tiny_model_dir)


def test_a_missing_shard_is_named(tiny_model_dir: Path) -> None:
    shard(tiny_model_dir)
    (tiny_model_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="shard model-00002-of-00002.safetensors is missing"):
        base(tiny_model_dir)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_a_shard_outside_the_directory_is_refused(tiny_model_dir: Path, name: str) -> None:
    shard(tiny_model_dir)
    save_file({"x": torch.zeros(1)}, tiny_model_dir.parent / "secret.safetensors")
    index = tiny_model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelError, match="names a shard outside its directory"):
        base(tiny_model_dir)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": []}', "{}", '{"weight_map": {}}', '{"weight_map": {"x": 5}}']
)
def test_a_broken_index_is_refused(tiny_model_dir: Path, text: str) -> None:
    shard(tiny_model_dir)
    (tiny_model_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="index.json (cannot be read|names no shards)|shard 5 is missing"):
        base(tiny_model_dir)


def test_a_single_file_wins_over_an_index_as_in_transformers(tiny_model_dir: Path) -> None:
    (tiny_model_dir / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')
    assert weight_files(tiny_model_dir) == [tiny_model_dir / "model.safetensors"]
    base(tiny_model_dir)


def test_pickles_are_never_read(tiny_model_dir: Path) -> None:
    (tiny_model_dir / "model.safetensors").unlink()
    torch.save({}, tiny_model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no model.safetensors; tuner reads safetensors only"):
        base(tiny_model_dir)


def test_wrong_key_names_do_not_become_random_weights(tiny_model_dir: Path) -> None:
    file = tiny_model_dir / "model.safetensors"
    tensors = load_file(file)
    for change in (
        {f"_orig_mod.{k}": v for k, v in tensors.items()},
        {k.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.query"): v for k, v in tensors.items()},
        {k: v for k, v in tensors.items() if "layers.0.mlp.up_proj" not in k},
        {**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)},
    ):
        save_file(change, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"(missing|unexpected) keys in the weights: "):
            base(tiny_model_dir)


def test_weights_of_other_shapes_are_refused(tiny_model_dir: Path) -> None:
    edit_config(tiny_model_dir, intermediate_size=64)
    with pytest.raises(ModelError, match=str(tiny_model_dir)):
        base(tiny_model_dir)


def test_old_checkpoints_with_rotary_buffers_load(tiny_model_dir: Path) -> None:
    """Llama 2's published weights carry a buffer that the model now computes."""
    file = tiny_model_dir / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in range(2)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    base(tiny_model_dir)


def test_tied_embeddings_are_no_missing_key(make_model: Any, tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    lm = base(tmp_path / "tied", trainable=True)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


# --- dtype ---


def test_dtypes(tiny_model_dir: Path) -> None:
    def dtypes(**changes: Any) -> tuple[set[torch.dtype], bool]:
        lm = base(tiny_model_dir, **changes)
        (trains,) = {p.requires_grad for p in lm.parameters()}
        return {p.dtype for p in lm.parameters()}, trains

    assert dtypes() == ({torch.float32}, False)
    assert dtypes(dtype="bfloat16") == ({torch.bfloat16}, False)
    assert dtypes(dtype="bfloat16", trainable=True) == ({torch.float32}, True)
    assert dtypes(dtype="bfloat16", trainable=True, param_dtype=torch.bfloat16) == ({torch.bfloat16}, True)


def test_auto_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx, amx, dtype in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert resolve_dtype("auto", CPU) == dtype
    assert resolve_dtype("float16", CPU) == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits(tiny_model_dir: Path, quant_type: str) -> None:
    lm = base(tiny_model_dir, load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    packed = [n for n, p in lm.named_parameters() if p.dtype == torch.uint8]
    assert len(packed) == 14 and not any("lm_head" in n or "embed" in n for n in packed)
    assert not any(p.requires_grad for p in lm.parameters())


def test_widths_that_4bit_blocks_do_not_divide_are_refused(make_model: Any, tmp_path: Path) -> None:
    make_model(intermediate_size=100).save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match="intermediate_size is 100, and 4-bit blocks need a multiple of 64"):
        base(tmp_path / "odd", load_in_4bit=True)


# --- what is no checkpoint ---


def test_another_architecture_is_refused_by_name(tiny_model_dir: Path) -> None:
    edit_config(tiny_model_dir, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ModelError, match="is a 'gpt2' model; tuner trains the Llama family"):
        base(tiny_model_dir)
    edit_config(tiny_model_dir, model_type="my-own", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError):
        base(tiny_model_dir)


def test_a_broken_config_is_refused(tiny_model_dir: Path) -> None:
    (tiny_model_dir / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json cannot be read"):
        base(tiny_model_dir)
    (tiny_model_dir / "config.json").unlink()
    with pytest.raises(ModelError, match="holds no config.json"):
        base(tiny_model_dir)


def test_what_is_neither_a_directory_nor_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "absent"), "./a/b", "~/x", "llama", "a/b/c", str(tmp_path / "file")):
        with pytest.raises(ModelError, match="neither a directory nor a Hub id"):
            find_checkpoint(name)


def test_a_hub_id_that_is_not_cached_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise load.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(load, "snapshot_download", offline)
    with pytest.raises(ModelError, match="'nobody/nothing' is no local directory, it is not in the Hub cache"):
        find_checkpoint("nobody/nothing")


def test_a_hub_id_is_pinned_to_its_commit(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tiny_model_dir)

    monkeypatch.setattr(load, "snapshot_download", download)
    found = find_checkpoint("org/name", "main")
    assert (found.path, found.commit) == (tiny_model_dir, tiny_model_dir.name)
    assert asked["revision"] == "main"
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in asked["allow_patterns"])


# --- tokenizers ---


def test_a_slow_tokenizer_is_refused(tiny_model_dir: Path) -> None:
    for file in tiny_model_dir.glob("token*"):
        file.unlink()
    (tiny_model_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ModelError, match="no tokenizer.json; convert it to a fast tokenizer"):
        load_tokenizer(str(tiny_model_dir))


def test_a_missing_or_broken_tokenizer_is_refused(tiny_model_dir: Path) -> None:
    (tiny_model_dir / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=str(tiny_model_dir)):
        load_tokenizer(str(tiny_model_dir))
    for file in tiny_model_dir.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match=str(tiny_model_dir)):
        load_tokenizer(str(tiny_model_dir))


def test_padding_never_grows_the_vocabulary(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert padding_id(load_tokenizer(str(tiny_model_dir))) == 7
    file = tiny_model_dir / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    loaded = load_tokenizer(str(tiny_model_dir))
    assert loaded.pad_token_id is None
    assert padding_id(loaded) == 7  # Llama 3's pad token by its name
    assert len(loaded) == len(tokenizer)
