"""TitansLM: a causal language model around one of the mixers."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans.config import TitansConfig, build, to_dict
from titans.distributed import Cut, Peers, composes
from titans.layers.feedforward import SwiGLU
from titans.layers.memory import MemoryRecord, NeuralMemory
from titans.models.baselines.rule import RuleMixer
from titans.models.baselines.rwkv7 import RWKV7Mixer
from titans.models.baselines.sliding import SlidingMixer
from titans.models.baselines.transformer import TransformerMixer
from titans.models.lmm import LMMMixer
from titans.models.mac import MACMixer
from titans.models.mag import MAGMixer
from titans.models.mal import MALMixer
from titans.ops.tracing import is_traced
from titans.state import (
    ModelState,
    State,
    check_header,
    digest,
    open_safetensors,
    read_safetensors,
    write_safetensors,
)

FORMAT = "titans-model"
FORMAT_VERSION = 1
LOGITS = 2**24  # that a loss holds at once: 64 MB
# Linear maps whose output is added to the residual stream.
SINKS = ("mixer.output", "memory.output", "attention.output", "ffn.down")

# The mixers of a model's layers, repeated; all other variants are settings of the rule.
MIXERS: dict[str, tuple[type[nn.Module], ...]] = {
    "lmm": (LMMMixer,),
    "mac": (MACMixer,),
    "mag": (MAGMixer,),
    "mal": (MALMixer,),
    "transformer": (TransformerMixer,),
    "sliding": (SlidingMixer,),
    "rwkv7": (RWKV7Mixer,),
    "gated-deltanet-h2": (RuleMixer, SlidingMixer),
}


class LMOutput(NamedTuple):
    """logits (B, T, vocab), the state after the last token, one record per block."""

    logits: Tensor
    state: ModelState
    records: list[MemoryRecord | None]


class LossOutput(NamedTuple):
    """nll (B, T) nats of the labels, 0 where one is ignored; the likeliest tokens (B, T); state
    and records as in `LMOutput`."""

    nll: Tensor
    likeliest: Tensor
    state: ModelState
    records: list[MemoryRecord | None]


class HiddenOutput(NamedTuple):
    """hidden (B, T, dim): what the head reads; state and records as in `LMOutput`."""

    hidden: Tensor
    state: ModelState
    records: list[MemoryRecord | None]


class Block(nn.Module):
    """x + Mixer(norm(x)), then x + SwiGLU(norm(x)): the Llama macro-architecture."""

    def __init__(self, config: TitansConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.dim)
        mixers = MIXERS.get(config.variant, (RuleMixer,))
        self.mixer = mixers[layer % len(mixers)](config)
        hidden = config.ffn_hidden
        self.ffn_norm = nn.RMSNorm(config.dim) if hidden else None
        self.ffn = SwiGLU(config.dim, hidden) if hidden else None

    def forward(
        self, x: Tensor, state: State | None, write: bool = True, peers: Peers | None = None
    ) -> tuple[Tensor, State, MemoryRecord | None]:
        """state: None is that before the first token, made here where the weights are at hand.
        peers: x is a slice of a text of which they hold the others."""
        if state is None:
            mixer: Any = self.mixer
            state = mixer.init_state(x.shape[0])
        seen = self.mixer_norm(x)
        if peers is None:
            y, state, record = self.mixer(seen, state, write)
        elif in_turn(self.mixer, peers):
            y, state, record = peers.relay(partial(self.mixer, write=write), seen, state)
        else:
            y, state, record = self.mixer(seen, state, write, peers)
        x = x + y
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, state, record


def token_losses(
    head: Any, hidden: Float[Tensor, "b t d"], labels: Integer[Tensor, "b t"]
) -> tuple[Float[Tensor, "b t"], Integer[Tensor, "b t"]]:
    """Cross-entropy of every label, in float32 or wider, and the likeliest tokens."""
    rows = hidden.flatten(0, 1)
    size = max(1, LOGITS // head.weight.shape[0])
    pieces = list(zip(rows.split(size), labels.flatten().split(size), strict=True))
    again = len(pieces) > 1 and torch.is_grad_enabled()
    run = partial(checkpoint, label_losses, use_reentrant=False) if again else label_losses
    nll, likeliest = zip(*(run(head, *piece) for piece in pieces), strict=True)
    return torch.cat(nll).view_as(labels), torch.cat(likeliest).view_as(labels)


def shared_losses(
    team: Peers, head: Any, hidden: Float[Tensor, "b t d"], labels: Integer[Tensor, "b t"]
) -> tuple[Float[Tensor, "b t"], Integer[Tensor, "b t"]]:
    """`token_losses`, of which each process of a team computes those of its share of tokens."""
    rows, wanted = hidden.flatten(0, 1), labels.flatten()
    missing = -len(rows) % team.count
    rows, wanted = F.pad(rows, (0, 0, 0, missing)), F.pad(wanted, (0, missing))  # cut off below
    own = token_losses(head, team.own(rows, 0)[None], team.own(wanted, 0)[None])
    nll, likeliest = (team.gather(part, 1)[0, : labels.numel()].view_as(labels) for part in own)
    return nll, likeliest


def label_losses(head: nn.Module, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(rows)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="none"), logits.argmax(-1)


def in_turn(mixer: nn.Module, peers: Peers) -> bool:
    """Must the slices of a text be read one after the other? MAC writes what it attends to after
    it read the memory; of a deep memory each process can have some of the heads, or none."""
    if isinstance(mixer, MACMixer | RWKV7Mixer):
        return True
    memory = getattr(mixer, "memory", None)
    if not isinstance(memory, NeuralMemory):
        return False
    config = memory.config
    alone = composes(memory.network, config.chunk_size, config.surprise_limit)
    return not alone and config.heads % peers.count > 0


class TitansLM(nn.Module):
    """`logits, state = model(tokens)`, then `model(more_tokens, state)` to go on.

    tokens: (B, T) int64. Feeding a text in any pieces gives the logits and the state of one
    pass. Weights are initialised in `reset_parameters` alone.

    With `peers` set, tokens are a slice of a text; they hold the others, of the same length. The
    logits are those of the slice, both states those of the whole text.

    `titans.models.heads` leaves a model a part of the heads, with `cuts` of these parameters; the
    `team` has the others. Outputs are those of the whole model, states those of its heads.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.config = config
        self.config_hash = config.hash()
        self.tokenizer: str | None = None  # identity of the one it was trained with, if known
        self.gradient_checkpointing = False
        self.peers: Peers | None = None
        self.team: Peers | None = None
        self.cuts: dict[str, Cut] = {}
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with std 0.5 / sqrt(fan in) (0.016 at width 1024), divided by
        sqrt(2 layers) where a block writes to the residual stream; embeddings 0.02; memory
        weights, gates, convolutions, norms and persistent tokens as their modules say."""
        depth = (2 * self.config.layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_stream = name.endswith(SINKS)
                std = 0.5 * module.in_features**-0.5
                nn.init.normal_(module.weight, std=std * depth if into_stream else std)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            own = getattr(module, "reset_parameters", None)
            if callable(own) and not isinstance(module, nn.Linear | nn.Embedding | TitansLM):
                own()
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=0.02)

    def init_state(self, batch_size: int = 1) -> ModelState:
        """The state before the first token: learned M_0, after the persistent tokens."""
        mixers: list[Any] = [block.mixer for block in self.blocks]
        blocks = tuple(mixer.init_state(batch_size) for mixer in mixers)
        return ModelState(blocks=blocks, position=0, config_hash=self.config_hash)

    def forward(
        self, tokens: Integer[Tensor, "b t"], state: ModelState | None = None, write: bool = True
    ) -> tuple[Float[Tensor, "b t v"], ModelState]:
        """Logits of the next token at every position, and the state after the last."""
        logits, state, _ = self.run(tokens, state, write)
        return logits, state

    def run(
        self, tokens: Integer[Tensor, "b t"], state: ModelState | None = None, write: bool = True
    ) -> LMOutput:
        """`forward`, with the record of every memory. write=False: memories are only read."""
        hidden, state, records = self.hidden(tokens, state, write)
        return LMOutput(self.head(hidden), state, records)

    def losses(
        self,
        tokens: Integer[Tensor, "b t"],
        labels: Integer[Tensor, "b t"],
        state: ModelState | None = None,
    ) -> LossOutput:
        """How likely every label was. Never holds more than `LOGITS` logits, whatever the number
        of tokens: they are computed in pieces, and for the backward pass once more.

        labels: the token to predict at each position, -100 (`titans.data.text.IGNORED`) for none.
        """
        if labels.shape != tokens.shape:
            raise ValueError(
                f"tokens and labels must have one shape, got {tuple(tokens.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if not is_traced([labels]):
            self.check_range("label", labels.masked_fill(labels == -100, 0))
        hidden, state, records = self.hidden(tokens, state)
        losses = token_losses if self.team is None else partial(shared_losses, self.team)
        nll, likeliest = losses(self.head, hidden, labels)
        # Cloned: FSDP warns of a view, on which its hooks would not survive a write in place.
        return LossOutput(nll.clone(), likeliest, state, records)

    def hidden(
        self, tokens: Integer[Tensor, "b t"], state: ModelState | None = None, write: bool = True
    ) -> HiddenOutput:
        """`run` without the head: its normalised input instead of logits."""
        self.check_tokens(tokens)
        return self.read(self.embedding(tokens.long()), state, write)

    def read(
        self,
        x: Float[Tensor, "b t d"],
        state: ModelState | None = None,
        write: bool = True,
        inputs: list[Tensor] | None = None,
    ) -> HiddenOutput:
        """`hidden` of embeddings instead of tokens; `inputs` collects what every block is given."""
        pasts: tuple[State | None, ...] = (None,) * len(self.blocks)
        position = x.shape[1] * (1 if self.peers is None else self.peers.count)
        if state is not None:
            self.check_state(state, x.shape[0])
            state = self.widened(state)
            pasts, position = state.blocks, state.position + position
        after, records = [], []
        for block, past in zip(self.blocks, pasts, strict=True):
            if inputs is not None:
                inputs.append(x)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, new, record = checkpoint(block, x, past, write, self.peers, use_reentrant=False)
            else:
                x, new, record = block(x, past, write, self.peers)
            after.append(new)
            records.append(record)
        new_state = ModelState(blocks=tuple(after), position=position, config_hash=self.config_hash)
        if self.peers is not None:
            new_state = self.peers.last(new_state)
        return HiddenOutput(self.norm(x), new_state, records)

    def check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(
                f"tokens must be integers of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.shape[0] == 0 or tokens.shape[1] == 0:
            raise ValueError(f"tokens are empty: expected B, T >= 1, got {tuple(tokens.shape)}")
        if not is_traced([tokens]):
            self.check_range("token", tokens)

    def check_range(self, name: str, tokens: Tensor) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"{name} {low if low < 0 else high} is outside the vocabulary of "
                f"{self.config.vocab_size}"
            )

    def check_state(self, state: ModelState, batch_size: int) -> None:
        if not isinstance(state, ModelState):
            raise ValueError(f"state must be a ModelState, got {type(state).__name__}")
        if state.config_hash != self.config_hash:
            raise ValueError(
                f"this memory belongs to another model (config {state.config_hash}, "
                f"this one is {self.config_hash})"
            )
        first = next(iter(state.tensors().values()))
        if first.shape[0] != batch_size:
            raise ValueError(
                f"the state is for a batch of {first.shape[0]}, got tokens for {batch_size}"
            )
        weight = self.embedding.weight
        if (first.dtype == torch.float64) != (weight.dtype == torch.float64):
            raise ValueError(f"the state is {first.dtype}, this model needs another precision")
        if first.device != weight.device:
            raise ValueError(f"the state is on {first.device}, the model on {weight.device}")

    def widened(self, state: ModelState) -> ModelState:
        """The state of a model in half precision as one in full precision goes on with it."""
        dtype = self.embedding.weight.dtype
        if dtype not in (torch.float32, torch.float64):
            return state

        def widen(tensor: Tensor) -> Tensor:
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(dtype) if half else tensor

        return state.map(widen)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write weights and config as one safetensors file, atomically.

        dtype: stored precision, e.g. torch.bfloat16 to halve the file; None keeps it.
        """
        names = {name for name, _ in self.named_parameters()}  # tied weights once
        tensors = {
            name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
            for name, tensor in self.state_dict().items()
            if name in names
        }
        write_model(path, self.config, tensors, self.tokenizer)

    @property
    def parameter_count(self) -> int:
        """Distinct parameters; tied embeddings count once."""
        return sum(p.numel() for p in self.parameters())


