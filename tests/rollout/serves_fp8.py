"""`gspo` whose servers hold fp8 on any CPU: `python -m tests.rollout.serves_fp8 train ...`.

vLLM's CPU kernels for blocks of fp8 also run without AMX, by AVX-512, but vLLM does not take them there, and so the
plan refuses them. Here both do: bytes, scales, loading and products are vLLM's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.rollout.jobs import SERVER
from tests.rollout.replaced_role import run_cli

HERE = "tests.rollout.serves_fp8"


def become_server() -> None:
    """Run a server with the two checks of vLLM answered."""
    from gspo_megatron.inference import server, vllm_plugin

    register = vllm_plugin.register

    def register_and_allow() -> None:
        register()
        # Not before: vLLM must not be imported until the server has set its environment.
        from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

        CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda *_: (True, None))  # pyright: ignore[reportAttributeAccessIssue]
        CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)

    vllm_plugin.register = register_and_allow
    server.main()


def main(arguments: Sequence[str]) -> int:
    """`gspo` itself; the servers that it starts come by here again."""
    if arguments[0] != "train":
        become_server()
        return 0
    from gspo_megatron.plan.rules import server_weights

    server_weights._device = lambda recipe, machine: iter(())
    return run_cli(arguments, SERVER, HERE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
