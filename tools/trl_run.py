"""The work of a recipe by TRL: its GSPO with Hugging Face's `generate`, on the same model, prompts and reward.

    .venv-trl/bin/python tools/trl_run.py RECIPE MODEL OUT [KEY=VALUE ...]

Run by `bench_against_trl.py` in an environment of its own. Prompts go in as ids: TRL's tokenizer here only writes and
reads numbers, and the responses are scored by the recipe's own scorer, from their ids. Writes the seconds of each step
and the held-out accuracy, greedy, before and after.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.stream import PromptStream
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.rewards.answer_text import THINK_END
from gspo_megatron.rewards.reward_input import make_input
from gspo_megatron.rewards.scorer import Scorer, make_scorer
from gspo_megatron.types import Prompt

PAD = 0


class Judge:
    """Scores ids of responses as the controller does."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.tokenizer = load_tokenizer(recipe.tokenizer, None)
        scorer = make_scorer(recipe)
        assert isinstance(scorer, Scorer)
        self._scorer = scorer

    def score(self, prompt: Prompt, ids: list[int]) -> float:
        """The reward of one response, cut behind its stop token."""
        stop = self.tokenizer.stop_ids[0]
        ends = stop in ids
        said = ids[: ids.index(stop)] if ends else ids
        text = self.tokenizer.decode(said)
        marker = self._recipe.reward.answer_marker
        judged = make_input(text, ids, "stop" if ends else "length", marker, THINK_END, False)
        return self._scorer(prompt.problem, judged).score


def write_word(number: int) -> str:
    """An id as a word that no other word holds: a special token is cut out of the middle of longer words too."""
    return f"<{number}>"


def number_tokenizer(vocab_size: int, stop: int) -> PreTrainedTokenizerFast:
    """Ids as words."""
    pad = write_word(PAD)
    words = Tokenizer(models.WordLevel({write_word(number): number for number in range(vocab_size)}, unk_token=pad))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token=write_word(stop), unk_token=pad, padding_side="left"
    )


class Clock(TrainerCallback):
    """Seconds between optimizer steps."""

    def __init__(self) -> None:
        self.ends = [time.monotonic()]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends = [time.monotonic()]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.monotonic())


@torch.no_grad()
def evaluate(model: Any, judge: Judge, prompts: list[Prompt], limit: int) -> float:
    """Held-out accuracy, greedy."""
    stop, longest = judge.tokenizer.stop_ids[0], max(len(prompt.token_ids) for prompt in prompts)
    rows = [[PAD] * (longest - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts]
    mask = [[int(place >= longest - len(prompt.token_ids)) for place in range(longest)] for prompt in prompts]
    found = model.generate(
        input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=limit,
        eos_token_id=stop, pad_token_id=PAD,
    )  # fmt: skip
    scores = [judge.score(prompt, row) for prompt, row in zip(prompts, found[:, longest:].tolist(), strict=True)]
    return sum(scores) / len(scores)


def settings(recipe: Recipe, out: Path) -> trl.GRPOConfig:
    """The recipe's objective and sizes in TRL's words."""
    batch, objective, optimizer = recipe.batch, recipe.objective, recipe.optimizer
    return trl.GRPOConfig(
        output_dir=str(out.parent / "trl"), use_cpu=True, bf16=False, seed=recipe.run.seed, report_to="none",
        save_strategy="no", logging_steps=1000, disable_tqdm=True, shuffle_dataset=False, dataloader_drop_last=True,
        num_generations=batch.answers, per_device_train_batch_size=batch.prompts * batch.answers // batch.updates,
        steps_per_generation=batch.updates, gradient_accumulation_steps=1, num_iterations=1,
        max_steps=recipe.trainer.max_steps * batch.updates, max_completion_length=recipe.rollout.max_answer_tokens,
        temperature=recipe.rollout.temperature, top_p=1.0, top_k=0, beta=0.0, loss_type="grpo",
        importance_sampling_level="sequence", epsilon=objective.clip_low, epsilon_high=objective.clip_high,
        scale_rewards="group", learning_rate=optimizer.lr, adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=optimizer.clip_grad,
        warmup_steps=optimizer.warmup_updates, lr_scheduler_type="constant_with_warmup", gradient_checkpointing=False,
        router_aux_loss_coef=recipe.trainer.aux_loss_coefficient,
    )  # fmt: skip


def main() -> None:
    """Train and write what was measured."""
    recipe_file, model_directory, out, *changes = sys.argv[1:]
    torch.set_num_threads(2)
    recipe = load_recipe(Path(recipe_file), changes)
    judge = Judge(recipe)
    stream = PromptStream(recipe, judge.tokenizer)
    held_out = stream.held_out(recipe.evaluation.problems)
    prompts = stream.next(recipe.trainer.max_steps * recipe.batch.prompts)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    before = evaluate(model, judge, held_out, recipe.rollout.max_answer_tokens)

    def reward(prompts: list[str], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        return [judge.score(by_number[one], ids) for one, ids in zip(number, completion_ids, strict=True)]

    by_number = {prompt.index: prompt for prompt in prompts}
    words = number_tokenizer(recipe.arch.vocab_size, judge.tokenizer.stop_ids[0])
    texts = [" ".join(map(write_word, one.token_ids)) for one in prompts]
    assert words(texts)["input_ids"] == [list(one.token_ids) for one in prompts]
    rows = [{"prompt": text, "number": one.index} for text, one in zip(texts, prompts, strict=True)]
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings(recipe, Path(out)),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
        callbacks=[clock],
    )
    trainer.train()
    ends = clock.ends[:: recipe.batch.updates]
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    found = {
        "seconds": [end - begin for begin, end in pairwise(ends)],
        "accuracy": [before, evaluate(trainer.model, judge, held_out, recipe.rollout.max_answer_tokens)],
        "rewards": rewards,
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
