"""A recipe's data -> what is wrong with it, row by row, and the numbers that training would have.

Every row is read, parsed and rendered as training would do it, except that nothing stops at a bad row: all of them are
findings. Rows are compared by hashes, so memory grows by a small number of bytes a row, never by its text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, get_args

import numpy as np

from tuner.data.check import similar
from tuner.data.check.content import NO_SCRIPT, SCRIPTS
from tuner.data.check.findings import BAD_ROWS, MIN_ROWS, Findings, Severity
from tuner.data.check.report import CheckReport, LengthBias, Side, Source, Steps
from tuner.data.check.scan import Ledger, Scanner, shingles_of
from tuner.data.fit import Fit
from tuner.data.formats import Kind
from tuner.data.plan import Plan
from tuner.data.report import listed, place
from tuner.data.stream import choose_template, held_out, make_renderer, sampled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tuner.recipe import DataSection, TrainSection

LONGEST = 1 << 20  # tokens; a longer row is told as that, not measured
FAR = 6.0  # standard deviations of the logarithm of the length, taken from its median absolute deviation
FAR_TIMES = 4.0  # and at least so many times the median
MAX_VERIFIED = 5_000  # eval rows whose near-duplicates are verified; each holds some kilobytes meanwhile


def check(
    data: DataSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerFast,
    *,
    microbatch_tokens: int,
    world_size: int = 1,
    accepts: Collection[str] = get_args(Kind),
    fit: Fit | None = None,
) -> CheckReport:
    """Reads all of data.train and data.eval and reports what is there.

    Args:
        microbatch_tokens: train.microbatch_tokens, resolved for this machine.
        world_size: processes that would share a step.
        accepts: the kinds of rows that the stage can use.
        fit: what its loss reads of each of them.

    Raises:
        DataError: a source cannot be read at all, or none of its rows has a known format.
        RecipeError, ModelError: as in training.
    """
    overlong = "drop" if data.overlong == "error" else data.overlong
    lenient = data.model_copy(update={"on_bad_row": "skip", "overlong": overlong})
    template = choose_template(data.train, lenient, tokenizer)
    uncut = {"max_length": max(data.max_length, LONGEST), "overlong": "drop"}
    whole = make_renderer(lenient.model_copy(update=uncut), tokenizer, template)
    findings = Findings(_severities(data))
    scanner = Scanner(
        lenient,
        whole,
        make_renderer(lenient, tokenizer, template),
        findings,
        accepts,
        fit,
        near=data.eval is not None,
        digests=isinstance(data.eval, float),
    )
    ledger = scanner.scan(data.train)
    other = scanner.scan(data.eval) if isinstance(data.eval, tuple) else None
    ledgers = [ledger] if other is None else [ledger, other]
    for one in ledgers:
        _repeated(one, findings)
        _far_longer(one, findings)
        _unread(one, findings)
        _margins(one, findings)
    _labels(ledger, findings)
    _scripts(ledgers, findings)
    bias = _length_bias(ledgers, findings)
    samples = _weighted(ledger, train.seed)
    if other is not None:
        held = _weighted(other, train.seed)
        _overlap(ledger, np.arange(len(ledger.row)), other, np.arange(len(other.row)), lenient, findings)
        evaluation = _side(other, held)
    elif isinstance(data.eval, float):
        samples, held = _held_out(ledger, samples, data.eval)
        owners = ledger.column("owner")
        rows = np.unique(owners[held])
        _overlap(ledger, np.setdiff1d(np.unique(owners[samples]), rows), ledger, rows, lenient, findings)
        evaluation = _side(ledger, held)
    else:
        evaluation = None
    training = _side(ledger, samples)
    _stops_training(ledger, len(samples), findings)
    return CheckReport(
        findings=findings.all(),
        train=training,
        eval=evaluation,
        steps=_steps(training.lengths, data, train, microbatch_tokens, world_size),
        bias=bias,
        template=template.name if template else "none (raw text)",
        train_on=data.train_on,
    )


def _stops_training(ledger: Ledger, samples: int, findings: Findings) -> None:
    """What ends a run although no single row does."""
    if not samples:
        findings.get("nothing_left").count = sum(ledger.rows_read)
    elif ledger.chats and not ledger.some_end:
        findings.get("terminator_missing").severity = "error"


def _severities(data: DataSection) -> dict[str, Severity]:
    """What a finding comes to under the policies of this recipe."""
    out: dict[str, Severity] = {}
    if data.on_bad_row == "skip":
        out |= dict.fromkeys(BAD_ROWS, "warning")
    policies: dict[str, Severity] = {"error": "error", "drop": "warning", "truncate": "warning", "split": "note"}
    return out | {"too_long": policies[data.overlong]}


# -- rows against rows -------------------------------------------------------------------------------------------------


def _repeated(ledger: Ledger, findings: Findings) -> None:
    keys = ledger.column("key")
    first = similar.equal_to(keys, keys)
    for i in np.flatnonzero(first != np.arange(len(keys))).tolist():
        findings.add("repeated", *ledger.where(i), detail=_as(ledger, first[i], ledger, i))


def _overlap(
    ledger: Ledger, rows: np.ndarray, other: Ledger, held: np.ndarray, data: DataSection, findings: Findings
) -> None:
    """Rows `held` of `other` against `rows` of `ledger`."""
    equal = similar.equal_to(other.column("key")[held], ledger.column("key")[rows])
    for i in np.flatnonzero(equal >= 0).tolist():
        findings.add("overlap", *other.where(int(held[i])), detail=_as(ledger, rows[equal[i]], other, held[i]))
    left = held[equal < 0]
    prompts = other.column("prompt")[left]
    same = np.where(prompts == 0, -1, similar.equal_to(prompts, ledger.column("prompt")[rows]))
    for i in np.flatnonzero(same >= 0).tolist():
        findings.add("overlap_prompt", *other.where(int(left[i])), detail=_as(ledger, rows[same[i]], other, left[i]))
    found = similar.candidates(other.band_matrix()[left], ledger.band_matrix()[rows])
    pairs = {int(left[i]): [int(rows[j]) for j in near] for i, near in list(found.items())[:MAX_VERIFIED]}
    texts = shingles_of(other, data, pairs)
    training = shingles_of(ledger, data, {j for near in pairs.values() for j in near})
    for i, near in pairs.items():
        likeness, j = max((similar.jaccard(texts[i], training[j]), j) for j in near)
        if likeness >= similar.THRESHOLD:
            said = f"{_as(ledger, j, other, i)}, {100 * likeness:.0f}% alike"
            findings.add("overlap_near", *other.where(i), detail=said)
    if len(found) > len(pairs) and (near_ones := findings.get("overlap_near")).count:
        near_ones.detail = f"among the first {len(pairs):,} of {len(found):,} that may be"


def _as(ledger: Ledger, index: int | np.integer, other: Ledger, row: int | np.integer) -> str:
    """`as line 3` of a row of `ledger`, seen from a row of `other`: the file is named where it is another one."""
    source, number = ledger.where(int(index))
    where = place(source, number)
    return f"as {where.removeprefix(f'{source} ') if other.where(int(row))[0] == source else where}"


# -- rows against all --------------------------------------------------------------------------------------------------


def _far_longer(ledger: Ledger, findings: Findings) -> None:
    lengths = ledger.column("length")
    usable = lengths[lengths > 0]
    if len(usable) < MIN_ROWS:
        return
    logs = np.log(usable)
    middle = float(np.median(logs))
    spread = 1.4826 * float(np.median(np.abs(logs - middle)))  # as the standard deviation of a normal distribution
    limit = max(np.exp(middle + FAR * spread), FAR_TIMES * np.exp(middle))
    for i in np.flatnonzero(lengths > limit).tolist():
        findings.add("far_longer", *ledger.where(i), detail=f"{lengths[i]:,} tokens")
    if (found := findings.get("far_longer")).count and not found.detail:
        found.detail = f"the median has {np.exp(middle):,.0f} tokens"


def _scripts(ledgers: list[Ledger], findings: Findings) -> None:
    counts = np.sum([np.bincount(one.column("script"), minlength=NO_SCRIPT + 1) for one in ledgers], axis=0)[:NO_SCRIPT]
    main = int(counts.argmax())
    for ledger in ledgers:
        numbers = ledger.column("script")
        for i in np.flatnonzero((numbers != main) & (numbers != NO_SCRIPT)).tolist():
            findings.add("script", *ledger.where(i), detail=SCRIPTS[numbers[i]])
    found = findings.get("script")
    found.detail = f"which is {SCRIPTS[main]}"


def _margins(ledger: Ledger, findings: Findings) -> None:
    kinds = ledger.column("pair")
    if (kinds == 2).any():
        for i in np.flatnonzero(kinds == 1).tolist():
            findings.add("margin_missing", *ledger.where(ledger.owner[i]))


def _labels(ledger: Ledger, findings: Findings) -> None:
    good, bad = len(ledger.good), len(ledger.bad)
    if bool(good) != bool(bad) and not ledger.chosen:
        found = findings.get("one_label")
        found.count, found.detail = good + bad, "true" if good else "false"


def _unread(ledger: Ledger, findings: Findings) -> None:
    if ledger.unread_columns:
        found = findings.get("unread_columns")
        found.count += max(ledger.unread_columns.values())
        found.detail = listed(ledger.unread_columns)


def _length_bias(ledgers: list[Ledger], findings: Findings) -> LengthBias | None:
    chosen, rejected, good, bad = (
        np.concatenate([one.column(name) for one in ledgers]) for name in ("chosen", "rejected", "good", "bad")
    )
    if len(chosen):
        bias = LengthBias.of_pairs(chosen, rejected)
    elif len(good) and len(bad):
        bias = LengthBias.of_unpaired(good, bad)
    else:
        return None
    if bias.far:
        found = findings.get("length_bias")
        found.count, found.detail = bias.comparisons, f"the longer one is preferred in {100 * bias.accuracy:.1f}%"
    return bias


# -- numbers -----------------------------------------------------------------------------------------------------------


def _weighted(ledger: Ledger, seed: int) -> np.ndarray:
    """The samples that the weights of their sources leave, in the order of training: indices [samples]."""
    parts = []
    for number, source in enumerate(ledger.sources):
        first, stop = ledger.first_sample[number : number + 2]
        parts.append(first + sampled(stop - first, source.weight, [seed, number]))
    return np.concatenate(parts).astype(np.int64)


def _held_out(ledger: Ledger, samples: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The samples to train on, and those that are held out."""
    held = held_out(ledger.column("digest")[samples], fraction)
    return samples[~held], samples[held]


