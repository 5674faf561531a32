"""The flags of label.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from reweighting.config.parsing import CommandConfig, flag
from reweighting.config.reading import FILES, ReadingConfig
from reweighting.errors import UserError
from reweighting.labeling.parts import Part
from reweighting.labeling.rollouts import RolloutSettings, Search
from reweighting.labeling.selection import CANDIDATES, META, TRAIN

OF_SERVERS = ("policy_model", "timeout")
OF_LOCAL = ("seed", "device", "precision")


@dataclass(frozen=True)
class PolicyConfig:
    """The policy."""

    policy: list[str] = flag(
        help="addresses of OpenAI-compatible servers up to /v1, several share the work; or one model that runs in this "
        "process: a folder, a GGUF file, or a name on the Hugging Face hub"
    )
    policy_model: str | None = flag(default=None, help="the model's name on the servers")
    prompt_file: str | None = flag(
        default=None, help="text that asks for an answer, with {question} in it (default: the paper's five steps)"
    )
    temperature: float = flag(default=1.0, help="of the sampling")
    max_tokens: int = flag(default=1024, help="tokens of one answer or continuation")
    concurrency: int = flag(default=16, help="calls in flight at a time; in this process, texts in a batch")
    timeout: float | None = flag(default=None, help="seconds for one call to a server (default: 600)")
    seed: int | None = flag(default=None, help="of the sampling in this process (default: 0)")
    device: str | None = flag(
        default=None, help="of a model in this process: cuda, cuda:1, mps, cpu, … (default: the best that is there)"
    )
    precision: Literal["fp32", "bf16"] | None = flag(
        default=None, help="of a model in this process (default: bf16 on cuda, else fp32)"
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "timeout"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"--{name}: found {getattr(self, name)}, allowed: a number of more than 0")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature: found {self.temperature}, allowed: a number from 0")
        if len(self.policy) > 1 and not self.on_server:
            raise UserError("--policy: only servers share the work. Name one model, or several servers.")
        if self.on_server:
            _check_addresses("policy", self.policy)
        if self.on_server and self.policy_model is None:
            raise UserError("--policy_model: name the model on the server.")
        idle = OF_LOCAL if self.on_server else OF_SERVERS
        if given := [name for name in idle if getattr(self, name) is not None]:
            where = "on a server" if self.on_server else "in this process"
            raise UserError(f"--{given[0]} does nothing with a policy {where}: leave it out.")

    @property
    def on_server(self) -> bool:
        """Whether the policy is behind a server."""
        return all("://" in name for name in self.policy)


@dataclass(frozen=True)
class JudgeConfig:
    """The judge."""

    judge: list[str] | None = flag(
        default=None,
        help="addresses of OpenAI-compatible servers up to /v1, whose model is asked whether an answer is correct "
        "where comparing it with ground_truth does not decide",
    )
    judge_model: str | None = flag(default=None, help="the judge's name on the servers")

    def __post_init__(self) -> None:
        if (self.judge is None) != (self.judge_model is None):
            raise UserError("--judge and --judge_model go together: name the servers and the model on them.")
        _check_addresses("judge", self.judge or [])


def _check_addresses(name: str, urls: list[str]) -> None:
    """Raise UserError if one is not the address of a server."""
    for url in urls:
        if not _is_address(url):
            raise UserError(f"--{name}: found {url!r:.60}, allowed: an address such as http://localhost:8000/v1")


def _is_address(url: str) -> bool:
    """Whether a text is the address of a server."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # of brackets, and of the port
        return False


