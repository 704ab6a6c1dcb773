"""A prepared stage -> a finished run: resume, steps, evaluations, checkpoints, signals, the result.

Everything here is the same for every stage; a stage brings its samples, its loss and how its result is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tuner import recipe as recipes
from tuner.checkpoint import Checkpoint, RunDir, damage, flatten_state, rng_state, set_rng_state, unflatten_state
from tuner.data.pack import bins
from tuner.data.plan import Plan
from tuner.data.render import Renderer
from tuner.data.store import TokenStore
from tuner.errors import Interrupted, RunDirError
from tuner.evaluate import Question, QuestionReport, answer_questions
from tuner.model.backbone import Backbone
from tuner.model.load import padding_id
from tuner.model.policy import Policy
from tuner.recipe import GenerateSection, Recipe
from tuner.train.answers import Answers
from tuner.train.loop import LAG, Loop, Progress, Signals, StepReport, evaluate_loss
from tuner.train.metrics import Metrics, start_trackers
from tuner.train.optim import build_optimizer, parameter_groups, schedule
from tuner.train.phases import Phases
from tuner.train.setup import Devices, wrap
from tuner.train.stage import Stage
from tuner.types import Tokens

GREEDY = GenerateSection(temperature=0.0)  # a question has one right answer
OPTIMIZER_BYTES = 8  # AdamW keeps two fp32 moments a parameter
ASK_EVERY = 8  # steps after which ranks that do not wait for their devices ask each other about signals


@dataclass
class Session:
    """One run of one stage, ready to train."""

    recipe: Recipe  # with every automatic value decided
    devices: Devices
    phases: Phases
    run: RunDir | None  # the main rank's; None on the others
    policy: Backbone
    stage: Stage
    samples: Sequence[Tokens]
    plan: Plan
    held_out: Sequence[Tokens]
    questions: Sequence[Question]
    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    save_result: Callable[[RunDir], Path]
    console: Console
    answers: Answers | None = None  # to held-out prompts, of a preference stage

    def __post_init__(self) -> None:
        train = self.recipe.train
        self.progress = Progress()
        self.loop = Loop(
            policy=self.policy,
            module=wrap(self.policy, self.devices),
            optimizer=build_optimizer(self.policy, train, self.devices.device),
            schedule=schedule(train, self.plan.num_steps),
            stage=self.stage,
            samples=self.samples,
            plan=self.plan,
            devices=self.devices,
            max_grad_norm=train.max_grad_norm,
            on_nan=train.on_nan,
            lag=LAG[self.devices.device.type],
            ahead=LAG[self.devices.device.type] > 0,
        )
        self.signals = Signals()
        self._saved_step = self._due_step = -1

    # --- the run ---

    def train(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Trains from the start or from `checkpoint`, saves the result and returns the summary of the run.

        Raises:
            Interrupted: SIGTERM or SIGINT; a checkpoint of the last finished step was published.
            NonFiniteError, SaveError, OutOfMemoryError: the run failed; what was published is intact.
        """
        trackers = start_trackers(
            self.recipe.log.report_to if self.devices.is_main else (),
            Path(self.recipe.train.output_dir).name,
            self.recipe.train.output_dir,
            recipes.flatten(self.recipe),
        )
        self.metrics = Metrics(
            append=self.run.append_metrics if self.run else lambda row: None,
            trackers=trackers,
            device=self.devices.device,
            num_steps=self.plan.num_steps,
            every=self.recipe.log.logging_steps,
            console=self.console,
        )
        with self.signals:
            try:
                if checkpoint is not None:
                    self._restore(checkpoint)
                self._record_setup()
                self._train()
                return self._finish()
            finally:
                self.metrics.close()

    def _train(self) -> None:
        if not self.progress.history.get("before"):
            self.phases.begin("evaluation before")
            self.progress.history["before"] = self._evaluate("before")
            if self.answers and self.answers.shown:
                self.progress.history["answers"] = self.answers.greedy()
        self.phases.begin("training")
        self._stop_if_told()
        self.metrics.start(self.progress.step)
        if self._measure(self.progress.step):  # which a signal may have cut short, or which may have ended the run
            self.loop.run(self.progress, self._after_step, self._due)
        self.metrics.stop()

    def _due(self, step: int) -> bool:
        """Whether something is to be done with the weights of `step`: save them, evaluate them, or stop there."""
        every, asks = self.recipe.eval.steps, self.devices.world_size == 1 or not self.loop.lag or step % ASK_EVERY == 0
        told = self.devices.agree(self.signals.received) if asks else 0
        if told or self._saves(step) or (every and step % every == 0):
            self._due_step = step
        return self._due_step == step

    def _saves(self, step: int) -> bool:
        return step % (self.recipe.log.save_steps or self.plan.steps_per_epoch) == 0 or step == self.plan.num_steps

    def _after_step(self, progress: Progress, report: StepReport) -> bool:
        step = progress.step
        self.metrics.step(step, report)
        if step != self._due_step:
            return True
        go_on = self._measure(step)
        self._stop_if_told()
        if self._saves(step) or not go_on:
            with self.phases.during("saving"):
                self._publish()
        return go_on

    def _measure(self, step: int) -> bool:
        """The evaluation due after `step`, once (that of the last step is `_finish`'s); False: patience has run out."""
        every, progress = self.recipe.eval.steps, self.progress
        if every and 0 < step < self.plan.num_steps and step % every == 0 and progress.evaluated_step < step:
            with self.phases.during("evaluation between"):
                values = self._evaluate(f"step {step}")
            progress.evaluated_step = step
            self._judge(values)
        patience = self.recipe.eval.early_stopping_patience
        if patience is None or progress.stale < patience:
            return True
        self.console.print(f"stopped  {progress.stale} evaluations without a better {self.recipe.eval.metric}")
        return False

    def _finish(self) -> dict[str, Any]:
        self.phases.begin("evaluation after")
        after = self._evaluate("after")
        self._judge(after)
        said = self.answers.greedy() if self.answers and self.answers.shown else ()  # by the weights just evaluated
        if self.recipe.eval.load_best and self.progress.best_step not in (0, self.progress.step):
            self._load_best()
        summary = {
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "trained_tokens": self.progress.trained_tokens,
            "skipped_steps": self.progress.skipped_steps,
            "before": self.progress.history["before"],
            "after": after,
            "best_step": self.progress.best_step,
        }
        if self.answers and self.answers.shown:
            before = self.progress.history.get("answers", ())
            summary["answers"] = self.answers.beside(before, said)
        self.phases.begin("saving")
        if self.run:
            self._publish()
            summary["result"] = self.save_result(self.run).name
            self.run.record(seconds=self.phases.seconds())
            self.run.finish(summary)
        self.devices.barrier()
        return summary

    # --- evaluation ---

    def _evaluate(self, when: str) -> dict[str, float]:
        """Held-out loss and exact match, printed and logged; what the recipe does not ask for is left out."""
        values: dict[str, float] = {}
        if self.held_out:
            capacity = self.recipe.train.microbatch_tokens
            assert isinstance(capacity, int)
            microbatches = bins(TokenStore.of(self.held_out).lengths.tolist(), capacity)
            losses = evaluate_loss(
                self.policy, self.stage, self.held_out, microbatches, self.devices, lambda: not self.signals.received
            )
            if losses is None:
                self._stop_if_told()
                return values
            values["eval_loss"] = sum(losses[term] for term in self.stage.terms)
            values |= {f"eval_{name}": value for name, value in losses.items() if name not in self.stage.terms}
        if self.answers:
            values |= {f"eval_{name}": value for name, value in self.answers.measure().items()}
        if self.questions:
            report = self._ask()
            values |= {"exact_match": report.exact_match, "stopped": report.stopped / report.total}
            for answer in report.wrong[: self.recipe.eval.samples] if when == "after" else ():
                asked = answer.question.messages[-1].content
                self.console.print(f"  asked {asked!r}\n  said  {answer.text!r}\n  right {answer.question.answer!r}")
        if values:
            parts = [f"held-out loss {values['eval_loss']:.4f}"] if "eval_loss" in values else []
            parts += [f"accuracy {values['eval_accuracy']:.1%}"] if "eval_accuracy" in values else []
            parts += [f"{values['eval_token_accuracy']:.1%} of tokens right"] if "eval_token_accuracy" in values else []
            parts += [f"KL to the reference {values['eval_kl']:.3f}"] if "eval_kl" in values else []
            parts += [f"held-out questions: {report}"] if self.questions else []
            self.console.print(f"{when:<9}{'; '.join(parts)}")
            self.metrics.note(self.progress.step, values)
        return values

    def _ask(self) -> QuestionReport:
        """Every rank answers its share, and all learn how many of all were right; `wrong` is of this rank's share."""
        assert isinstance(self.policy, Policy), "a reward model writes no text"
        mine, devices = self.questions[self.devices.rank :: self.devices.world_size], self.devices
        report = QuestionReport(0, 0, 0, ())
        if mine:
            with self.policy.generation_mode() as lm:
                report = answer_questions(
                    lm,
                    self.renderer,
                    self.tokenizer,
                    mine,
                    settings=GREEDY.model_copy(update={"max_new_tokens": self.recipe.generate.max_new_tokens}),
                    pad_id=padding_id(self.tokenizer),
                    seed=self.recipe.train.seed,
                )
        counts = torch.tensor([report.correct, report.total, report.stopped], device=devices.device)
        correct, total, stopped = (int(count) for count in devices.sum(counts).tolist())
        return QuestionReport(correct, total, stopped, report.wrong)

    def _judge(self, values: dict[str, float]) -> None:
        """Notes whether this is the best evaluation so far."""
        metric = self.recipe.eval.metric
        value = values.get("eval_loss" if metric == "loss" else metric)
        if value is None:
            return
        # A NaN compares false with everything and would freeze the best; it counts as an evaluation without progress.
        better = self.progress.best is None or (
            value < self.progress.best if metric == "loss" else value > self.progress.best
        )
        if better and math.isfinite(value):
            self.progress.best, self.progress.best_step, self.progress.stale = value, self.progress.step, 0
            if self.recipe.eval.load_best:
                self._publish()
        else:
            self.progress.stale += 1

    # --- signals and checkpoints ---

    def _stop_if_told(self) -> None:
        signum = self.devices.agree(self.signals.received)
        if not signum:
            return
        self.metrics.stop()
        if self.progress.step > 0:
            self._publish()
        directory = self.recipe.train.output_dir
        at = (
            f"step {self.progress.step} of {self.plan.num_steps} is saved" if self.progress.step else "no step was done"
        )
        raise Interrupted(signum, f"stopped by a signal; {at} in {directory}", "continue with --resume")

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def _publish(self) -> None:
        if self._saved_step == self.progress.step:
            return
        self._saved_step = self.progress.step
        generators = self.devices.gather(rng_state())  # every rank draws its own dropout
        if self.run is None:
            return
        self.progress.history |= {"window": self.metrics.window(), "skips_in_a_row": self.loop.skips_in_a_row}
        state: dict[str, Any] = {"progress": self.progress.as_dict(), "plan": self.plan.fingerprint()}
        tensors = {"weights": {k: p.detach() for k, p in self.trainable().items()}}
        for rank, (rng_tensors, rng) in enumerate(generators):
            tensors[f"rng_{rank}"], state[f"rng_{rank}"] = rng_tensors, rng
        if not self.recipe.log.save_weights_only:
            tensors["optimizer"], state["optimizer"] = flatten_state(self.loop.optimizer.state_dict())
        keep = {self.progress.best_step} if self.recipe.eval.load_best and self.progress.best_step else set()
        self.run.publish(
            self.progress.step, tensors, state, save_total_limit=self.recipe.log.save_total_limit, keep=keep
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.load()
        if "optimizer" not in tensors:
            raise RunDirError(
                f"{checkpoint.path} holds weights only (log.save_weights_only), so the run cannot be resumed; start "
                "anew with --overwrite"
            )
        self._load_weights(tensors["weights"], checkpoint.path)
        self.loop.optimizer.load_state_dict(unflatten_state(tensors["optimizer"], state["optimizer"]))
        self.progress = Progress(**state["progress"])
        self.metrics.restore(self.progress.history.pop("window", []))
        self.loop.skips_in_a_row = self.progress.history.pop("skips_in_a_row", 0)
        name = f"rng_{self.devices.rank}"
        if name in state:  # else the run goes on with more ranks than it was saved with, and theirs start anew
            set_rng_state(tensors[name], state[name])
        self._saved_step = checkpoint.step
        if self.run:
            self.run.rewind(checkpoint.step)
        self.console.print(f"resumed  from step {checkpoint.step} of {self.plan.num_steps}")

    def _load_weights(self, weights: dict[str, Tensor], place: Path) -> None:
        own = self.trainable()
        if own.keys() != weights.keys():
            odd = sorted(own.keys() ^ weights.keys())[0]
            raise RunDirError(f"{place} does not fit this model: '{odd}' is in only one of the two")
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                shapes = f"{list(weights[name].shape)} there and {list(parameter.shape)} here"
                raise RunDirError(f"{place} does not fit this model: '{name}' is {shapes}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def _load_best(self) -> None:
        best = self.progress.best_step
        path = Path(self.recipe.train.output_dir).absolute() / "checkpoints" / f"step-{best:06d}"
        self._publish()  # the last step stays resumable
        if problem := damage(path, resumable=False):
            raise RunDirError(f"eval.load_best: the checkpoint of step {best} cannot be loaded: {problem}")
        tensors, _ = Checkpoint(path, best).load()
        self._load_weights(tensors["weights"], path)
        self.console.print(f"best     step {best} ({self.recipe.eval.metric} {self.progress.best:.4f}) is the result")

    # --- what the manifest says ---

    def _record_setup(self) -> None:
        if self.run is None:
            return
        own = self.trainable()
        numel = sum(p.numel() for p in own.values())
        width = sum(p.numel() * p.element_size() for p in own.values())
        self.run.check_space(width + OPTIMIZER_BYTES * numel)
        _, groups = parameter_groups(self.policy, self.recipe.train.weight_decay)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in own.values()})
        self.run.record(
            trainable={"parameters": numel, "tensors": len(own), "dtypes": dtypes},
            parameter_groups={k: len(v) for k, v in groups.items()},
            plan={"steps": self.plan.num_steps, "steps_per_epoch": self.plan.steps_per_epoch},
            world_size=self.devices.world_size,
        )
