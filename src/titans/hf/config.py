"""TitansHFConfig: the fields of `TitansConfig`, as transformers keeps configurations."""

import os
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

from titans.config import TitansConfig, build, to_dict
from titans.hf.folder import AUTO_MAP, write_code

NAMES = tuple(field.name for field in fields(TitansConfig))


class TitansHFConfig(PreTrainedConfig):
    """`TitansHFConfig(variant="mag", dim=64, memory={"heads": 2})`: fields as in `TitansConfig`,
    under transformers' names too (`hidden_size` is `dim`); `memory` is a dict.

    It has no `layer_types`: transformers knows a fixed set of them, and refuses others on saving.
    Raises ValueError for a field of `memory` or a value that `TitansConfig` would refuse.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' form)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "intermediate_size": "ffn_hidden",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, use_cache: bool = True, **given: Any) -> None:
        for theirs, ours in self.attribute_map.items():
            if theirs in given:
                given[ours] = given.pop(theirs)
        own = {name: given.pop(name) for name in NAMES if name in given}
        if is_dataclass(own.get("memory")):
            own["memory"] = to_dict(own["memory"])
        for name, value in to_dict(build(TitansConfig, own)).items():
            setattr(self, name, value)
        self.use_cache = use_cache
        super().__init__(**given)
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def from_titans(cls, config: TitansConfig, **given: Any) -> "TitansHFConfig":
        """The same model; `given` are transformers' own fields, e.g. `eos_token_id`."""
        return cls(**to_dict(config), **given)

    def to_titans(self) -> TitansConfig:
        """The configuration of the model itself, checked."""
        return build(TitansConfig, {name: getattr(self, name) for name in NAMES})

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Also writes the code that loads the model where this package is not installed.

        Here and not in the model's `save_pretrained`, which calls this one before it uploads.
        """
        self.auto_map = dict(AUTO_MAP)
        write_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: `save_pretrained` writes the code and `auto_map` in any case."""
