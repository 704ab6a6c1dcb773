"""Invariant 8: what is saved reloads in a fresh process, with plain transformers and peft, and scores the same."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import recipe as recipes
from tuner.data.pack import pack
from tuner.model import adapter as adapter_module
from tuner.model.policy import Policy
from tuner.stages import prepare, sft
from tuner.types import Tokens, span

IDS = torch.randint(24, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
KINDS = {
    "lora": [],
    "rslora": ["adapter.use_rslora=true"],
    "dora": ["adapter.use_dora=true"],
    "pissa": ["adapter.init_lora_weights=pissa"],
    "saved-modules": ["adapter.modules_to_save=[embed_tokens, lm_head]"],
    "qlora": ["model.load_in_4bit=true"],
    "full": ["adapter=null"],
}

# What a user of the result would write. It must not need tuner.
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

request = json.loads(sys.stdin.read())
answers = {}
for name, path in request["results"].items():
    if path.endswith("model"):
        lm = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    else:
        options = {}
        if name.startswith("qlora"):
            four = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
            options = {"quantization_config": four}
        base = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32, **options)
        lm = PeftModel.from_pretrained(base, path)
    # On some CPUs bitsandbytes evaluates in bf16 whatever it was asked; no dropout is at work in training mode.
    lm.train(name.startswith("qlora"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([request["ids"]])
    with torch.no_grad():
        logps = lm(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    answers[name] = {
        "logps": logps.tolist(),
        "dtype": str(next(lm.parameters()).dtype),
        "attention": lm.config._attn_implementation,
        "stop": lm.generation_config.eos_token_id,
        "chat": chat,
    }
assert not any(name.partition(".")[0] == "tuner" for name in sys.modules)
print(json.dumps(answers))
"""


def train(recipe_file: Path, output: Path, extra: list[str], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs a recipe; the log-probabilities of IDS by the policy as it stood when training ended."""
    ended: list[Policy] = []
    load_model = prepare.load_model

    def load_and_keep(*args: Any) -> prepare.Model:
        model = load_model(*args)
        ended.append(model.policy)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_model", load_and_keep)
        sft.run(recipes.load(recipe_file, [f"train.output_dir={output}", *extra]))
    with torch.no_grad():
        logps = ended[-1].eval()(pack([Tokens((span(IDS, True),))]))
    return [float(x) for x in logps]


def fresh(base: Path, results: dict[str, Path], cwd: Path) -> dict[str, dict[str, Any]]:
    request = {"base": str(base), "ids": IDS, "results": {k: str(v) for k, v in results.items()}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(request), capture_output=True, text=True, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def assert_scores(name: str, mine: list[float], wanted: list[float]) -> None:
    assert len(mine) == len(wanted)
    worst = max(abs(a - b) for a, b in zip(mine, wanted, strict=True))
    assert worst <= 2e-5, f"{name}: log-probabilities differ by {worst:.2e}"


def test_results_reload_in_a_fresh_process(
    recipe_file: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, results = {}, {}
    for kind, extra in KINDS.items():
        wanted[kind] = train(recipe_file, tmp_path / kind, extra, monkeypatch)
        results[kind] = tmp_path / kind / ("model" if kind == "full" else "adapter")

    # mutants: adapters whose files say something else than what trained
    tensors = adapter_module.adapter_tensors

    def doubled(model: Any) -> Any:
        state, config = tensors(model)
        config.lora_alpha *= 2
        return state, config

    def headless(model: Any) -> Any:
        state, config = tensors(model)
        config.modules_to_save = None
        return {k: v for k, v in state.items() if "lora_" in k}, config

    mutants: dict[str, tuple[Callable[..., Any], str]] = {
        "mutant-scaling": (doubled, "lora"),
        "mutant-headless": (headless, "saved-modules"),
    }
    for name, (mutant, kind) in mutants.items():
        monkeypatch.setattr(adapter_module, "adapter_tensors", mutant)
        wanted[name] = train(recipe_file, tmp_path / name, KINDS[kind], monkeypatch)
        results[name] = tmp_path / name / "adapter"

    answers = fresh(tiny_model_dir, results, tmp_path)
    for kind in KINDS:
        assert_scores(kind, answers[kind]["logps"], wanted[kind])
        assert answers[kind]["chat"].startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>")
        assert answers[kind]["attention"] == "sdpa"
        assert math.isfinite(sum(wanted[kind]))
    assert answers["full"]["dtype"] == "torch.float32"
    assert answers["full"]["stop"] == [4, 1]  # <|eot_id|>, <|end_of_text|>
    assert wanted["lora"] != wanted["rslora"] != wanted["dora"]
    for name in mutants:
        with pytest.raises(AssertionError, match="log-probabilities differ"):
            assert_scores(name, answers[name]["logps"], wanted[name])