def _side(ledger: Ledger, samples: np.ndarray) -> Side:
    sources = [
        Source(source.path, found.name, found.reason, rows)
        for source, found, rows in zip(ledger.sources, ledger.detected, ledger.rows_read, strict=True)
    ]
    counts = np.bincount(ledger.column("script"), minlength=NO_SCRIPT + 1)[:NO_SCRIPT]
    return Side(
        sources,
        sum(ledger.rows_read),
        ledger.column("tokens")[samples],
        int(ledger.column("trained")[samples].sum()),
        {SCRIPTS[i]: int(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]},
    )


def _steps(
    lengths: np.ndarray, data: DataSection, train: TrainSection, microbatch_tokens: int, world_size: int
) -> Steps | None:
    if not len(lengths):
        return None
    plan = Plan(
        lengths,
        batch_size=train.batch_size,
        batch_unit=train.batch_unit,
        microbatch_tokens=microbatch_tokens,
        packing=data.packing,
        num_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        seed=train.seed,
        world_size=world_size,
    )
    used = [
        int(lengths[row].sum())
        for step in range(plan.steps_per_epoch)
        for rank in range(world_size)
        for row in plan.microbatches(step, rank)
    ]
    room = sum(max(size, microbatch_tokens) for size in used)  # a sample longer than a microbatch has one of its own
    return Steps(
        steps=plan.num_steps,
        steps_per_epoch=plan.steps_per_epoch,
        epochs=plan.epochs_done(plan.num_steps),
        batch=f"{train.batch_size:,} {train.batch_unit}",
        tokens_per_epoch=sum(used),
        microbatches_per_epoch=len(used),
        microbatch_tokens=microbatch_tokens,
        packing=data.packing,
        efficiency=sum(used) / room,
    )
