"""The formats of process supervision data that people have, one short file each.

reader = find_reader(raw)                                    # by the row's fields
answers = reader.model_validate(raw).answers(ReadingOptions())   # fields of canonical rows
"""

from typing import Any

from reweighting.data.readers.base import LeftOut, RawRow, ReadingOptions
from reweighting.data.readers.bigbench_mistake import BigBenchMistake
from reweighting.data.readers.dreamprm_1_5 import DreamPRMMeta, DreamPRMTest
from reweighting.data.readers.gsm8k import GSM8K, GSM8KSolutions
from reweighting.data.readers.llava import Llava
from reweighting.data.readers.math_shepherd import MathShepherd, OpenRLHF
from reweighting.data.readers.mm_prm import MMPRM
from reweighting.data.readers.mr_ben import MrBen
from reweighting.data.readers.prm800k import PRM800K
from reweighting.data.readers.prmbench import PRMBench
from reweighting.data.readers.processbench import ProcessBench
from reweighting.data.readers.responses import Responses
from reweighting.data.readers.rlhflow import RLHFlow, RLHFlowTest
from reweighting.data.readers.stepwise import Stepwise
from reweighting.data.readers.visualprm import VisualPRM, VisualPRMRaw, VisualProcessBench

__all__ = ["READERS", "LeftOut", "RawRow", "ReadingOptions", "find_reader"]

# In this order: a row is of the first format that matches, so those with few required fields stand last.
READERS: dict[str, type[RawRow]] = {
    reader.name: reader
    for reader in (ProcessBench, BigBenchMistake, PRMBench, MrBen, Stepwise, PRM800K, MathShepherd, OpenRLHF, RLHFlow,
                   RLHFlowTest, VisualPRM, VisualPRMRaw, VisualProcessBench, DreamPRMMeta, DreamPRMTest, MMPRM,
                   GSM8K, GSM8KSolutions, Llava, Responses)
}  # fmt: skip


def find_reader(raw: Any) -> type[RawRow] | None:
    """Return the reader of the format that a row is of, None if no format matches."""
    return next((reader for reader in READERS.values() if reader.matches(raw)), None)
