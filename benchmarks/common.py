"""What the benchmarks share: running the real command, scoring a trained PRM, and saying on what they ran."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: a benchmark may share its cores

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from demo_world.pictures import draw_picture  # noqa: E402
from demo_world.solutions import Policy, random_kind, random_question  # noqa: E402

from reweighting.data.answers import stated_answers  # noqa: E402
from reweighting.data.chains import Chain  # noqa: E402
from reweighting.data.load_rows import load_candidate_rows  # noqa: E402
from reweighting.inference.best_of_n_metrics import choice_outcomes  # noqa: E402
from reweighting.inference.candidates import best_of_n_accuracy, score_candidates  # noqa: E402
from reweighting.inference.metrics import auc  # noqa: E402
from reweighting.modeling.reward_model import ProcessRewardModel  # noqa: E402


def machine() -> dict[str, object]:
    """Processor, GPU if there is one, and versions, for the head of a result file."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def share_cores(runs: int) -> None:
    """Give each of `runs` runs at a time its share of the cores: they would wait for each other otherwise."""
    threads = max(1, os.cpu_count() // runs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the runs
    torch.set_num_threads(threads)  # of the scoring


def use_one_thread() -> None:
    """Let runs and scoring take one core: processor seconds are then what a run takes, whatever else goes on."""
    share_cores(os.cpu_count() or 1)


def make_data(folder: Path, seed: int, *flags: str) -> None:
    """Demo data of this seed, with these flags of `make_demo.py`, in `folder`, unless it is there already."""
    if not (folder / "quality.json").exists():
        script = [sys.executable, str(ROOT / "data" / "make_demo.py"), "--output_dir", str(folder), "--seed", str(seed)]
        subprocess.run([*script, *flags], check=True, stdout=subprocess.DEVNULL)


def make_reassigned(folder: Path, seed: int) -> dict[str, float]:
    """A demo world of this seed in `folder`, with the shipped qualities dealt anew among the domains; the qualities."""
    shipped = json.loads((ROOT / "data" / "quality.json").read_text())
    values = list(shipped.values())
    Random(seed).shuffle(values)
    quality = dict(zip(shipped, values, strict=True))
    make_data(folder, seed, "--quality", *(f"{domain}={value}" for domain, value in quality.items()))
    return quality


def train(data: Path, output: Path, seed: int, *flags: str) -> float:
    """Run the command on `data` into `output`, unless it has run before; the processor seconds that it took.

    With one thread a run (`share_cores`), these are what it takes alone on a core, whatever else goes on. In float32
    everywhere: what a run finds then differs between a GPU and a processor by rounding only.
    """
    done = output / "seconds.json"
    if not done.exists():
        command = [sys.executable, str(ROOT / "reweighting" / "main.py"), "--train_json_file", str(data / "train.json")]
        command += ["--weights_path", str(output), "--seed", str(seed), "--precision", "fp32", *flags]
        if not {"--baseline", "--domain_weights", "--meta_json_file"}.intersection(flags):
            command += ["--meta_json_file", str(data / "meta.json")]
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "stderr.txt", "w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)}\n{errors.read()[-3000:]}")
        done.write_text(json.dumps(usage.ru_utime + usage.ru_stime))
    return json.loads(done.read_text())


def learned_weights(output: Path) -> dict[str, float]:
    """The weights that a run wrote."""
    return json.loads((output / "domain_weights.json").read_text())["weights"]


def verdicts(output: Path) -> dict[str, str]:
    """The verdict on each domain of a run, none if it learned no weights."""
    saved = json.loads((output / "domain_weights.json").read_text()).get("evidence", {"domains": {}})
    return {name: one["verdict"] for name, one in saved["domains"].items()}


def agreement(weights: dict[str, float], quality: dict[str, float]) -> dict[str, float]:
    """How the weights rank the domains: Spearman with quality, and AUC of telling the better half from the worse."""
    names = sorted(quality)
    w, q = [weights[n] for n in names], [quality[n] for n in names]
    return {"spearman": float(spearmanr(w, q).statistic), "better_half_auc": auc(w, np.array(q) > np.median(q))}


def held_out_chains(folder: Path, count: int, seed: int = 987_654) -> tuple[list[Chain], list[int | None]]:
    """Clean answers to new questions, and each one's first wrong step; the pictures are drawn into `folder`."""
    rng, policy = Random(seed), Policy()
    chains, slips = [], []
    for number in range(count):
        question = random_question(random_kind(rng), rng)
        response = policy.respond(question, rng)
        picture = folder / f"{number}.png"
        draw_picture(question.kind, question.entries, rng).quantize(32).save(picture)
        chains.append(Chain(question.text, response.steps, (picture,)))
        slips.append(response.first_slip)
    return chains, slips


def step_auc(model: ProcessRewardModel, count: int = 1000) -> dict[str, float]:
    """AUC on held-out clean answers: of the step scores (the mean over the five steps), of those on steps that need the
    image, and of the whole answers' mean logits.

    A step is true if no step up to it is wrong. Steps of one number are compared with each other only: the chance to
    end right, which a PRM learns, is lower at a right first step than at a right last one. The steps that need the
    image are the evidence steps after a right first step: nothing in their text tells a misread number from a right
    one.
    """
    with TemporaryDirectory() as folder:
        chains, slips = held_out_chains(Path(folder), count)
        scores = model.chain_logits(chains, batch_size=50)[0].numpy()  # [answers, 5]
    truth = np.array([[slip is None or step < slip for step in range(scores.shape[1])] for slip in slips])
    after_right_start = truth[:, 0]
    return {
        "steps": float(np.mean([auc(scores[:, step], truth[:, step]) for step in range(truth.shape[1])])),
        "needs_image": auc(scores[after_right_start, 1], truth[after_right_start, 1]),
        "answers": auc(scores.mean(1), truth[:, -1]),
    }


def best_of(model: ProcessRewardModel, data: Path) -> dict[str, float]:
    """Accuracy of the chosen answer among the first N on `test.json`, and what needs no model to compare with."""
    rows = load_candidate_rows(data / "test.json")
    scored, right = score_candidates(model, rows), [row.true_false for row in rows]
    result = {}
    for n in (1, 2, 4, 8):
        triples = zip(scored, right, map(stated_answers, rows), strict=True)
        found = [choice_outcomes(z, mask, r, answers, n) for (z, mask), r, answers in triples]
        result[f"best_of_{n}"] = best_of_n_accuracy(scored, right, n)
        for name, way in ((f"majority_of_{n}", "majority vote"), (f"pass@{n}", "pass@N")):
            result[name] = float(np.mean([outcomes[way] for outcomes in found]))
        if n == 1:
            result["pass@1"] = float(np.mean([sum(r) / len(r) for r in right]))
    return result


def run_case(command: list[str], env: dict[str, str] | None = None) -> dict:
    """Run one case of a benchmark in a process of its own; what it prints behind `RESULT`, which is JSON.

    Raises:
        RuntimeError: with the end of what it printed, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def read_results(name: str) -> dict:
    """What an earlier run of a benchmark has written, without the machine; empty if there is nothing."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content.pop("machine", None)
    return content


def write_results(name: str, content: dict) -> Path:
    """Write `benchmarks/results/<name>.json` with the machine in its head."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path
