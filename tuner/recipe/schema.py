"""The schema of a recipe (version 1): one frozen pydantic model a section, unknown keys refused.

Every field says what it means and in which unit; the JSON Schema for editors is made from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from tuner.limits import MOST_THREADS, MOST_TOKENS

Stage = Literal["sft", "reward", "dpo"]
# What each stage minimises where the recipe does not say.
DEFAULT_LOSSES = {"sft": "nll", "reward": "bradley_terry", "dpo": "sigmoid"}
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]

_DATA = Path(__file__).resolve().parents[1] / "data"


def _files(folder: str) -> tuple[str, ...]:
    """`auto`, and what the files of a folder of tuner/data are called: a file there is a format or a template.

    They are listed, not imported, so that a recipe is checked before torch could be loaded.
    """
    stems = sorted(p.stem for p in (_DATA / folder).glob("*.py") if not p.stem.startswith("_"))
    return ("auto", *(re.sub(r"(?<=\d)_(?=\d)", ".", stem) for stem in stems))


if TYPE_CHECKING:
    Format = str
    ChatTemplate = str
else:
    Format = Literal[_files("formats")]
    ChatTemplate = Literal[_files("templates")]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


def _as_tuple(value: Any) -> Any:
    """A list, or one value that stands for a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _target_modules(value: Any) -> Any:
    return value if value == "all-linear" else _as_tuple(value)


def _sources(value: Any) -> Any:
    """A path, a mapping or a list of either, as mappings; anything else is left for the type check to refuse."""
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _fraction_or_sources(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else _sources(value)


def _kind(value: Any) -> str:
    return "sources" if isinstance(value, list | tuple) else "fraction"


class Section(BaseModel):
    """Frozen, strict about types, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model, and how it is loaded."""

    name_or_path: Text = Field(description="Checkpoint directory, or Hub id `org/name`.")
    revision: Text | None = Field(None, description="Commit, tag or branch of a Hub id; recorded as a commit.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute dtype; auto: bfloat16 where the hardware has it natively, else float32."
    )
    attn_implementation: Literal[
        "auto", "tuner_varlen", "triton", "varlen", "flash_attention_2", "flash_attention_3", "sdpa", "eager"
    ] = Field(
        "auto",
        description="Attention. tuner_varlen runs everywhere; triton (ours), varlen (torch's) and flash_attention_* on "
        "GPUs; sdpa and eager mask the whole row. An explicit one never falls back.",
    )
    kernels: Literal["auto", "reference", "triton"] = Field(
        "auto", description="Backend of the fused operations; an explicit one never falls back."
    )
    load_in_4bit: bool = Field(False, description="Load the frozen base in 4 bits (QLoRA); needs an adapter section.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="The 4-bit number format.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the quantisation constants too.")


class AdapterSection(Section):
    """LoRA. A recipe without this section trains all weights."""

    path: Text | None = Field(None, description="An adapter directory or run to go on training.")
    r: Count = Field(16, description="Rank.")
    lora_alpha: float = Field(32, gt=0, description="Scale: the update is lora_alpha / r times BA.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input, as a probability.")
    target_modules: Annotated[
        Literal["all-linear"] | tuple[Text, ...],
        BeforeValidator(_target_modules, json_schema_input_type=Literal["all-linear"] | list[Text] | Text),
        Field(description="`all-linear` (all but the head), or names of modules such as q_proj."),
    ] = "all-linear"
    modules_to_save: Annotated[
        tuple[Text, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=list[Text] | Text),
        Field(description="Modules trained in full beside the adapter."),
    ] = ()
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (arXiv 2402.09353).")
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|pissa|pissa_niter_[1-9][0-9]*)$")] = Field(
        True, description="true: B = 0; or `gaussian`, `pissa`, `pissa_niter_N` (arXiv 2404.02948)."
    )


