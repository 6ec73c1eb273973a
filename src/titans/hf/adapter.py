"""adapt: Titans memories beside the attention of a decoder of transformers, and their file."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from titans.config import MemoryConfig, build, to_dict
from titans.hf.adapted import FAMILIES, FIXED_ROTATIONS, AdaptedLM, AdapterConfig, base_facts
from titans.hf.model import TitansForCausalLM
from titans.state import check_header, digest, read_safetensors, write_safetensors

FORMAT_VERSION = 1
KIND = "memory-adapter"
FILE_NAME = "titans-adapter.safetensors"
INSIDE = {"model.base.": "", "model.memories.": "titans_memories."}


def adapt(
    model: Any,
    layers: Sequence[int],
    style: Literal["mag", "mal"] = "mag",
    memory: MemoryConfig | None = None,
    window: int | None = None,
) -> "AdaptedForCausalLM":
    """A model that computes what `model` does, bit for bit, until its memories are trained.

    model: a causal language model of transformers (Llama, Mistral, Qwen2, Qwen3, GPT-2). It shares
    its weights and is itself left as it is. layers, style, window: see `AdapterConfig`. memory:
    its width follows the base; None has a linear memory per attention head whose keys start one
    token behind the queries.

    Raises ValueError for another model, layers that it does not have, and a window that its
    positions are too few for.
    """
    if isinstance(model, AdaptedForCausalLM):
        raise ValueError("the model is adapted already: adapt its base anew")
    check_base(model)
    config = model.config
    if memory is None:
        memory = MemoryConfig(heads=config.num_attention_heads, key_init="previous")
    memory = replace(memory, dim=config.hidden_size)
    _ = memory.key_dim  # raises if the heads do not divide the width
    adapter = AdapterConfig(layers=tuple(layers), style=style, window=window, memory=memory)
    check_fit(config, adapter)
    return AdaptedForCausalLM(model, adapter)


def load_adapter(model: Any, path: str | Path) -> "AdaptedForCausalLM":
    """The model with the memories of a file of `save_adapter`, or of a folder with one.

    Raises ValueError of one line for a file that is missing, damaged, or made for a base of
    another shape. Two bases of one shape cannot be told apart: keep an adapter beside its base.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    tensors, metadata = read_safetensors(path)
    check_header(path, tensors, metadata, KIND, FORMAT_VERSION, "adapter")
    check_base(model)
    try:
        content = json.loads(metadata["adapter"])
        config, made_for = build(AdapterConfig, content["config"]), dict(content["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config does not fit this release ({error})") from None
    for name, value in base_facts(model.config).items():
        made = made_for.get(name)
        if made != value:
            raise ValueError(f"{path}: made for a base whose {name} is {made}, not {value}")
    adapted = adapt(model, config.layers, config.style, config.memory, config.window)
    memories = adapted.model.memories
    expected = {name: tuple(p.shape) for name, p in memories.named_parameters()}
    if expected != {name: tuple(t.shape) for name, t in tensors.items()}:
        raise ValueError(f"{path}: weights do not fit the config")
    memories.load_state_dict(tensors)
    return adapted


class AdaptedForCausalLM(TitansForCausalLM):
    """What `adapt` returns: the base, its memories, and the cache that carries them.

    Read, generated with and trained as `TitansForCausalLM`: `past_key_values` is a `TitansCache`,
    which also holds the base's keys and values; what is masked is not read. Parameters have the
    base's names, and `titans_memories.` before those of the memories. To be rid of the memories go
    on with `base`, in which nothing was replaced.
    """

    _tied_weights_keys: Any = None  # the base ties its own
    _no_split_modules: Any = None

    def __init__(self, base: Any, adapter: AdapterConfig) -> None:
        PreTrainedModel.__init__(self, base.config)
        self.model: AdaptedLM = AdaptedLM(base, adapter)
        self.generation_config = base.generation_config
        self.register_state_dict_post_hook(outside)
        self.register_load_state_dict_pre_hook(inside)
        self.post_init()
        self.train(base.training)

    @property
    def base(self) -> Any:
        """The model that was adapted."""
        return self.model.base

    @property
    def adapter(self) -> AdapterConfig:
        return self.model.adapter

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        """All that is not the base's: for an optimizer that trains the memories alone."""
        return self.model.memories.parameters()

    def freeze_base(self, frozen: bool = True) -> "AdaptedForCausalLM":
        """Train the memories alone, or (False) the base too. Returns the model."""
        self.base.requires_grad_(not frozen)
        return self

    def save_adapter(self, path: str | Path) -> None:
        """Write the memories' weights and how they were put in, as one safetensors file."""
        memories = self.model.memories
        tensors = {n: p.detach().cpu().contiguous() for n, p in memories.named_parameters()}
        content = json.dumps({"config": to_dict(self.adapter), "base": base_facts(self.config)})
        metadata = {
            "format": f"titans-{KIND}",
            "version": str(FORMAT_VERSION),
            "adapter": content,
            "sha256": digest(tensors, content),
        }
        write_safetensors(Path(path), tensors, metadata)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """The base's folder with an adapter in it, for `load_adapter(base, folder)`.

        The base's weight file holds the memories too, under names that the base does not know, so
        that Trainer resumes from its checkpoints.
        """
        if is_main_process:
            self.save_adapter(Path(save_directory) / FILE_NAME)
        state = self.state_dict() if state_dict is None else state_dict
        self.base.save_pretrained(save_directory, is_main_process, state, **options)

    @classmethod
    def from_pretrained(cls, *given: Any, **options: Any) -> Any:
        """Refused: the base's class loads the base, `load_adapter` the memories."""
        raise ValueError("load the base as before, then titans.load_adapter(base, path)")

    def initialize_weights(self) -> None:
        """Nothing: the base has its weights, and the memories drew theirs."""

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *given: Any, **options: Any) -> nn.Embedding:
        """The base's own; memories of before stay valid."""
        return self.base.resize_token_embeddings(*given, **options)


def check_base(model: Any) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"expected a causal language model of type {', '.join(FAMILIES)}, "
            f"got a {type(model).__name__}"
        )
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError("expected a decoder without cross attention")


def check_fit(base: Any, adapter: AdapterConfig) -> None:
    """ValueError unless the base has such layers, and positions for the window."""
    layers, count = adapter.layers, base.num_hidden_layers
    if not layers or len(set(layers)) < len(layers) or not 0 <= min(layers) <= max(layers) < count:
        raise ValueError(f"expected distinct layers of 0 ... {count - 1}, got {list(layers)}")
    if adapter.window is None:
        return
    needed, most = adapter.window, base.max_position_embeddings
    if base.model_type != "gpt2":
        needed *= 2
        rotation = base.rope_parameters["rope_type"]
        if rotation not in FIXED_ROTATIONS:
            raise ValueError(
                f"a window needs rotary positions of type {', '.join(FIXED_ROTATIONS)}, "
                f"got {rotation!r}"
            )
    if needed > most:
        raise ValueError(
            f"a window of {adapter.window} needs {needed} positions, the base has {most}"
        )


def outside(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A state dict's names as the base has them."""
    for name in list(state):
        for long, short in INSIDE.items():
            if name.startswith(prefix + long):
                state[prefix + short + name.removeprefix(prefix + long)] = state.pop(name)
                break


def inside(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """And back, for loading."""
    base, memories = INSIDE
    for name in list(state):
        own = name.removeprefix(prefix)
        if own.startswith(INSIDE[memories]):
            state[prefix + memories + own.removeprefix(INSIDE[memories])] = state.pop(name)
        elif name.startswith(prefix):
            state[prefix + base + own] = state.pop(name)
