"""What a run will need and what is wrong with it, said before it is queued. Imports without torch."""

from gspo_megatron.plan.run_plan import Plan, check, make_plan

__all__ = ["Plan", "check", "make_plan"]