class DataSource(Section):
    """One file or Hub data set; what is not given here comes from the data section."""

    path: Text = Field(description="JSONL, JSON, CSV, TSV or parquet file, or Hub id `org/name`.")
    split: Text = Field("train", description="Split of a Hub data set.")
    weight: float = Field(1.0, gt=0, description="How often each of its rows is used: 2 twice, 0.5 a seeded half.")
    limit: Count | None = Field(None, description="Read only the first `limit` rows.")
    format: Format | None = Field(None, description="Shape of a row, if not that of data.format.")
    columns: dict[str, str] | None = Field(None, description="Column names, if not those of data.columns.")
    revision: Text | None = Field(None, description="Commit, tag or branch of a Hub id.")
    streaming: bool = Field(False, description="Read a Hub id row by row over the network, storing none of it.")


_SourcesInput = Text | DataSource | list[Text | DataSource]


class DataSection(Section):
    """Which rows are read, how they become tokens, and which tokens are trained."""

    train: Annotated[
        tuple[DataSource, ...],
        BeforeValidator(_sources, json_schema_input_type=_SourcesInput),
        Field(min_length=1, description="Training data: a path, a Hub id, or a list of sources."),
    ]
    eval: Annotated[
        Annotated[Annotated[tuple[DataSource, ...], Field(min_length=1)], Tag("sources")]
        | Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Tag("fraction")],
        Discriminator(_kind),
        BeforeValidator(_fraction_or_sources, json_schema_input_type=_SourcesInput | float | None),
        Field(description="Held-out data: as train, or the fraction of it to hold out by content hash."),
    ] = None
    format: Format = Field("auto", description="Shape of a row; auto looks at its keys.")
    columns: dict[str, str] = Field(default_factory=dict, description="Our column name -> the file's column name.")
    chat_template: ChatTemplate = Field(
        "auto", description="How messages become text; auto takes the tokenizer's own template."
    )
    date_string: Text | None = Field(
        None, description="The date that Llama 3.1 and later put into every chat; never today's."
    )
    template_options: dict[str, Any] = Field(default_factory=dict, description="Further options of the chat template.")
    control_tokens: dict[str, Text] = Field(
        default_factory=dict, description="A control token of the template -> the reserved token that stands for it."
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Trained tokens: all answers, the last answer, or every token (pretraining)."
    )
    ghost_attention: bool = Field(
        False, description="A system instruction holds through all turns: said once, and only the last answer trained."
    )
    train_control_tokens: bool = Field(
        True,
        description="Control tokens of the answers (terminators, tool tags) count in their log-probs; false leaves "
        "them out (arXiv 2407.21783, 4.1.4).",
    )
    parse_control_tokens: bool = Field(
        False, description="Read control tokens spelt in `text` rows as such: for pre-templated files you trust."
    )
    max_length: Annotated[int, Field(ge=2, le=MOST_TOKENS)] = Field(2048, description="Longest sequence, in tokens.")
    overlong: Literal["error", "drop", "truncate", "split"] = Field(
        "error", description="What becomes of a longer row; split is for text."
    )
    packing: bool = Field(True, description="Lay several documents in one row, each seeing only itself.")
    on_bad_row: Literal["error", "skip"] = Field("error", description="Stop at a bad row, or skip and count it.")
    cache: bool = Field(
        True,
        description="Keep the tokens of a source in ~/.cache/tuner (or the folder TUNER_CACHE), and use them again "
        "while nothing has changed.",
    )


class LossSection(BaseModel):
    """The loss by name, with its own parameters beside it; those are checked against the loss function."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    type: Text | None = Field(
        None, description="sft: nll; reward: bradley_terry, plackett_luce; dpo: sigmoid, ipo, ...; default: the first."
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The keys beside `type`, as given."""
        return dict(self.model_extra or {})


class ReferenceSection(Section):
    """What the policy is compared with (preference stages)."""

    model: Text = Field("auto", description="auto: the policy at its first step; or a checkpoint directory or Hub id.")
    cache: bool = Field(False, description="Work its log-probs out once, before the first step, and keep them on disk.")


