"""What a run will need and what is wrong with it, said before it is queued. Imports without torch."""

from gspo_megatron.plan.run_plan import Plan, check, check_evaluation, make_plan

__all__ = ["Plan", "check", "check_evaluation", "make_plan"]
