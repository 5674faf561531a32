"""What labelling loses to SIGKILL at random moments: no answered call that was stored is made again.

    python benchmarks/label_kills.py --work /tmp/kills

A server on loopback answers and continues. After each kill the store is read: what it holds then must stand there
unchanged at the end, and its calls must not come again. A second round, greedy, compares the rows with those of a run
that nothing struck.
"""

import argparse
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random

from common import ROOT, write_results

from reweighting.config.labeling import LabelConfig
from reweighting.data.load_answers import LoadReport
from reweighting.label import questions
from reweighting.labeling.rollouts import cut_answer
from reweighting.labeling.store import WHOLE
from tests.labeling.policy_server import PolicyServer

QUESTIONS, ANSWERS, ROLLOUTS = 40, 4, 8
PROBE_TOKENS = 64  # of the calls that find out whether the server continues
Call = tuple[str, str]  # the question's text, and how the answer begins
Entries = dict[tuple[str, int, int], str]  # {(question, answer, step): value}


class Bench:
    """A server, questions, and a command that labels them."""

    def __init__(self, folder: Path, server: PolicyServer, temperature: float):
        self.folder, self.server = folder, server
        folder.mkdir(parents=True)
        rows = [{"question": f"{n} + {n + 3}?", "ground_truth": 2 * n + 3, "id": n} for n in range(QUESTIONS)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.flags = [
            *(str(folder / "questions.jsonl"), "--policy", server.url, "--policy_model", "adder"),
            *("--answers", str(ANSWERS), "--rollouts", str(ROLLOUTS), "--temperature", str(temperature)),
            *("--output_train", str(folder / "train.jsonl"), "--store", str(folder / "labels.sqlite")),
            *("--max_rows_per_domain", "0"),
        ]

    def start(self) -> subprocess.Popen:
        """Start the command."""
        command = [sys.executable, str(ROOT / "reweighting" / "label.py"), *self.flags]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self) -> str:
        """Run the command to its end; the rows that it writes."""
        process = self.start()
        errors = process.communicate(timeout=600)[1]
        if process.returncode:
            raise RuntimeError(errors[-2000:])
        return (self.folder / "train.jsonl").read_text()

    def entries(self) -> Entries:
        """What the store holds."""
        try:
            with closing(sqlite3.connect(self.folder / "labels.sqlite")) as file:
                found = file.execute("SELECT question, answer, step, value FROM entries").fetchall()
        except sqlite3.OperationalError:  # killed before it was made
            return {}
        return {(question, answer, step): value for question, answer, step, value in found}

    def stands_for(self, entries: Entries) -> Counter[Call]:
        """The calls whose answers some entries hold."""
        config = LabelConfig.parse(self.flags)
        texts = {question.key: question.text for question in questions(config, LoadReport())}
        found: Counter[Call] = Counter()
        for question, answer, step in entries:
            if step == WHOLE:
                found[texts[question], ""] += 1
            else:
                text = json.loads(entries[question, answer, WHOLE])["text"]
                found[texts[question], cut_answer(text, config.rollout_settings())[1][step]] += ROLLOUTS
        return found

    def calls(self) -> Counter[Call]:
        """The calls since the last time, without those of the probe."""
        taken, self.server.bodies[:] = list(self.server.bodies), []
        found: Counter[Call] = Counter()
        for body in taken:
            asked, *begun = body["messages"]
            if body["max_tokens"] > PROBE_TOKENS:
                found[asked["content"].partition("\n")[0], begun[0]["content"] if begun else ""] += 1
        return found


def strike(bench: Bench, kills: int, rng: Random) -> dict:
    """Kill the command again and again, let it end, and compare what it asked with what it had.

    Raises:
        RuntimeError: an answered call that was stored came again, or what was stored has changed.
    """
    moments, stored, asked = [], [], []
    while len(moments) < kills:
        process, target = bench.start(), rng.randrange(200)
        while len(bench.server.bodies) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        asked.append(bench.calls())
        stored.append(bench.entries())
        moments.append({"calls": sum(asked[-1].values()), "stored": len(stored[-1])})
    rows = bench.finish()
    asked.append(bench.calls())
    final = bench.entries()
    needed = bench.stands_for(final)
    for before, calls in zip([{}, *stored], asked, strict=True):
        if any(final.get(key) != value for key, value in before.items()):
            raise RuntimeError("an entry of the store is gone or has changed")
        if again := calls - (needed - bench.stands_for(before)):
            raise RuntimeError(f"asked again for what was stored: {again.most_common(3)}")
    return {"kills": moments, "calls": sum(map(Counter.total, asked)), "needed": needed.total(),
            "rows": rows.count("\n"), "text": rows}  # fmt: skip


def main() -> None:
    """Run both rounds, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs; is removed first")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    rng, results = Random(args.seed), {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        with PolicyServer(seed=args.seed) as server:
            server._server.handle_error = lambda *_: None  # that a killed client is gone
            found = strike(Bench(args.work / name, server, temperature), args.kills, rng)
            if found["rows"] != QUESTIONS * ANSWERS:
                raise RuntimeError(f"{found['rows']} rows")
            if name == "greedy" and found["text"] != Bench(args.work / "whole", server, temperature).finish():
                raise RuntimeError("other rows than those of a run that nothing struck")
        results[name] = {key: value for key, value in found.items() if key != "text"}
        print(f"{name}: killed {args.kills} times; {found['calls']} calls, {found['needed']} needed")
    settings = {"questions": QUESTIONS, "answers": ANSWERS, "rollouts": ROLLOUTS, "seed": args.seed}
    print(write_results("label_kills", {**settings, **results}))


if __name__ == "__main__":
    main()
