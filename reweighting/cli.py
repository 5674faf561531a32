"""The command `dreamprm`: one name for the commands, each the same code as its script.

dreamprm train --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights
python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights
"""

import argparse
import sys

from reweighting import __version__
from reweighting.entrypoint import run_command

# name -> (module in `reweighting`, what it does). A new command is a module and a line here.
COMMANDS = {
    "train": ("main", "learn domain weights and a process reward model from rows of many domains"),
    "best-of-n": ("best_of_n", "choose the best of N candidate answers to each question"),
    "evaluate": ("evaluate", "measure step scores against step labels"),
    "convert": ("convert", "convert answers of any known format to canonical rows, and report what is in them"),
    "label": ("label", "make training rows, meta answers and candidates with a policy model"),
    "show": ("show", "write one question's answers, coloured by score, as an HTML page"),
}


def main() -> None:
    """Run the command that the first argument names, with the arguments behind it.

    Raises:
        SystemExit: with the command's exit code; 2 for a name that is no command.
    """
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dreamprm",
        description="Train and use domain-reweighted process reward models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listing}\n\n`dreamprm COMMAND --help` lists the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"dreamprm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"dreamprm {command}", *sys.argv[2:]]
    run_command(f"reweighting.{COMMANDS[command][0]}")


if __name__ == "__main__":
    main()
