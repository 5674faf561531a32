"""Time in the parts of a run that a benchmark does not call itself.

watch = Stopwatch(time.process_time)
watch.watch(problem, "domain_loss", "forward")      # of an object, or of a class
watch.seconds["forward"]
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Adds up the seconds in methods, by part; what is called inside of one counts for that one alone.

    Args:
        clock: gives seconds.

    Attributes:
        seconds: so far, by part.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def watch(self, owner: object, method: str, part: str) -> None:
        """Time a method of an object, or of all objects of a class, as a part."""
        watched = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return watched(*args, **kwargs)
            self._inside, started = True, self.clock()
            try:
                return watched(*args, **kwargs)
            finally:
                self.seconds[part] += self.clock() - started
                self._inside = False

        setattr(owner, method, timed)
