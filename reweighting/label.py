"""Make training rows, meta answers and candidates from questions, with a policy model that answers and continues them.

    python reweighting/label.py questions.jsonl --policy http://localhost:8000/v1 --policy_model NAME \\
        --output_train train.jsonl --output_meta meta.jsonl

The policy answers each question several times, and continues every answer from every step several times; a step's
label is the share of the continuations that end in the correct answer.
"""

if __name__ == "__main__":  # a script: run this file as a module of the package
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from reweighting.entrypoint import run_command

    run_command("reweighting.label")

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from reweighting.config.labeling import LabelConfig, parse_label_config
from reweighting.data.load_answers import LoadReport
from reweighting.errors import UserError
from reweighting.files import atomic_file
from reweighting.labeling.policy import PolicyFailure, read_prompt
from reweighting.labeling.questions import Question, iterate_questions
from reweighting.labeling.rollouts import cut_answer, label_question, labelled_answers
from reweighting.labeling.selection import CANDIDATES, META, TRAIN, Selection
from reweighting.labeling.server import Sampling, ServerPolicy
from reweighting.labeling.store import Store
from reweighting.progress import Progress
from reweighting.terminal import printable

SUMMARY = "Make training rows, meta answers and candidates from questions, with a policy model."
AFTER_INTERRUPT = "the same command resumes there"
LESS_MEMORY = "Give it fewer questions at a time"


def main(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the questions, and the flags.

    Raises:
        UserError: for what the user can fix.
    """
    config = parse_label_config(argv, description=SUMMARY)
    prompt = read_prompt(config.policy.prompt_file)
    report = LoadReport()
    count = sum(1 for _ in questions(config, report))  # checks them all before the first call
    for note in report.notes():
        print(f"warning: {printable(note)}", file=sys.stderr)
    if not count:
        raise UserError(f"{config.labeling.questions[0]}: there is no question with a ground_truth.")
    policy = ServerPolicy(
        config.policy.policy,
        config.policy.policy_model,
        prompt,
        Sampling(config.policy.temperature, config.policy.max_tokens),
        config.policy.concurrency,
        config.policy.timeout,
    )
    try:
        if config.rows.dry_run:
            asyncio.run(estimate(config, policy, count))
            return
        with Store(Path(config.rows.store), store_settings(config, prompt)) as store:
            asyncio.run(ask(config, policy, store, count))
            write(config, store)
    except PolicyFailure as error:
        raise UserError(f"--policy: {error}. What was answered is kept; {AFTER_INTERRUPT}.") from error


def questions(config: LabelConfig, report: LoadReport) -> Iterator[Question]:
    """Read the questions."""
    sources = config.reading.sources(config.labeling.questions)
    return iterate_questions(sources, config.labeling.image_root, config.reading.options(), report)


def store_settings(config: LabelConfig, prompt: str) -> dict[str, object]:
    """Return what the policy's answers depend on, beside the questions."""
    policy = config.policy
    asked = {"policy_model": policy.policy_model, "temperature": policy.temperature, "max_tokens": policy.max_tokens}
    return asked | {"prompt": prompt} | asdict(config.rollout_settings())


async def ask(config: LabelConfig, policy: ServerPolicy, store: Store, count: int) -> None:
    """Ask for everything that the store lacks; a question's calls overlap with those of others.

    Raises:
        UserError, PolicyFailure: the policy does not answer, or not as it must.
    """
    settings = config.rollout_settings()
    running: set[asyncio.Task] = set()
    started = time.monotonic()
    async with policy:
        with Progress(count, unit="question") as progress:
            for number, question in enumerate(questions(config, LoadReport())):
                if number == 0:
                    progress.write(await policy.prepare(question))
                # As many questions as calls keep the policy busy, and memory flat over any number of questions.
                while len(running) >= config.policy.concurrency:
                    running = await finished(running, policy, progress, started)
                running.add(asyncio.create_task(label_question(policy, question, settings, store)))
            while running:
                running = await finished(running, policy, progress, started)


async def finished(
    running: set[asyncio.Task], policy: ServerPolicy, progress: Progress, started: float
) -> set[asyncio.Task]:
    """Wait until at least one question is done, and return those that are not. Raises what ended one."""
    done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if task.exception() is not None:
            for other in rest:
                other.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        task.result()
        progress.update()
    rate = policy.calls / max(time.monotonic() - started, 1e-9)
    progress.show(calls=f"{rate:.1f} a second", tokens=str(policy.tokens), failed=str(policy.failures))
    return rest


async def estimate(config: LabelConfig, policy: ServerPolicy, count: int) -> None:
    """Answer the first question, and print how many calls, tokens and hours all of them take."""
    settings = config.rollout_settings()
    question = next(questions(config, LoadReport()))
    async with policy:
        print(printable(await policy.prepare(question)))
        policy.calls = policy.tokens = 0
        started = time.monotonic()
        texts = await asyncio.gather(*(policy.complete(question) for _ in range(config.policy.concurrency)))
        seconds = time.monotonic() - started
    answered = [text for text in texts if text and text.strip()]
    if not answered:
        raise UserError("--policy: no answer to the first question. Look at the server.")
    steps = sum(len(cut_answer(text, settings)[1]) for text in answered) / len(answered)
    calls = count * settings.answers * (1 + steps * settings.rollouts)
    # A continuation is on average half of an answer.
    tokens = count * settings.answers * (1 + steps * settings.rollouts / 2) * policy.tokens / len(answered)
    hours = seconds / len(texts) * calls / 3600
    print(f"{count} questions: at most {calls:.0f} calls, about {tokens:.3g} tokens and {hours:.2g} hours at the speed "
          f"of {len(texts)} answers ({seconds:.1f} s, {steps + 1:.1f} steps each)")  # fmt: skip


def write(config: LabelConfig, store: Store) -> None:
    """Write the rows of each output, and print how many there are."""
    outputs = {
        TRAIN: config.rows.output_train, META: config.rows.output_meta, CANDIDATES: config.rows.output_candidates
    }  # fmt: skip
    paths = {use: Path(name) for use, name in outputs.items() if name is not None}
    meta, candidates = config.rows.meta_share, config.rows.candidates_share
    shares = {TRAIN: 1 - meta - candidates, META: meta, CANDIDATES: candidates}
    made_by = {"policy": config.policy.policy_model, "temperature": config.policy.temperature}
    selection = Selection(
        {use: path.parent for use, path in paths.items()},
        {use: shares[use] for use in paths},
        config.rows.max_rows_per_domain,
        made_by,
    )
    settings = config.rollout_settings()
    for question in questions(config, LoadReport()):
        selection.add(question, labelled_answers(question, settings, store))
    for use, path in paths.items():
        rows = selection.rows(use)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        print(f"{use:10}  {len(rows)} answers: {printable(path, one_line=True)}")
        if not rows:
            print(f"warning: no answers for {use}: give more questions, or them a greater share")
    for what, number in selection.counts.items():
        if what != "answers" and number:
            print(f"warning: {number} of {selection.counts['answers']} {what.removeprefix('answers ')}")