@dataclass(frozen=True)
class LabelingConfig:
    """Answers and labels."""

    questions: list[str] = flag(help=f"questions with their correct answers; the flag's name may be left out: {FILES}")
    image_root: str | None = flag(
        default=None,
        help="folder that image paths start from and may not leave (default: the input's, then the working one)",
    )
    answers: int = flag(default=8, help="answers to each question")
    rollouts: int = flag(default=16, help="continuations from each step")
    max_steps: int = flag(default=16, help="steps of an answer; further ones join the last")
    search: Search = flag(
        default="full",
        help="label every step, or find the first step from which no continuation is correct by halving",
    )
    stop_early: int = flag(default=0, help="stop at a step when so many continuations all agree (0: never)")

    def __post_init__(self) -> None:
        for name, least in (("answers", 1), ("rollouts", 1), ("max_steps", 1), ("stop_early", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: found {getattr(self, name)}, allowed: a number of at least {least}")
        if self.stop_early > self.rollouts:
            raise UserError(f"--stop_early {self.stop_early} does nothing with --rollouts {self.rollouts}")


@dataclass(frozen=True)
class RowsConfig:
    """What is written."""

    store: str = flag(
        default="labels.sqlite", help="what the policy has answered; an interrupted run is resumed from it"
    )
    output_train: str | None = flag(default=None, help="training rows, a .jsonl file")
    output_meta: str | None = flag(default=None, help="meta answers, as many correct as incorrect ones to a question")
    output_candidates: str | None = flag(default=None, help="all answers to a question, for best-of-N")
    meta_share: float = flag(default=0.2, help="of the questions, for the meta answers, beside other outputs")
    candidates_share: float = flag(default=0.2, help="of the questions, for the candidates, beside other outputs")
    max_rows_per_domain: int = flag(
        default=1000, help="training rows of a domain, those first whose labels lie between 0 and 1; 0: all"
    )
    part: str = flag(
        default="1/1",
        help="for jobs on several machines: 2/8 asks the second of eight parts of the questions, and puts that into "
        "the names of --store and the outputs",
    )
    dry_run: bool = flag(default=False, help="ask one question, and print how many calls all of them take")

    def __post_init__(self) -> None:
        named = self._named()
        if not named:
            raise UserError("nothing would be written: name --output_train, --output_meta or --output_candidates")
        for name in named.values():
            if Path(name).suffix != ".jsonl":
                raise UserError(f"found the output {name!r:.60}, allowed: a name that ends in .jsonl")
        if len({Path(name).resolve() for name in (*named.values(), self.store)}) <= len(named):
            raise UserError("two outputs, or one and --store, have one name: name a file for each")
        shares = (self.meta_share, self.candidates_share)
        if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
            raise UserError("--meta_share and --candidates_share: allowed: numbers above 0 whose sum is below 1")
        if self.max_rows_per_domain < 0:
            raise UserError(f"--max_rows_per_domain: found {self.max_rows_per_domain}, allowed: a number of at least 0")
        try:
            part = self.which_part
        except ValueError:
            raise UserError(f"--part: found {self.part!r:.40}, allowed: a part and how many there are, as 2/8 for the "
                            "second of eight") from None  # fmt: skip
        if 0 < self.max_rows_per_domain < part.count:
            raise UserError(f"--max_rows_per_domain: found {self.max_rows_per_domain}, allowed with {part.count} "
                            f"parts, which share it: 0, or a number of at least {part.count}")  # fmt: skip

    def _named(self) -> dict[str, str]:
        """The outputs by use, as they are named on the command line."""
        names = {TRAIN: self.output_train, META: self.output_meta, CANDIDATES: self.output_candidates}
        return {use: name for use, name in names.items() if name is not None}

    @property
    def which_part(self) -> Part:
        """The part of the questions that this job asks."""
        return Part.parse(self.part)

    def outputs(self) -> dict[str, Path]:
        """Return the files of rows that are written, by what the rows are used for."""
        return {use: self.which_part.named(Path(name)) for use, name in self._named().items()}

    def store_file(self) -> Path:
        """Return the file of what the policy has answered."""
        return self.which_part.named(Path(self.store))

    def row_limit(self) -> int:
        """Return how many training rows of a domain this job writes, 0 for all."""
        return self.which_part.share_of(self.max_rows_per_domain)


@dataclass(frozen=True)
class LabelConfig(CommandConfig):
    """All flags of label.py."""

    summary: ClassVar[str] = "Make training rows, meta answers and candidates from questions, with a policy model."
    first: ClassVar[str | None] = "questions"
    recipes: ClassVar[bool] = True

    policy: PolicyConfig
    judge: JudgeConfig
    labeling: LabelingConfig
    reading: ReadingConfig
    rows: RowsConfig

    def rollout_settings(self) -> RolloutSettings:
        """Return how answers are labelled; without training rows, no step is."""
        flags = self.labeling
        rollouts = flags.rollouts if self.rows.output_train is not None else 0
        separator = self.reading.options().step_separator
        return RolloutSettings(
            flags.answers, rollouts, flags.max_steps, separator, flags.search, flags.stop_early if rollouts else 0
        )
