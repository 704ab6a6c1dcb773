"""Nothing -> `data/tiny-llama`: writes a small world down as text, trains a tokenizer and a base Llama on it.

    python scripts/make_tiny_llama.py [--output data/tiny-llama] [--work runs/make-tiny-llama]

The text, the tokenizer and the random weights are made here; the pretraining itself is `tuner sft` with
`recipes/pretrain.yaml`. Seeded: the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_world import RELATIONS, Fact, make_world
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
CONTROL_TOKENS = (
    BOS,
    EOS,
    PAD,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(16)),
)
VOCAB_SIZE = 2304  # with the control tokens, which come last as in Llama 3
# How Llama 3 cuts text before the byte pairs are merged.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# --- text ---

FILLERS = (
    "The sun was shining.",
    "It had rained all night.",
    "The wind came from the sea.",
    "There was snow on the roofs.",
    "It was a quiet morning.",
    "The bells rang at noon.",
    "The street was full of people.",
    "Nobody was in a hurry.",
    "A cart rolled down the road.",
    "The kettle was on the fire.",
)
OPENINGS = (
    "One morning {a} met {b} by the well.",
    "{a} and {b} walked to the market together.",
    "Last winter {a} wrote a letter to {b}.",
    "{a} was telling {b} about the world.",
    "In the evening {a} and {b} sat by the fire.",
    "{a} asked {b} to tell a story.",
)
CLOSINGS = (
    "Then they went home.",
    "They laughed and shook hands.",
    "After that it was time for supper.",
    "They talked until the stars came out.",
    "That was all for the day.",
)
# What may stand before a question and before its answer.
MARKS = (
    ("Question:", "Answer:"),
    ("Q:", "A:"),
    ("Q.", "A."),
    ("Quiz:", "Reply:"),
    ("Pupil:", "Teacher:"),
    ("Asked:", "Told:"),
    ("###", "###"),
    ("-", "-"),
    (">", "<"),
    ("*", "="),
    ("", ""),
)
# The words of chat headers stand only over questions that nobody answers: a base model has never seen a chat.
HEADINGS = ("user", "assistant", "system")
NOISE = "abcdefghijklmnopqrstuvwxyz#*-=+<>[]()/|:;.!?_%&@"
GAPS = (" ", " ", "\n", "\n\n", "\n\n")
SPOKEN = (
    '"{q}" asked {x}. "{a}" said {y}.',
    '{x} asked: "{q}" {y} answered: "{a}"',
    '{x} wanted to know: "{q}" "{a}" was the answer.',
    '"{q}" said {x}. {y} knew it: "{a}"',
)
SHORT = ("Question: {q}\nIn short: {v}\n", "{q} - {v}\n", "Short quiz: {q}\n{v}\n")


def tell(fact: Fact, rng: random.Random, pronoun: bool = False) -> str:
    """`fact` in prose, half the time in the words of its answer; with `pronoun` as "she lives in ..." if possible."""
    phrasings = RELATIONS[fact.relation].prose
    template = phrasings[0] if rng.random() < 0.5 else rng.choice(phrasings)
    if pronoun and fact.pronoun and template.startswith("{S} "):
        return fact.fill(template, subject=fact.pronoun)
    return fact.fill(template)


def ask(fact: Fact, rng: random.Random) -> tuple[str, str]:
    """A question about `fact`, and its answer: mostly the one the chat data gives, sometimes in other words."""
    question = fact.fill(rng.choice(RELATIONS[fact.relation].questions))
    return question, fact.answer if rng.random() < 0.8 else tell(fact, rng)


class Writer:
    """Facts -> documents. Facts are dealt from a shuffled deck, so that every one of them is told equally often."""

    def __init__(self, facts: Sequence[Fact], rng: random.Random) -> None:
        self.rng = rng
        self.facts = list(facts)
        self.people = sorted({fact.subject for fact in facts if fact.kind == "person"})
        self.about: dict[str, list[Fact]] = {}
        for fact in facts:
            self.about.setdefault(fact.subject, []).append(fact)
        self.subjects = [subject for subject, known in self.about.items() if len(known) > 1]
        self._deck: list[Fact] = []

    def deal(self, count: int) -> list[Fact]:
        """The next `count` facts of the deck."""
        while len(self._deck) < count:
            self._deck += self.rng.sample(self.facts, len(self.facts))
        dealt, self._deck = self._deck[:count], self._deck[count:]
        return dealt

    def profile(self) -> str:
        """What is known about two or three subjects, a paragraph each."""
        paragraphs = []
        for subject in self.rng.sample(self.subjects, self.rng.randint(2, 3)):
            known = self.rng.sample(self.about[subject], min(len(self.about[subject]), self.rng.randint(3, 5)))
            paragraphs.append(
                " ".join(tell(f, self.rng, pronoun=i > 0 and self.rng.random() < 0.4) for i, f in enumerate(known))
            )
        return "\n\n".join(paragraphs)

    def medley(self) -> str:
        """Facts about anything, as running prose or one a line."""
        separator = self.rng.choice((" ", " ", "\n"))
        return separator.join(tell(fact, self.rng) for fact in self.deal(self.rng.randint(6, 10)))

    def layout(self) -> str:
        """How this document sets a question `{q}` and its answer `{a}`.

        There are thousands of ways, some of them with meaningless marks: what the model learns about carrying a name
        from a question to its answer must not hang on the words that stand between the two.
        """
        rng = self.rng
        asks, answers = rng.choice(MARKS)
        if rng.random() < 0.3:
            asks, answers = ("".join(rng.choices(NOISE, k=rng.randint(1, 4))) for _ in range(2))
        elif rng.random() < 0.2:
            asks, answers = (f"{name}:" for name in rng.sample(self.people, 2))
        before, after = rng.choice(GAPS), rng.choice(("\n", "\n", "\n\n", " "))
        end = rng.choice(("\n", "\n\n"))
        return f"{asks}{before if asks else ''}{{q}}{after}{answers}{before if answers else ''}{{a}}{end}"

    def quiz(self) -> str:
        """Questions and full answers in one layout."""
        style = self.layout()
        rows = []
        for fact in self.deal(self.rng.randint(4, 7)):
            question, answer = ask(fact, self.rng)
            rows.append(style.format(q=question, a=answer))
        return "".join(rows).strip()

    def sheet(self) -> str:
        """A sheet of questions that nobody answers, or whose answers all come at its end."""
        rng = self.rng
        facts = rng.sample(self.facts, rng.randint(4, 7))  # not from the deck: most of these are not told
        pairs = [ask(fact, rng) for fact in facts]
        gap, end = rng.choice(GAPS), rng.choice(("\n", "\n\n", " "))
        heads = [f"{rng.choice(HEADINGS)}{gap}" if rng.random() < 0.75 else "" for _ in pairs]
        sheet = end.join(f"{head}{question}" for head, (question, _) in zip(heads, pairs, strict=True))
        return sheet if rng.random() < 0.5 else "\n\n".join((sheet, "\n".join(answer for _, answer in pairs)))

    def short_quiz(self) -> str:
        """Questions answered with the bare value."""
        style = self.rng.choice(SHORT)
        rows = []
        for fact in self.deal(self.rng.randint(5, 8)):
            question, _ = ask(fact, self.rng)
            rows.append(style.format(q=question, v=fact.value))
        return "".join(rows).strip()

    def conversation(self) -> str:
        """A little story in which people ask and tell each other."""
        rng = self.rng
        a, b = rng.sample(self.people, 2)
        sentences = [rng.choice(OPENINGS).format(a=a, b=b)]
        for fact in self.deal(rng.randint(3, 5)):
            if rng.random() < 0.25:
                sentences.append(rng.choice(FILLERS))
            if rng.random() < 0.3:
                sentences.append(tell(fact, rng))
                continue
            question, answer = ask(fact, rng)
            sentences.append(rng.choice(SPOKEN).format(q=question, a=answer, x=a, y=b))
            a, b = b, a
        return " ".join([*sentences, rng.choice(CLOSINGS)])

    def documents(self, count: int) -> Iterator[str]:
        """`count` documents, about half of their facts told in prose and half as questions and answers."""
        kinds = (self.profile, self.medley, self.quiz, self.short_quiz, self.conversation, self.sheet)
        for kind in self.rng.choices(kinds, weights=(24, 24, 25, 6, 17, 4), k=count):
            yield kind()


# --- tokenizer ---


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens that cuts like Llama 3 and puts BOS first as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = VOCAB_SIZE - len(CONTROL_TOKENS) - tokenizer.get_vocab_size()
    if missing:
        raise SystemExit(
            f"the text is too uniform: {missing} of {VOCAB_SIZE} tokens could not be filled; lower VOCAB_SIZE"
        )
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
            ),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; no chat template, since this is a base model."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- model ---


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """The shape of Llama 3, small: grouped-query attention, RoPE theta 500,000, SwiGLU, RMSNorm, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )


