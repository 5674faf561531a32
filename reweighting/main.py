"""Learn domain weights and a process reward model from two JSON files.

python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `reweighting` is found from anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from reweighting.arguments import learns_weights, parse_arguments  # noqa: E402
from reweighting.errors import run_command  # noqa: E402


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    args = parse_arguments(argv)

    from reweighting.records import load_meta_rows, load_training_rows

    # Every row is checked before anything slow is loaded.
    learns = learns_weights(args)
    train_rows = load_training_rows(args.train_json_file, args.image_root, min_domains=2 if learns else 1)
    meta_rows = load_meta_rows(args.meta_json_file, args.image_root) if learns else []

    from reweighting.report import finish, prepare_folder
    from reweighting.run import build

    folder = prepare_folder(args.weights_path, args.resume)
    engine = build(args, train_rows, meta_rows, folder)
    engine.run()
    finish(engine, folder)


if __name__ == "__main__":
    run_command(main, "the same command with --resume goes on from the last checkpoint")
