"""How much harm each defect does at each strength: the table behind `data/demo_world/defects.py`.

    python benchmarks/calibrate_quality.py --work /tmp/calibration      # resumable

For each defect and strength a PRM is trained on one domain's worth of rows (1,000, over all kinds of picture, so that
the kind plays no part), all of them struck alike, and scored by the AUC of its step scores on held-out clean answers.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from common import ProcessRewardModel, share_cores, step_auc, train, write_results
from demo_world.defects import DEFECTS
from demo_world.pictures import KINDS
from make_demo import Images, domain_rows

# Flipping half of the labels leaves no signal, flipping all of them teaches the opposite.
STRENGTHS = {defect: (0.0, 0.5, 0.8, 1.0) for defect in DEFECTS} | {
    "flipped labels": (0.0, 0.25, 0.5, 1.0),
    "trivial questions": (0.0, 0.35, 0.5, 0.65, 1.0),
    "answers given away": (0.0, 0.35, 0.5, 0.65, 1.0),
}
FLAGS = ("--baseline", "--iteration_num", "200", "--save_every_iterations", "100000")


def score(work: Path, defect: str, strength: float, seed: int) -> dict[str, float]:
    """Train on one domain (unless that is done) and score it. Without a defect, they are all the same."""
    folder = work / (f"{defect.replace(' ', '_')}-{strength}-{seed}" if strength else f"clean-{seed}")
    scored = folder / "auc.json"
    if not scored.exists():
        images, rows = Images(folder / "images"), []
        for kind in KINDS.values():
            rows += domain_rows(kind, defect, strength, 100, images, Random(f"calibrate {seed} {kind.name}"))
        (folder / "train.json").write_text(json.dumps(rows))
        train(folder, folder / "run", seed, *FLAGS)
        scored.write_text(json.dumps(step_auc(ProcessRewardModel.from_pretrained(folder / "run" / "prm"))))
    return json.loads(scored.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/calibration"), help="data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    share_cores(args.parallel)
    jobs = [(strength, defect, seed) for defect in DEFECTS for strength in STRENGTHS[defect] for seed in args.seeds]
    jobs.sort()  # the clean runs first, since all defects share them
    table: dict[str, dict[str, list[dict]]] = {defect: {} for defect in DEFECTS}
    with ThreadPoolExecutor(args.parallel) as pool:
        for strength, defect, seed in jobs[: len(DEFECTS) * len(args.seeds)]:
            score(args.work, defect, strength, seed)
        results = pool.map(lambda job: score(args.work, job[1], job[0], job[2]), jobs)
        for (strength, defect, seed), found in zip(jobs, results, strict=True):
            table[defect].setdefault(str(strength), []).append(found)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"seed {seed} {defect} {strength}: AUC {shown}", flush=True)
    print(write_results("calibrate_quality", {"rows": 1000, "steps": 200, "seeds": args.seeds, "auc": table}))


if __name__ == "__main__":
    main()