def write_model(
    path: str | Path,
    config: TitansConfig,
    tensors: dict[str, Tensor],
    tokenizer: str | None = None,
) -> None:
    """The file of `TitansLM.save` from a model's parameters, by name."""
    content = json.dumps(to_dict(config))
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "config": content}
    if tokenizer is not None:
        metadata["notes"] = json.dumps({"tokenizer": tokenizer})
    metadata["sha256"] = digest(tensors, content + metadata.get("notes", ""))
    write_safetensors(Path(path), tensors, metadata)


def is_model_file(path: str | Path) -> bool:
    """Is it one of `TitansLM.save`?"""
    try:
        with open_safetensors(path) as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except ValueError:
        return False


def load(path: str | Path, device: torch.device | str = "cpu") -> TitansLM:
    """A model saved by `TitansLM.save`, in float32 (float64 if saved so), in eval mode.

    Its `tokenizer` is the identity (`titans.data.tokenizers.tokenizer_identity`) of the one it was
    trained with, where the file says so. Raises ValueError of one line for a file that is missing,
    damaged or not a model.
    """
    tensors, metadata = read_safetensors(path)
    check_header(path, tensors, metadata, "model", FORMAT_VERSION, "config")
    try:
        config = build(TitansConfig, json.loads(metadata["config"]))
        tokenizer = json.loads(metadata.get("notes", "{}")).get("tokenizer")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its config does not fit this release ({error})") from None
    model = TitansLM(config)
    model.tokenizer = tokenizer
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != got:
        wrong = sorted(set(expected.items()) ^ set(got.items()))
        raise ValueError(f"{path}: weights do not fit the config ({wrong[0][0]})")
    if any(t.dtype == torch.float64 for t in tensors.values()):
        model = model.double()
    model.load_state_dict(tensors, strict=False)  # completeness was checked above
    return model.to(device).eval()
