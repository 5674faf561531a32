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
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from reweighting.config.labeling import LabelConfig, PolicyConfig
from reweighting.data.load_answers import LoadReport
from reweighting.errors import Problems, UserError
from reweighting.files import atomic_file, cannot_write, check_not_inputs
from reweighting.labeling.chat import KEY_VARIABLE, ChatClient
from reweighting.labeling.checker import Checker, compare, to_judge
from reweighting.labeling.judge import JUDGE_PROMPT, Judge, JudgeFailure
from reweighting.labeling.policy import Policy, PolicyFailure, QuestionRefused, Sampling, read_prompt
from reweighting.labeling.questions import Question, iterate_questions
from reweighting.labeling.rollouts import Labeller, Tally, all_of, cut_answer, labelled_answers, task_group
from reweighting.labeling.selection import CANDIDATES, META, TRAIN, Selection
from reweighting.labeling.server import ServerPolicy
from reweighting.labeling.store import Store
from reweighting.progress import Progress
from reweighting.terminal import printable

AFTER_INTERRUPT = "the same command resumes there"
LESS_MEMORY = "Give it fewer questions at a time, or a smaller --concurrency"
NOT_SAMPLED = "the policy does not sample, or hardly. Look at --temperature and the defaults of the server"
ALL_ALIKE = (
    "--temperature 0: all answers to a question are the same, and so are all continuations of a step: its label is 0 "
    "or 1, whatever its chance"
)
SERVER_TIMEOUT = 600.0  # seconds
JUDGE_KEY_VARIABLE = "JUDGE_API_KEY"  # where the judge has a key of its own
ALL_REFUSED = 20  # questions: where the server refuses the first of them, it refuses more than long ones


