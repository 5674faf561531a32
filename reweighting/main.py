"""Learn domain weights and a process reward model from two JSON files.

python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `reweighting` is found from anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load ends without a traceback

from reweighting.config.training import parse_arguments  # noqa: E402
from reweighting.distributed.rank0_output import rank0_output  # noqa: E402
from reweighting.entrypoint import run_command  # noqa: E402


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    args = parse_arguments(argv)

    from reweighting.devices import choose_device
    from reweighting.distributed.collectives import check_same_on_all_ranks, process_group
    from reweighting.training.build import build
    from reweighting.training.dry_run import dry_run
    from reweighting.training.output_dir import lock_output_dir, prepare_output_dir
    from reweighting.training.results import finish
    from reweighting.training.resume import find_checkpoint, run_settings
    from reweighting.training.run_data import read_run_data
    from reweighting.training.signals import StopSignals

    with process_group(choose_device(args.device)):
        data = read_run_data(args)  # every row is checked before a model is loaded
        with lock_output_dir(args.weights_path) as folder:
            settings = run_settings(args)
            check_same_on_all_ranks(settings)
            if args.dry_run:
                dry_run(args, settings, data, folder)
                return
            place, state = find_checkpoint(args, settings, folder) or (None, None)
            engine = build(args, settings, data, folder, state)
            prepare_output_dir(args, folder, place)
            with StopSignals() as stop:
                engine.run(stop)
            finish(engine, folder)


if __name__ == "__main__":
    with rank0_output():
        run_command(main, "the same command with --resume goes on from the last checkpoint")
