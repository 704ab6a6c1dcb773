"""Fixtures that every test may use: a tiny tokenizer and tiny random Llamas, made from nothing in a second."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; its kernels then run on a CPU

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from tuner.types import Tokens, span  # noqa: E402

CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(16)),
]
SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "What is the capital of the country? The answer is short.",
    "user assistant system hello world, one two three four five",
]


@pytest.fixture(scope="session", autouse=True)
def no_shared_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What wider fixtures tokenise is not kept in the user's folder."""
    os.environ["TUNER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the tokens that another one has cached."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path_factory.mktemp("cache")))


def build_tokenizer(control: Sequence[str] = CONTROL) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama 3's control tokens, trained on a few sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(vocab_size: int, **changes: object) -> LlamaConfig:
    """Two layers of Llama 3's shape, small enough to train in milliseconds."""
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 7,
        "initializer_range": 0.1,  # far enough from uniform for differences to show
    }
    return LlamaConfig(**(settings | changes))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny models. A folder of tests may have another `tokenizer`; the models keep this one."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return tiny_tokenizer


@pytest.fixture
def make_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """`make_model(seed=0, **config)` -> a random tiny Llama in fp32."""

    def make(seed: int = 0, **changes: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(len(tiny_tokenizer), **changes))

    return make


@pytest.fixture(scope="session")
def _tiny_model_source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(len(tiny_tokenizer))).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def tiny_model_dir(_tiny_model_source: Path, tmp_path: Path) -> Path:
    """A checkpoint directory of a random tiny Llama; the test may change its files."""
    return Path(shutil.copytree(_tiny_model_source, tmp_path / "tiny-model"))


@pytest.fixture
def random_samples() -> Callable[..., list[Tokens]]:
    """`random_samples(n, seed=0)` -> chats of random ids: a prompt, a trained answer, sometimes two turns."""

    def make(n: int, seed: int = 0, longest: int = 40) -> list[Tokens]:
        rng = np.random.default_rng(seed)
        samples = []
        for row in range(n):
            spans = [span([0], False)]
            for _ in range(int(rng.integers(1, 3))):
                spans.append(span(rng.integers(24, 300, int(rng.integers(1, longest))), False))
                spans.append(span(rng.integers(24, 300, int(rng.integers(1, longest // 2))), True))
            samples.append(Tokens(tuple(spans), (), "random.jsonl", row))
        return samples

    return make


@pytest.fixture
def chats_file(tmp_path: Path) -> Path:
    """22 chats as JSONL: answers of very different lengths, every third with two turns."""
    rng = np.random.default_rng(0)
    words = " ".join(SENTENCES).split()

    def say(count: int) -> str:
        return " ".join(rng.choice(words, count))

    lines = []
    for row in range(22):
        messages = []
        for _ in range(2 if row % 3 == 0 else 1):
            messages.append({"role": "user", "content": say(int(rng.integers(1, 12)))})
            messages.append({"role": "assistant", "content": say((1, 3, 17, 30)[row % 4])})
        lines.append(json.dumps({"messages": messages}) + "\n")
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(lines))
    return file


@pytest.fixture
def recipe_file(tiny_model_dir: Path, chats_file: Path, tmp_path: Path) -> Path:
    """A LoRA recipe on the tiny model and the chats: four steps of 8 chats (three an epoch), fp32, one thread."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"""
model: {{name_or_path: {tiny_model_dir}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{train: {chats_file}, chat_template: llama3, max_length: 512}}
train: {{output_dir: {tmp_path}/run, batch_size: 8, max_steps: 4, learning_rate: 5e-3, threads: 1}}
"""
    )
    return file
