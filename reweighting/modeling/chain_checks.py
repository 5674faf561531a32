"""A check of every chain that a command will read, before hours of computing."""

from collections.abc import Iterable

from reweighting.data.chains import Chain
from reweighting.errors import ChainTooLong, Problems, UserError
from reweighting.modeling.tokenization import ChainTokenizer


def check_chains(
    tokenizer: ChainTokenizer, chains: Iterable[Chain], drop_too_long: bool = False, purpose: str = ""
) -> list[int]:
    """Check that a model can take every chain.

    Args:
        tokenizer: the model's.
        chains: all chains of a command.
        drop_too_long: the caller leaves out the chains that are too long.
        purpose: what the user can do with --drop_too_long, for the message: "train without these chains".

    Returns:
        Positions of the chains that are too long; empty without `drop_too_long`.

    Raises:
        UserError: names the rows of the chains that `ChainTokenizer.check` refuses.
    """
    problems, too_long, count = Problems(), [], 0
    for position, chain in enumerate(chains):
        count += 1
        try:
            tokenizer.check(chain)
        except ChainTooLong as error:
            too_long.append(position)
            if not drop_too_long:
                problems.add(chain.source_location, str(error), kind=ChainTooLong)
        except UserError as error:
            problems.add(chain.source_location, str(error))
    if problems.count:
        lines = [f"{problems.count} of {count} chains cannot be used", *problems.lines()]
        if purpose and too_long and not drop_too_long:
            lines.append(f"To {purpose}: --drop_too_long")
        raise UserError("\n".join(lines))
    return too_long
