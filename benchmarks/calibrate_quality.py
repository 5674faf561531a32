"""How much harm each defect does at each strength: the table behind `data/demo_world/defects.py`.

    python benchmarks/calibrate_quality.py --work /tmp/calibration      # resumable

For each defect and strength a PRM is trained on one domain's worth of rows (1,000, over all kinds of picture, so that
the kind plays no part), all of them struck alike, and scored by the AUC of its step scores on held-out clean answers.
"""

import argparse
import json
from pathlib import Path
from random import Random

from common import ProcessRewardModel, step_auc, train, write_results
from demo_world.defects import DEFECTS
from demo_world.pictures import KINDS
from make_demo import Images, domain_rows

STRENGTHS = (0.0, 0.5, 0.75, 0.9, 1.0)
FLAGS = ("--baseline", "--iteration_num", "200", "--save_every_iterations", "100000")


def strengths(defect: str) -> tuple[float, ...]:
    """Flipping more than half of the labels teaches the opposite: half as far is all the way."""
    return tuple(s / 2 for s in STRENGTHS) if defect == "flipped labels" else STRENGTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/calibration"), help="data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    table: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        for defect in DEFECTS:
            for strength in strengths(defect):
                folder = (
                    args.work / f"{defect.replace(' ', '_')}-{strength}-{seed}"
                    if strength
                    else args.work / f"clean-{seed}"
                )
                folder.mkdir(parents=True, exist_ok=True)
                scored = folder / "auc.json"
                if not scored.exists():
                    images, rows = Images(folder / "images"), []
                    for kind in KINDS.values():
                        rows += domain_rows(
                            kind, defect, strength, 100, images, Random(f"calibrate {seed} {kind.name}")
                        )
                    (folder / "train.json").write_text(json.dumps(rows))
                    train(folder, folder / "run", seed, *FLAGS)
                    scored.write_text(
                        json.dumps(step_auc(ProcessRewardModel.from_pretrained(folder / "run" / "prm"), 500))
                    )
                value = json.loads(scored.read_text())
                table.setdefault(defect, {}).setdefault(str(strength), []).append(value)
                print(
                    f"seed {seed} {defect} {strength}: AUC {value['steps']:.3f}, on images {value['needs_image']:.3f}",
                    flush=True,
                )
    print(write_results("calibrate_quality", {"rows": 1000, "steps": 200, "seeds": args.seeds, "auc": table}))


if __name__ == "__main__":
    main()
