"""AdaptedLM: a decoder of transformers, read layer by layer, with memories beside its attention.

The base's own modules are called (norms, attention, feed-forward), so its weights are shared and
nothing in it is replaced; keys and values are part of the state, as the memories are. What differs
between the families is what their parts are called, and how they know positions.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from titans.config import MemoryConfig, TitansConfig, check_fields, hashed_fields
from titans.distributed import Peers
from titans.layers.memory import MemoryRecord, MemoryState, NeuralMemory
from titans.models.lm import HiddenOutput, TitansLM
from titans.models.parts import Combine
from titans.state import ModelState, State


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What `adapt` puts into a model."""

    layers: tuple[int, ...]
    """Of the base that get a memory, counted from 0."""
    style: Literal["mag", "mal"] = "mag"
    """mag: attention and memory read the same side by side, and the memory's gated read is added.
    mal: the memory reads first, and attention reads the stream with the memory's read in it."""
    window: int | None = None
    """Tokens that attention reaches; None is all, as in the base. Rotary bases: the token and the
    window - 1 before it, at positions below 2 window. Learned positions (GPT-2) cannot be moved:
    attention begins anew every window tokens."""
    memory: MemoryConfig
    """`dim` follows the base."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


@dataclass(frozen=True)
class Family:
    """What a family calls its parts: of the model, the decoder, and a layer."""

    decoder: str
    embedding: str
    layers: str
    last_norm: str
    first_norm: str
    attention: str
    second_norm: str


ROTARY = Family(
    "model",
    "embed_tokens",
    "layers",
    "norm",
    "input_layernorm",
    "self_attn",
    "post_attention_layernorm",
)
FAMILIES = {
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": ROTARY,
    "gpt2": Family("transformer", "wte", "h", "ln_f", "ln_1", "attn", "ln_2"),
}
# Kinds of rotary positions whose frequencies do not depend on the length that was read.
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class AdaptedState(State):
    """What one layer remembers.

    keys, values: (B, H, tokens, D), as far as its attention reaches, rotated where the base
    rotates. position: tokens read. memory: None in a layer without one.
    """

    keys: Tensor
    values: Tensor
    position: int
    memory: MemoryState | None


class MemoryBeside(nn.Module):
    """A memory whose contribution is zero at first: its last map starts at zero.

    mal: the memory's own read. mag: W (norm(y) act(norm(m))), W zero at first: the paper's gate
    (v1 eq. 28) between attention y and memory m, added to y, which the base is used to.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.memory = NeuralMemory(config.memory)
        self.combine: Combine | None = None
        last = self.memory.output
        if config.style == "mag":
            width = config.memory.dim
            self.combine = Combine(TitansConfig(dim=width, heads=1))
            self.output = last = nn.Linear(width, width, bias=False)
        nn.init.zeros_(last.weight)

    def read(
        self, x: Float[Tensor, "b t d"], state: MemoryState, write: bool
    ) -> tuple[Float[Tensor, "b t d"], MemoryState, MemoryRecord]:
        """In the precision of the memory's own weights, whatever the base's."""
        return self.memory.run(x.to(self.memory.qkv.weight.dtype), state, write)

    def gated(
        self, attention: Float[Tensor, "b t d"], read: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What is added to the attention's output."""
        assert self.combine is not None
        return self.output(self.combine(attention, read))


class KeysAndValues:
    """Stands in for transformers' cache in one layer: earlier keys and values before the new."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *layer: Any, **more: Any) -> tuple[Tensor, ...]:
        # Under autocast the new ones have another dtype than those before them. Nothing before
        # them is left out, so that they keep their order in memory, and sums round as the base's.
        if self.keys.shape[2]:
            keys = torch.cat([self.keys.to(keys.dtype), keys], 2)
            values = torch.cat([self.values.to(values.dtype), values], 2)
        self.keys, self.values = keys, values
        return keys, values


class AdaptedBlock:
    """One layer of the base and its memory, as a function of the stream and a state.

    x + attention(norm(x)), then x + mlp(norm(x)), as the base computes it, bit for bit.
    """

    def __init__(
        self, base: Any, layer: int, config: AdapterConfig, memory: MemoryBeside | None
    ) -> None:
        self.family = FAMILIES[base.config.model_type]
        self.config, self.base_config, self.memory = config, base.config, memory
        decoder = getattr(base, self.family.decoder)
        self.layer = getattr(decoder, self.family.layers)[layer]
        self.rotary = getattr(decoder, "rotary_emb", None)
        own = sliding_window(base.config, layer)
        window = None if self.rotary is None else config.window
        reaches = [reach for reach in (window, own) if reach is not None]
        self.reach = min(reaches) if reaches else None

    def init_state(self, batch_size: int) -> AdaptedState:
        config = self.base_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        like = next(self.layer.parameters())
        empty = like.new_zeros(batch_size, heads, 0, size).detach()
        memory = None if self.memory is None else self.memory.memory.init_state(batch_size)
        return AdaptedState(keys=empty, values=empty.clone(), position=0, memory=memory)

    def __call__(
        self,
        x: Float[Tensor, "b t d"],
        state: AdaptedState | None,
        write: bool = True,
        peers: Peers | None = None,
    ) -> tuple[Float[Tensor, "b t d"], AdaptedState, MemoryRecord | None]:
        """As `Block`: x of the next layer, the state after it, what the memory did."""
        if peers is not None:
            raise ValueError("an adapted model cannot share one text among processes")
        if state is None:
            state = self.init_state(x.shape[0])
        first_norm = getattr(self.layer, self.family.first_norm)
        second_norm = getattr(self.layer, self.family.second_norm)
        seen = first_norm(x)
        remembered, record, read = state.memory, None, None
        if self.memory is not None:
            assert remembered is not None
            read, remembered, record = self.memory.read(seen, remembered, write)
            if self.config.style == "mal":
                x = x + read.to(x.dtype)
                seen = first_norm(x)
        y, keys, values = self.attend(seen, state)
        if self.memory is not None and read is not None and self.config.style == "mag":
            y = y + self.memory.gated(y, read).to(y.dtype)
        x = x + y
        x = x + self.layer.mlp(second_norm(x))
        after = AdaptedState(
            keys=keys, values=values, position=state.position + x.shape[1], memory=remembered
        )
        return x, after, record

    def attend(self, x: Tensor, state: AdaptedState) -> tuple[Tensor, Tensor, Tensor]:
        """The base's attention; with a window block by block, blocks lying at its multiples."""
        keys, values, position = state.keys, state.values, state.position
        window, outputs = self.config.window, []
        for piece in blocks(x, position, window):
            if window is not None and position and position % window == 0:
                keys, values = self.next_block(keys, values, position, window)
            y, keys, values = self.attend_block(piece, keys, values, position)
            outputs.append(y)
            position += piece.shape[1]
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], keys, values

    def attend_block(
        self, x: Tensor, keys: Tensor, values: Tensor, position: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        past = KeysAndValues(keys, values)
        given: dict[str, Any] = {}
        if self.rotary is not None:
            ids = places(position, x.shape[1], self.config.window, True, x.device)
            given["position_embeddings"] = self.rotary(x, position_ids=ids)
        mask = causal_mask(x, keys.shape[2], self.reach, self.base_config._attn_implementation)
        attention = getattr(self.layer, self.family.attention)
        y = attention(hidden_states=x, attention_mask=mask, past_key_values=past, **given)[0]
        keys, values = past.keys, past.values
        if self.reach is not None and keys.shape[2] >= self.reach:
            begin = keys.shape[2] - self.reach + 1
            keys, values = kept(keys, begin), kept(values, begin)
        return y, keys, values

    def next_block(
        self, keys: Tensor, values: Tensor, position: int, window: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values for the block that begins at `position`, a multiple of the window.

        Positions restart: what was the new block, from `window` on, becomes the old one, from 0
        on, and its keys are rotated back by `window`. The first block began at 0 already.
        """
        if self.rotary is None:
            return keys[:, :, :0], values[:, :, :0]
        if position == window:
            return keys, values
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        angle = window * self.rotary.inv_freq.to(wide)
        cos, sin = angle.cos(), angle.sin()
        a, b = wide.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1).to(keys.dtype), values


class AdaptedLM(TitansLM):
    """A base of transformers with memories: read, streamed and saved as a `TitansLM`.

    base: the model of transformers, which stays as it was. memories: by layer.
    """

    def __init__(self, base: Any, config: AdapterConfig) -> None:
        nn.Module.__init__(self)  # the parts are the base's
        self.base, self.adapter = base, config
        self.config = base.config
        self.config_hash = adapter_hash(base.config, config)
        self.gradient_checkpointing = False
        self.tokenizer = None
        self.peers = self.team = None
        self.cuts = {}
        self.memories = nn.ModuleDict({str(layer): MemoryBeside(config) for layer in config.layers})
        like = next(base.parameters())
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.memories.to(like.device, wide)
        family = FAMILIES[base.config.model_type]
        self.decoder_name, self.embedding_name = family.decoder, family.embedding
        self.norm_name = family.last_norm
        # Not a ModuleList: its parameters are the base's and the memories'.
        blocks: Any = tuple(
            AdaptedBlock(base, layer, config, self.memory_of(layer))
            for layer in range(base.config.num_hidden_layers)
        )
        self.blocks = blocks

    def memory_of(self, layer: int) -> MemoryBeside | None:
        if str(layer) not in self.memories:
            return None
        memory = self.memories[str(layer)]
        assert isinstance(memory, MemoryBeside)
        return memory

    @property
    def decoder(self) -> Any:
        return getattr(self.base, self.decoder_name)

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        return getattr(self.decoder, self.embedding_name)

    @property
    def norm(self) -> Any:  # type: ignore[override]
        return getattr(self.decoder, self.norm_name)

    @property
    def head(self) -> Any:  # type: ignore[override]
        return self.base.lm_head

    def reset_parameters(self) -> None:
        """Refused: the base's weights are not this package's to draw."""
        raise ValueError("an adapted model is not drawn anew: adapt the base again")

    def save(self, path: Any, dtype: torch.dtype | None = None) -> None:
        """Refused: a base is saved by transformers, its memories by `save_adapter`."""
        raise ValueError("an adapted model is saved by save_adapter, and its base by itself")

    def init_state(self, batch_size: int = 1) -> ModelState:
        """The state before the first token."""
        made: Any = self.blocks
        blocks = tuple(block.init_state(batch_size) for block in made)
        return ModelState(blocks=blocks, position=0, config_hash=self.config_hash)

    def read(
        self,
        x: Float[Tensor, "b t d"],
        state: ModelState | None = None,
        write: bool = True,
        inputs: list[Tensor] | None = None,
    ) -> HiddenOutput:
        """`TitansLM.read`, after the base's learned positions where it has such."""
        learned = getattr(self.decoder, "wpe", None)
        if learned is not None:
            position, length = 0 if state is None else state.position, x.shape[1]
            window, most = self.adapter.window, learned.num_embeddings
            if window is None and position + length > most:
                raise ValueError(
                    f"the base has {most} positions, the text {position + length} tokens: "
                    "adapt it with a window to read on"
                )
            x = self.decoder.drop(x + learned(places(position, length, window, False, x.device)))
        return super().read(x, state, write, inputs)


def kept(x: Tensor, begin: int) -> Tensor:
    """Tokens (B, H, T, D) from `begin` on, copied: a view would keep the whole text alive."""
    return x[:, :, begin:].transpose(1, 2).contiguous().transpose(1, 2)


def blocks(x: Tensor, position: int, window: int | None) -> Iterator[Tensor]:
    """(B, T, D) cut where the stream is at a multiple of the window."""
    begin = 0
    while begin < x.shape[1]:
        end = x.shape[1] if window is None else begin + window - (position + begin) % window
        yield x[:, begin:end].contiguous()  # as GPT-2 wants it
        begin = end


def places(
    position: int, length: int, window: int | None, moved: bool, device: torch.device
) -> Tensor:
    """Position ids (1, T) of tokens that stand in one block, or, not moved, in several.

    moved: the block before keeps 0 ... window - 1, so that a block stands behind it.
    """
    ids = torch.arange(position, position + length, device=device)[None]
    if window is None:
        return ids
    return ids % window + (window if moved and position >= window else 0)


def causal_mask(x: Tensor, past: int, reach: int | None, attention: str) -> Tensor | None:
    """(1, 1, T, past + T) for T tokens after `past` others, each of which sees `reach` tokens; the
    mask that transformers' own models make, None where they make none."""
    length, total = x.shape[1], past + x.shape[1]
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"expected attention 'sdpa' or 'eager', got {attention!r}: "
            "base.set_attn_implementation('sdpa')"
        )
    shorter = reach is None or total <= reach
    if attention == "sdpa" and shorter and (past == 0 or length == 1):
        return None  # its own causal mask, or no mask at all
    queries = torch.arange(past, total, device=x.device)[:, None]
    keys = torch.arange(total, device=x.device)
    seen = keys <= queries
    if reach is not None:
        seen &= keys > queries - reach
    if attention == "sdpa":
        return seen[None, None]
    zero, least = x.new_zeros(()), x.new_full((), torch.finfo(x.dtype).min)
    return torch.where(seen, zero, least)[None, None]


def sliding_window(config: Any, layer: int) -> int | None:
    """How far attention of this layer of the base reaches; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] == "full_attention":
        return None
    if kinds is not None and kinds[layer] != "sliding_attention":
        raise ValueError(f"layer {layer} of the base is {kinds[layer]!r}, expected attention")
    return getattr(config, "sliding_window", None)


def base_facts(config: Any) -> dict[str, Any]:
    """What an adapter's weights and states depend on in their base."""
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None),
        "head_dim": getattr(config, "head_dim", None),
    }


def adapter_hash(base: Any, config: AdapterConfig) -> str:
    """Names the kind of state, by what `TitansConfig.hash` counts too."""
    content = asdict(config) | {"memory": hashed_fields(config.memory)}
    text = json.dumps([base_facts(base), content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
