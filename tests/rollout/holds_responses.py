"""`gspo` whose controller keeps responses in flight while the trainer works, and asks the run to stop in step 3.

`python -m tests.rollout.holds_responses train ...`. What a checkpoint finds in flight is then decided by the test, not
by how fast the servers are.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.rollout.jobs import CONTROLLER
from tests.rollout.replaced_role import run_cli

HERE = "tests.rollout.holds_responses"
FIRST_PART = 4
"""Tokens after which a response waits for the next rollout."""
STOP_STEP = 3


def become_controller() -> None:
    """Run the controller with responses that wait; returns when the run ends."""
    from gspo_megatron.controller import main
    from gspo_megatron.controller.controller import Controller
    from gspo_megatron.controller.generation import Generation, Sampling
    from gspo_megatron.controller.server_client import ServerClient
    from gspo_megatron.transport.messages import Empty, RolloutRequest

    rolling_out, held = asyncio.Event(), asyncio.Event()
    generate, rollout, state = ServerClient.generate, Controller.rollout, Controller.state

    async def generate_in_parts(client: Any, generation: Generation, sampling: Sampling, version: Any) -> Any:
        # Evaluations are greedy, and the trainer waits for them.
        if not generation.parts and sampling.temperature and sampling.max_tokens > FIRST_PART:
            reason = await generate(client, generation, replace(sampling, max_tokens=FIRST_PART), version)
            if reason != "length":
                return reason
            held.set()
            while not rolling_out.is_set() or version() is None:
                await asyncio.sleep(0.01)
        return await generate(client, generation, sampling, version)

    async def roll_out(controller: Any, request: RolloutRequest) -> Any:
        if request.step == STOP_STEP:
            os.kill(os.getppid(), signal.SIGUSR1)
        rolling_out.set()
        try:
            return await rollout(controller, request)
        finally:
            rolling_out.clear()
            held.clear()

    async def save(controller: Any, request: Empty) -> Any:
        await held.wait()
        return await state(controller, request)

    for owner, name, method in (
        (ServerClient, "generate", generate_in_parts), (Controller, "rollout", roll_out), (Controller, "state", save),
    ):  # fmt: skip
        setattr(owner, name, method)
    main.main()


def main(arguments: Sequence[str]) -> int:
    """`gspo` itself; the controller that it starts comes by here again."""
    if arguments[0] == "train":
        return run_cli(arguments, CONTROLLER, HERE)
    become_controller()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
