"""Learn domain weights and a process reward model from two JSON files.

python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `reweighting` is found from anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load ends without a traceback

from reweighting.arguments import learns_weights, parse_arguments  # noqa: E402
from reweighting.errors import run_command  # noqa: E402


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    args = parse_arguments(argv)

    from reweighting.records import load_candidate_rows, load_meta_rows, load_training_rows

    # Every row is checked before anything slow is loaded.
    learns = learns_weights(args)
    train_rows = load_training_rows(args.train_json_file, args.image_root, min_domains=2 if learns else 1)
    meta_rows = load_meta_rows(args.meta_json_file, args.image_root) if learns else []
    candidates = []
    if args.validation_json_file is not None:
        candidates = load_candidate_rows(args.validation_json_file, args.image_root)

    from reweighting.folders import hold_folder
    from reweighting.report import finish
    from reweighting.run import build, find_checkpoint, run_settings, take_over
    from reweighting.signals import StopSignals

    with hold_folder(args.weights_path) as folder:
        settings = run_settings(args)
        if args.dry_run:
            from reweighting.dry_run import dry_run

            dry_run(args, settings, train_rows, meta_rows, candidates, folder)
            return
        place, state = find_checkpoint(args, settings, folder) or (None, None)
        engine = build(args, settings, train_rows, meta_rows, candidates, folder, state)
        take_over(args, folder, place)
        with StopSignals() as stop:
            engine.run(stop)
        finish(engine, folder)


if __name__ == "__main__":
    run_command(main, "the same command with --resume goes on from the last checkpoint")