class TrainSection(Section):
    """What one optimizer step is made of, and the optimizer."""

    output_dir: Text = Field(description="The run directory, relative to the current directory.")
    batch_size: Count = Field(64, description="Size of one optimizer step over all devices, in batch_unit.")
    batch_unit: Literal["examples", "tokens"] = Field("examples", description="What batch_size counts.")
    microbatch_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_TOKENS)] = Field(
        "auto", description="Tokens run through the model at once; bounds memory, never changes the result."
    )
    num_train_epochs: float = Field(1, gt=0, description="Passes over the training data.")
    max_steps: Count | None = Field(None, description="Optimizer steps; overrides num_train_epochs.")
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape after warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Warm-up as a fraction of all steps.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Warm-up in optimizer steps.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Final learning rate as a fraction of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 clips nothing.")
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw_torch", description="Optimizer; the 8-bit and paged ones come from bitsandbytes."
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Master weights of full fine-tuning; bfloat16 saves memory and loses small updates."
    )
    activation_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Make activations again in the backward rather than keep them, with the same result. selective: "
        "the norms and the MLP; true: all but a layer's input, the least memory and the slowest.",
    )
    on_nan: Literal["stop", "skip"] = Field("stop", description="At a non-finite loss or gradient: stop, or skip.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Of order, initialisation and dropout.")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_THREADS)] = Field(
        "auto", description="CPU threads a process."
    )


class EvalSection(Section):
    """What is measured on held-out data, before, during and after training."""

    steps: Count | None = Field(None, description="Evaluate every so many optimizer steps, not only at both ends.")
    questions: Text | None = Field(None, description="JSONL file of questions, answered greedily, and their answers.")
    metric: Literal["loss", "exact_match"] = Field("loss", description="What load_best and early stopping go by.")
    early_stopping_patience: Count | None = Field(
        None, description="Stop after this many evaluations without a better metric."
    )
    load_best: bool = Field(False, description="The result is the checkpoint with the best metric.")
    prompts: Annotated[int, Field(ge=0)] = Field(
        64, description="Held-out prompts that `tuner dpo` answers, for the KL to the reference and the lengths."
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Answers to show: wrong ones to eval.questions after training; with `tuner dpo` those to so many "
        "held-out prompts, before and after.",
    )


class GenerateSection(Section):
    """How answers are sampled."""

    max_new_tokens: Count = Field(256, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_k: Count | None = Field(None, description="Sample among the k likeliest tokens.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Sample among the likeliest tokens that together have this probability."
    )


class LogSection(Section):
    """What a run writes while it runs."""

    logging_steps: Count = Field(1, description="Optimizer steps between lines of metrics.jsonl.")
    save_steps: Count | None = Field(None, description="Optimizer steps between checkpoints; default: an epoch.")
    save_total_limit: Count = Field(2, description="Checkpoints kept.")
    save_weights_only: bool = Field(False, description="Checkpoints without optimizer state; they cannot resume.")
    report_to: Annotated[
        tuple[Tracker, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=list[Tracker] | Tracker),
        Field(description="Trackers that get the metrics too."),
    ] = ()


class Recipe(Section):
    """One run of one stage."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    stage: Stage | None = Field(None, description="If given, it must match the command.")
    model: ModelSection
    adapter: AdapterSection | None = Field(None, description="LoRA; without it all weights are trained.")
    data: DataSection
    loss: LossSection = LossSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection
    eval: EvalSection = EvalSection()
    generate: GenerateSection = GenerateSection()
    log: LogSection = LogSection()


class Scoring(Section):
    """What `tuner score` needs of a recipe, and takes from the command line where there is none."""

    model: ModelSection
    data: DataSection


# Section name -> its model, in the order of the recipe.
SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "adapter": AdapterSection,
    "data": DataSection,
    "loss": LossSection,
    "reference": ReferenceSection,
    "train": TrainSection,
    "eval": EvalSection,
    "generate": GenerateSection,
    "log": LogSection,
}
