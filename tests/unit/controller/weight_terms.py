"""What a weight update over fake servers starts from."""

from __future__ import annotations

from gspo_megatron.parallel import Layout
from gspo_megatron.transport.update_messages import WeightTerms
from tests.shards import ARCH

TERMS = WeightTerms(architecture=ARCH, dtype="float32", trainer=Layout(1))


class NoStore:
    port = 1
