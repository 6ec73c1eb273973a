"""transformers' own common tests of models and of generation, on ours.

They are in its repository and in no package, so they run where TRANSFORMERS_SOURCE names a checkout
of the installed version (and `parameterized` and `accelerate` are there). Tests that cannot apply
are excluded by name, each with its reason.
"""

import os
import sys
import unittest
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("TRANSFORMERS_SOURCE names no checkout of transformers", allow_module_level=True)
sys.path.insert(0, str(Path(SOURCE)))

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402

from titans.baselines import BASELINES  # noqa: E402
from titans.hf import TitansCache, TitansForCausalLM, TitansHFConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

CHECKPOINTING = (
    "looks for transformers' checkpointing layer, which drops the state; "
    "TitansLM checkpoints its blocks itself (test_hf_training.py)"
)
EXCLUDED = dict.fromkeys(
    (
        "test_gradient_checkpointing_enable_disable",
        "test_training_gradient_checkpointing",
        "test_training_gradient_checkpointing_use_reentrant_false",
        "test_training_gradient_checkpointing_use_reentrant_true",
    ),
    CHECKPOINTING,
)


# In versions after 5.0. The list names what any variant keeps.
FOR_TITANS_ALONE = {
    "test_keep_in_fp32_modules_exist": "baselines have no learned M_0, and some have no gates"
}


class ModelTester:
    """A tiny model and inputs, with the names that the mixins read."""

    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 16, 2, 2
    is_training = True

    def __init__(self, parent: unittest.TestCase, variant: str) -> None:
        self.parent, self.variant = parent, variant

    def get_config(self) -> TitansHFConfig:
        return TitansHFConfig(
            variant=self.variant,
            vocab_size=self.vocab_size,
            dim=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            ffn_hidden=24,
            window=5,
            segment=4,
            persistent=2,
            memory={"heads": 2},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[TitansHFConfig, dict]:
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class CommonTests(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (TitansForCausalLM,)
    all_generative_model_classes = (TitansForCausalLM,)
    pipeline_model_mapping = {"text-generation": TitansForCausalLM}  # noqa: RUF012
    has_attentions = False
    variant: str

    def setUp(self) -> None:
        reason = EXCLUDED.get(self._testMethodName)
        if self.variant in BASELINES:
            reason = reason or FOR_TITANS_ALONE.get(self._testMethodName)
        if reason is not None:
            self.skipTest(reason)
        self.model_tester = ModelTester(self, self.variant)
        self.config_tester = ConfigTester(self, config_class=TitansHFConfig)

    def _prepare_for_class(
        self, inputs: dict, model_class: type, return_labels: bool = False
    ) -> dict:
        """With labels for a class that is in none of transformers' lists."""
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        return {**inputs, "labels": inputs["input_ids"]} if return_labels else inputs

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: TitansCache, seq_length: int, config: TitansHFConfig
    ) -> None:
        """The cache is one layer of memories, not a layer of keys and values per block."""
        assert isinstance(past_key_values, TitansCache)
        assert past_key_values.memory.batch_size == batch_size
        assert past_key_values.get_seq_length() == seq_length
        assert past_key_values.state.position == seq_length
        assert len(past_key_values.state.blocks) == config.num_hidden_layers

    def test_left_padding_compatibility(self) -> None:
        self.has_attentions = True  # else it takes the model for one without padding
        super().test_left_padding_compatibility()

    def test_config(self) -> None:
        # It makes models of width 0, which our configuration refuses.
        self.config_tester.create_and_test_config_common_properties = lambda: None
        self.config_tester.run_common_tests()


for variant in ("lmm", "mac", "mag", "mal", "transformer", "rwkv7", "gated-deltanet-h2"):
    name = "Test" + variant.upper().replace("-", "")
    globals()[name] = type(name, (CommonTests, unittest.TestCase), {"variant": variant})
