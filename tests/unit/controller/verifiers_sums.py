"""A taskset of the library `verifiers` with one sum. Its Python imports this file, ours does not."""

import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

__all__ = ["Sums"]


class Sum(vf.Task):
    @vf.reward
    async def right(self, trace):
        return float(trace.last_reply == "1853")


class Sums(vf.Taskset):
    def load(self):
        yield Sum(vf.TaskData(prompt="Calculate 879 + 974."), self.config.task)
