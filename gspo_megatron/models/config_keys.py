"""What a key of a `config.json` means: the rows from which every family writes the table of its keys.

transformers decides: its names, its defaults, its order of precedence. A test compares the tables with the
configuration classes and the model code of the pinned transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REFUSED = object()
"""A key that transformers does not take null for."""
HEADS = object()
"""num_attention_heads of the same model."""
QUOTIENT = object()
"""hidden_size / num_attention_heads of the same model, rounded down."""


@dataclass(frozen=True, slots=True)
class Field:
    """A key that becomes a field of the typed architecture."""

    default: Any
    """What transformers takes where the key is absent: a value, `HEADS` or `QUOTIENT`."""
    null: Any = REFUSED
    """What it takes for null."""


@dataclass(frozen=True, slots=True)
class Only:
    """A key that runs with some values only. Absent is one of them."""

    values: tuple[Any, ...]
    """Those that the trainer computes; the first is the one to set."""
    each: bool = False
    """The key holds a list, one entry a layer, each of which must be one of the values."""

    def allows(self, value: Any, layers: Any) -> bool:
        """Whether the trainer computes this value, in a model of so many layers."""
        if not self.each:
            return any(_same(value, allowed) for allowed in self.values)
        if value is None:
            return True
        return isinstance(value, list) and len(value) == layers and all(item in self.values for item in value)


def _same(value: Any, allowed: Any) -> bool:
    """Equal and of one kind: true is no 1, and 0 is no false."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Every key of one `model_type` that changes what the model computes; those of rotary embeddings: `rope.KEYS`."""

    fields: Mapping[str, Field]
    """Keys that the trainer reads."""
    only: Mapping[str, Only]
    """Keys of the family that it computes with some values only; an export writes the first of them."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other name -> key (transformers' `attribute_map`). The other name wins, as it does there."""

    def allowed(self, name: str) -> Only | None:
        """The values of a key that runs with some only."""
        return self.only.get(name) or ANY_MODEL.get(name)

    def written(self) -> dict[str, Any]:
        """What an export says of the keys that run with some values only."""
        return {name: row.values[0] for name, row in self.only.items() if not row.each}


ANY_MODEL = {
    "is_causal": Only((True,)),
    "is_encoder_decoder": Only((False,)),
    "layer_types": Only(("full_attention", "attention"), each=True),
    "per_layer_config": Only((None, {})),
    "pruned_heads": Only((None, {})),
    "quantization_config": Only((None,)),
    "compression_config": Only((None,)),
    "transformers_weights": Only((None,)),
    "attribute_map": Only((None,)),
    **dict.fromkeys(("text_config", "text_encoder", "decoder", "generator"), Only((None,))),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"), Only((0, None))),
}
"""Keys that transformers reads in every model, a configuration within it among them; and those of shared experts, which
it reads in other families only: a file that has some is no model of one of these."""
FIELDS = {
    "rms_norm_eps": Field(1e-6),
    "initializer_range": Field(0.02),
    "tie_word_embeddings": Field(False),
}
"""Fields with the same default in every family."""
DENSE = {
    "num_experts": Field(0),
    "num_experts_per_tok": Field(0),
    "moe_intermediate_size": Field(0),
    "norm_topk_prob": Field(False),
}
"""What a dense model must not have, or what says nothing there."""
ONLY = {
    "hidden_act": Only(("silu", "swish")),
    "attention_bias": Only((False,)),
    "attention_dropout": Only((0.0,)),
    "use_sliding_window": Only((False,)),
}
"""The same in every family; swish is transformers' other name of silu."""

_RUNNING = """
architectures auto_map dtype torch_dtype transformers_version _name_or_path name_or_path model_max_length
attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
experts_implementation _experts_implementation_internal chunk_size_feed_forward use_cache torchscript use_bfloat16
use_return_dict return_dict output_hidden_states output_attentions unsloth_fixed unsloth_version
transformers.js_config tokenizer_class prefix
"""
"""What the file is, and how transformers runs it."""
_UNUSED = """
sliding_window max_window_layers output_router_logits router_aux_loss_coef id2label label2id num_labels problem_type
finetuning_task task_specific_params tie_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
tf_legacy_loss
"""
"""Of sliding windows, which are off; of the auxiliary loss, which the recipe sets; of the heads of other tasks."""
_SAMPLING = """
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length max_new_tokens
do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
"""Token ids and sampling: generation_config.json, the tokenizer and the recipe decide."""
IGNORED = frozenset((_RUNNING + _UNUSED + _SAMPLING).split())
"""Keys that change no log-prob in any of the families."""