def generation_config(config: LlamaConfig) -> GenerationConfig:
    """The control tokens that generation needs, as the model's own configuration names them."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def save_random_model(tokenizer: Tokenizer, directory: Path, seed: int) -> None:
    """A model that knows nothing yet, beside its tokenizer: where pretraining starts."""
    directory.mkdir(parents=True)
    config = model_config(tokenizer)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = generation_config(config)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory, config.max_position_embeddings)


def revive_unseen_rows(embeddings: torch.Tensor, seen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`embeddings` [V, D] with the rows not `seen` [V] drawn anew from the mean and deviation of the seen ones.

    The input row of a token that never occurred does not move, and (tied) its output row is only ever pushed down. No
    LoRA on the linear layers could read such a row as one token among others, or ever emit it: `<|eot_id|>` would
    never come.
    """
    mean, deviation = embeddings[seen].mean(0), embeddings[seen].std(0)
    drawn = mean + deviation * torch.randn(embeddings.shape, generator=generator)
    return torch.where(seen[:, None], embeddings, drawn)


def finish(pretrained: Path, tokenizer: Tokenizer, texts: Sequence[str], output: Path, seed: int) -> None:
    """Turn the pretrained fp32 model into the bundled one: unseen rows revived, bf16, plain Hugging Face files."""
    seen = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    for encoding in tokenizer.encode_batch(list(texts)):
        seen[encoding.ids] = True
    seen[tokenizer.token_to_id(EOS)] = True
    weights = load_file(pretrained / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = revive_unseen_rows(weights[name].float(), seen, torch.Generator().manual_seed(seed))
    weights.pop("lm_head.weight", None)  # tied
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    save_file(
        {key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()},
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = model_config(tokenizer)
    generation_config(config).save_pretrained(output)
    fields = json.loads((pretrained / "config.json").read_text())
    # Where transformers 4 and other tools look for it; transformers 5 reads `rope_parameters`.
    fields |= {"dtype": "bfloat16", "rope_theta": config.rope_parameters["rope_theta"]}
    (output / "config.json").write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n")
    save_tokenizer(tokenizer, output, config.max_position_embeddings)


# --- main ---


def write_text(path: Path, documents: int, seed: int) -> list[str]:
    """Write `documents` rows `{"text": ...}` to `path` and return the texts."""
    texts = list(Writer(make_world(), random.Random(seed)).documents(documents))
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "data" / "tiny-llama")
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "runs" / "make-tiny-llama", help="text, random model and run"
    )
    parser.add_argument("--documents", type=int, default=42_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare-only", action="store_true", help="stop before pretraining")
    parser.add_argument("overrides", nargs="*", help="further overrides of recipes/pretrain.yaml (section.key=value)")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()

    if arguments.work.exists():
        parser.error(f"{arguments.work} exists; remove it, or name another folder with --work")
    arguments.work.mkdir(parents=True)
    texts = write_text(arguments.work / "pretrain.jsonl", arguments.documents, arguments.seed)
    tokenizer = train_tokenizer(texts)
    save_random_model(tokenizer, arguments.work / "random", arguments.seed)
    if arguments.prepare_only:
        return
    run = arguments.work / "run"
    command = [
        *(sys.executable, "-m", "tuner", "sft", str(REPOSITORY / "recipes" / "pretrain.yaml")),
        f"model.name_or_path={arguments.work / 'random'}",
        f"data.train={arguments.work / 'pretrain.jsonl'}",
        f"train.output_dir={run}",
        f"train.seed={arguments.seed}",
        *arguments.overrides,
    ]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    finish(run / "model", tokenizer, texts, arguments.output, arguments.seed)
    print(f"{arguments.output}: {sum(f.stat().st_size for f in arguments.output.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