def main(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the questions, and the flags.

    Raises:
        UserError: for what the user can fix.
    """
    config = LabelConfig.parse(argv)
    prompt = read_prompt(config.policy.prompt_file)
    check_outputs(config)
    report = LoadReport()
    count = sum(1 for _ in questions(config, report))  # checks them all before the first call
    for note in report.notes():
        warn(note)
    if not count:
        where = "" if config.rows.which_part.count == 1 else f" in part {config.rows.part}; use fewer parts"
        raise UserError(f"{config.labeling.questions[0]}: there is no question with a ground_truth{where}.")
    settings = config.rollout_settings()
    if not config.policy.temperature and max(settings.answers, settings.rollouts) > 1:
        warn(ALL_ALIKE)
    policy, judge = make_policy(config.policy, prompt), make_judge(config)
    try:
        if config.rows.dry_run:
            asyncio.run(estimate(config, policy, judge, count))
            return
        with Store(config.rows.store_file(), store_settings(config, prompt)) as store:
            checker = Checker(store, judge)
            asyncio.run(ask(config, Labeller(policy, checker, store, config.rollout_settings()), count))
            write(config, store, checker, policy.name)
    except QuestionRefused as error:  # of a dry run
        raise UserError(f"--policy: the policy refuses the first question ({error}).") from error
    except PolicyFailure as error:
        raise UserError(f"--policy: {error}. What was answered is kept; {AFTER_INTERRUPT}.") from error
    except JudgeFailure as error:
        raise UserError(f"--judge: {error}. What was answered is kept; {AFTER_INTERRUPT}.") from error


def make_policy(flags: PolicyConfig, prompt: str) -> Policy:
    """Connect to the servers, or load the model.

    Raises:
        UserError: it cannot be loaded, or the key in the environment cannot be one.
    """
    sampling = Sampling(flags.temperature, flags.max_tokens)
    if flags.policy_model is not None:
        client = ChatClient(flags.policy, flags.policy_model, flags.concurrency, flags.timeout or SERVER_TIMEOUT)
        return ServerPolicy(client, prompt, sampling)
    from reweighting.labeling.local_policy import LocalPolicy  # loads torch, which a server does without

    name, seed = flags.policy[0], flags.seed or 0
    return LocalPolicy(name, prompt, sampling, flags.concurrency, seed, flags.device, flags.precision)


def make_judge(config: LabelConfig) -> Judge | None:
    """Connect to the judge's servers, if there is one.

    Raises:
        UserError: the key in the environment cannot be one.
    """
    flags = config.judge
    if flags.judge is None or flags.judge_model is None:
        return None
    key = JUDGE_KEY_VARIABLE if JUDGE_KEY_VARIABLE in os.environ else KEY_VARIABLE
    timeout = config.policy.timeout or SERVER_TIMEOUT
    return Judge(ChatClient(flags.judge, flags.judge_model, config.policy.concurrency, timeout, key))


def questions(config: LabelConfig, report: LoadReport) -> Iterator[Question]:
    """Read the questions, those of the part that is asked for."""
    sources = config.reading.sources(config.labeling.questions)
    found = iterate_questions(sources, config.labeling.image_root, config.reading.options(), report)
    return filter(config.rows.which_part.holds, found)


def check_outputs(config: LabelConfig) -> None:
    """See that what is written is no input and can be written, before the first call.

    Raises:
        UserError: it is, or cannot.
    """
    outputs = [*config.rows.outputs().values(), config.rows.store_file()]
    read = [source.path for source in config.reading.sources(config.labeling.questions)]
    check_not_inputs(outputs, [*read, config.reading.questions_json_file, config.policy.prompt_file])
    for path in outputs:
        if path.is_dir():
            raise UserError(f"{path}: is a folder. Name a file in it.")
        if config.rows.dry_run:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise cannot_write(path, error) from error


def store_settings(config: LabelConfig, prompt: str) -> dict[str, object]:
    """Return what the policy's answers depend on, beside the questions."""
    policy = config.policy
    made_by: dict[str, object] = {"policy_model": policy.policy_model}
    if not policy.on_server:
        from reweighting.modeling.loading import identify  # loads torch

        made_by = {"policy_digest": identify(policy.policy[0]).digest, "seed": policy.seed or 0}
    asked = {"temperature": policy.temperature, "max_tokens": policy.max_tokens, "prompt": prompt}
    if config.judge.judge_model is not None:
        asked |= {"judge_model": config.judge.judge_model, "judge_prompt": JUDGE_PROMPT}
    # A run without training rows labels no step; one with them, on the same store, labels those of the same answers.
    flags = config.labeling
    labelled = {"rollouts": flags.rollouts, "enough": flags.stop_early}
    settings = asdict(config.rollout_settings()) | labelled
    del settings["answers"]  # further ones join those that are there
    return made_by | asked | settings


async def ask(config: LabelConfig, labeller: Labeller, count: int) -> None:
    """Ask for everything that the store lacks; a question's calls overlap with those of others.

    Raises:
        UserError, PolicyFailure, JudgeFailure: the policy, or the judge, does not answer, or not as it must.
    """
    policy, tally = labeller.policy, labeller.tally
    refused: list[tuple[Question, QuestionRefused]] = []
    # As many questions as calls keep the policy busy, and memory flat over any number of questions.
    room = asyncio.Semaphore(config.policy.concurrency)
    started = time.monotonic()

    async def label(question: Question) -> None:
        try:
            await labeller.label(question)
        except QuestionRefused as error:
            refused.append((question, error))
        room.release()
        progress.update()
        if len(refused) == progress.count >= min(count, ALL_REFUSED):
            raise UserError(
                refusals(refused, count, "Look at the policy, --prompt_file, --max_tokens and --temperature")
            )
        rate = policy.calls / max(time.monotonic() - started, 1e-9)
        failed = tally.failed_answers + tally.failed_continuations + tally.failed_verdicts
        progress.show(calls=f"{rate:.1f} a second", tokens=str(policy.tokens), failed=str(failed))

    async with policy, labeller.checker.judge or nullcontext() as judge:
        with Progress(count, unit="question") as progress:
            async with task_group() as group:
                for number, question in enumerate(questions(config, LoadReport())):
                    if number == 0:
                        progress.write(await policy.prepare(question, progress.write))
                        if judge is not None:
                            progress.write(await judge.prepare(question, progress.write))
                    await room.acquire()
                    group.create_task(label(question))
    for line in missing(tally, config.policy.on_server):
        warn(line)
    if refused:
        warn(refusals(refused, count, "The others are labelled"))


def missing(tally: Tally, on_server: bool) -> Iterator[str]:
    """Describe what did not come."""
    again = "the same command asks for them again" if on_server else "another --seed with another --store gives others"
    if tally.failed_answers or tally.failed_continuations:
        yield f"{tally.failed_answers} answers and {tally.failed_continuations} continuations failed; {again}"
    if tally.failed_verdicts:
        yield f"{tally.failed_verdicts} verdicts of the judge failed; the same command asks for them again"
    if tally.empty_answers or tally.empty_continuations:
        yield (f"{tally.empty_answers} answers and {tally.empty_continuations} continuations are empty; {again}. "
               "Look at --max_tokens and the model")  # fmt: skip
    if tally.refused_continuations:
        yield (f"{tally.refused_continuations} continuations are refused by the policy, and count as neither correct "
               f"nor incorrect: {tally.why}")  # fmt: skip


def refusals(refused: list[tuple[Question, QuestionRefused]], count: int, remedy: str) -> str:
    """Describe the questions that the policy refuses."""
    problems = Problems()
    for question, error in refused:
        problems.add(f"{question.place}, id {question.id}", str(error))
    head = f"{len(refused)} of {count} questions left out: the policy refuses them. {remedy}."
    return "\n".join([head, *problems.lines()])


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {printable(text)}", file=sys.stderr)


async def estimate(config: LabelConfig, policy: Policy, judge: Judge | None, count: int) -> None:
    """Answer the first question, and print how many calls, tokens and hours all of them take."""
    settings = config.rollout_settings()
    question = next(questions(config, LoadReport()))
    async with policy, judge or nullcontext():
        print(printable(await policy.prepare(question, warn)))
        if judge is not None:
            print(printable(await judge.prepare(question, warn)))
        before, started = policy.tokens, time.monotonic()
        texts = await all_of(policy.complete(question, number=n) for n in range(config.policy.concurrency))
        seconds, made = time.monotonic() - started, policy.tokens - before
        answered = [text for text in texts if isinstance(text, str) and text.strip()]
        unclear = [text for text in answered if compare(text, question) is None]
        started = time.monotonic()
        if judge is not None:
            await all_of(judge.compare(question, to_judge(text)) for text in unclear)
        judged = time.monotonic() - started
    if not answered:
        raise UserError(
            "--policy: no answer to the first question. Look at the policy, --prompt_file and --max_tokens."
        )
    if len(set(answered)) == 1 < len(answered) and config.policy.temperature:
        warn(f"all answers to the first question are the same: {NOT_SAMPLED}")
    steps = sum(len(cut_answer(text, settings)[1]) for text in answered) / len(answered)
    calls = count * settings.answers * (1 + steps * settings.rollouts)
    # A continuation is on average half of an answer.
    tokens = count * settings.answers * (1 + steps * settings.rollouts / 2) * made / len(answered)
    hours = (seconds / len(texts) + judged / len(answered)) * calls / 3600
    of_judge = "" if judge is None else f", at most {calls * len(unclear) / len(answered):.0f} of the judge"
    print(f"{count} questions: at most {calls:.0f} calls{of_judge}, about {tokens:.3g} tokens and {hours:.2g} hours at "
          f"the speed of {len(texts)} answers ({seconds + judged:.1f} s, {steps + 1:.1f} steps each)")  # fmt: skip


def write(config: LabelConfig, store: Store, checker: Checker, policy: str) -> None:
    """Write the rows of each output, and print how many there are."""
    paths = config.rows.outputs()
    meta, candidates = config.rows.meta_share, config.rows.candidates_share
    shares = {TRAIN: 1 - meta - candidates, META: meta, CANDIDATES: candidates}
    made_by = {"policy": policy, "temperature": config.policy.temperature}
    selection = Selection(
        {use: path.parent for use, path in paths.items()},
        {use: shares[use] for use in paths},
        config.rows.row_limit(),
        made_by,
    )
    settings, alike = config.rollout_settings(), set[bool]()
    for question in questions(config, LoadReport()):
        answers = labelled_answers(question, settings, store, checker)
        selection.add(question, answers)
        if len(answers) > 1:
            alike.add(len({answer.steps for answer in answers}) == 1)
    if alike == {True} and config.policy.temperature:
        warn(f"all answers to every question are the same: {NOT_SAMPLED}")
    for use, path in paths.items():
        rows = selection.rows(use)
        with atomic_file(path) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        print(f"{use:10}  {len(rows)} answers: {printable(path, one_line=True)}")
        if not rows:
            warn(f"no answers for {use}: give more questions, or them a greater share")
    for what, number in selection.counts.items():
        if number:
            warn(f"{number} of {selection.answers} {what}")
