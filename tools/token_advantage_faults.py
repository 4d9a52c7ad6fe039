"""Faults of critic and teacher that planted_faults_objective.py plants: name, file, what is there, what is planted."""

from __future__ import annotations

CRITIC_FAULTS = (
    ("value loss without its band", "value.py", "torch.maximum(error, bounded) / 2", "error / 2"),
    (
        "value loss by the smaller of both errors",
        "value.py",
        "torch.maximum(error, bounded) / 2",
        "torch.minimum(error, bounded) / 2",
    ),
    ("value band around the return", "value.py", "old + (values - old).clamp(", "returns + (values - returns).clamp("),
    ("value loss twice as large", "value.py", "torch.maximum(error, bounded) / 2", "torch.maximum(error, bounded)"),
    (
        "a gradient into the returns",
        "value.py",
        "packed.trained(inputs.returns.detach())",
        "packed.trained(inputs.returns)",
    ),
    (
        "value loss averaged over this micro-batch",
        "value.py",
        "/ 2 * weights).sum()",
        "/ 2).sum() / packed.mask.sum().clamp(min=1)",
    ),
    (
        "explained variance without the mean taken off",
        "value.py",
        'value["residual_square"] / tokens - (value["residual"] / tokens) ** 2',
        'value["residual_square"] / tokens',
    ),
    (
        "value coefficient read but not applied",
        "loss.py",
        "share + spec.value_coefficient * value_share",
        "share + value_share",
    ),
    (
        "GAE bootstraps over the end of a response",
        "advantages.py",
        "sequence, next_value, next_advantage = sequence - 1, 0.0, 0.0",
        "sequence = sequence - 1",
    ),
    ("GAE without lambda", "advantages.py", "discount * decay * next_advantage", "discount * next_advantage"),
    (
        "advantages over the std of one micro-batch",
        "advantages.py",
        "return [torch.where(flat, 0.0, one / (std + eps)) for one in centered]",
        "return [one / (one.std(correction=0) + eps) for one in centered]",
    ),
    (
        "prompts counted in the mean advantage",
        "advantages.py",
        "(mask.sum(dtype=torch.float64) for mask in loss_masks), nothing)",
        "(torch.ones_like(mask).sum(dtype=torch.float64) for mask in loss_masks), nothing)",
    ),
)
TEACHER_FAULTS = (
    (
        "a teacher's advantage with the other sign",
        "advantages.py",
        "teacher.double() - old.double()",
        "old.double() - teacher.double()",
    ),
    (
        "a teacher's advantage at untrained positions",
        "advantages.py",
        "return torch.where(loss_mask, teacher.double() - old.double(), 0.0)",
        "return teacher.double() - old.double()",
    ),
    (
        "a teacher's advantage in float32",
        "advantages.py",
        "teacher.double() - old.double()",
        "teacher.float() - old.float()",
    ),
    (
        "divergence from the teacher with the other sign",
        "loss.py",
        "metrics[TEACHER_KL] = -advantages.sum()",
        "metrics[TEACHER_KL] = advantages.sum()",
    ),
)
