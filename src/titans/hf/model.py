"""TitansForCausalLM: `TitansLM` as a transformers model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from titans.hf.cache import Part, TitansCache
from titans.hf.config import TitansHFConfig
from titans.models.lm import TitansLM
from titans.state import ModelState


@dataclass(frozen=True)
class Reading:
    """Some rows of a batch that are read together: `places` of their tokens among all B T."""

    rows: tuple[int, ...]
    places: Tensor
    state: ModelState


class TitansForCausalLM(PreTrainedModel, GenerationMixin):
    """All variants. `model` is the `TitansLM`, whose parameters have their own names here.

    Masked tokens are not computed and then hidden: they are not read. Rows whose numbers of real
    tokens differ run one after the other, so that padding leaves memories, convolution tails and
    attention untouched, and a row's result does not depend on it. Batch equal lengths for speed.
    """

    config_class = TitansHFConfig
    config: TitansHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True  # by TitansLM itself, which keeps the state
    _is_hf_initialized = False
    _is_stateful = True  # no assisted decoding: what is read cannot be unread
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' form)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    # M_0 and the gates, also in a model that is made, stored and loaded in bf16.
    _keep_in_fp32_modules_strict = ["initial", "gates"]  # noqa: RUF012

    def __init__(self, config: TitansHFConfig) -> None:
        super().__init__(config)
        if torch.get_default_dtype() == torch.float64:
            # The first releases of 5 would cast what is listed above down.
            self.dtype_plan: dict[str, torch.dtype] = {}
        self.model = TitansLM(config.to_titans())
        for name, parameter in self.model.named_parameters():
            short = parameter.dtype in (torch.bfloat16, torch.float16)  # of `from_config`
            if short and not set(self._keep_in_fp32_modules_strict).isdisjoint(name.split(".")):
                parameter.data = parameter.data.float()
        self.post_init()

    @classmethod
    def from_titans(cls, model: TitansLM, **given: Any) -> "TitansForCausalLM":
        """A wrapper of this very model, which shares its weights; `given`: for the config."""
        with torch.device("meta"):
            wrapped = cls(TitansHFConfig.from_titans(model.config, **given))
        wrapped.model = model
        wrapped._is_hf_initialized = True
        return wrapped.train(model.training)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As `TitansLM` does, all at once and only once; what was loaded stays as it is."""
        if self._is_hf_initialized:
            return
        self._is_hf_initialized = True
        parameters = list(self.model.parameters())
        loaded = [p for p in parameters if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) == len(parameters):
            return
        kept = [p.clone() for p in loaded]
        self.model.reset_parameters()
        for parameter, value in zip(loaded, kept, strict=True):
            parameter.copy_(value)

    def mark_tied_weights_as_initialized(self, *given: Any) -> None:
        """transformers means the head. Where that is still the very embedding, no file had one,
        and marking it would leave the embedding undrawn and the user untold."""
        if self.model.head.weight is not self.model.embedding.weight:
            mixin: Any = super()
            mixin.mark_tied_weights_as_initialized(*given)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: Any = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers. Memories of before belong to a model of another vocabulary."""
        embeddings = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        self.model.config = self.config.to_titans()
        self.model.config_hash = self.model.config.hash()
        return embeddings

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: the config writes the code and `auto_map` in any case."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast:
        """Read (B, T) tokens after what `past_key_values` holds.

        attention_mask: (B, T), or (B, all tokens so far and T), 0 for what is not to be read,
        wherever it stands. inputs_embeds: (B, T, dim) instead of tokens. labels: (B, T), -100 for
        none; shifted here. use_cache: return what is remembered; a cache that is given is always
        brought up to date. output_hidden_states: the input of every block and what the head reads,
        zeros where nothing was read; or an index or several, and None is in the others' place.
        logits_to_keep: the last so many, or these positions.

        Raises ValueError for tokens outside the vocabulary, for position_ids, and for a cache of
        another kind, model or batch.
        """
        if output_attentions or self.config.output_attentions:
            raise ValueError("output_attentions: the weights of attention are never formed")
        # Not a named argument: `generate` would make some for every model that takes them.
        if loss_options.get("position_ids") is not None:
            raise ValueError(
                "position_ids: tokens are read in their order; give packed texts as rows, "
                "and padding as attention_mask"
            )
        x, mask = self.embed(input_ids, inputs_embeds, attention_mask)
        if labels is not None and labels.shape != x.shape[:2]:
            raise ValueError(
                f"labels must be {tuple(x.shape[:2])} as the tokens, got {tuple(labels.shape)}"
            )
        cache, parts = self.cache_of(past_key_values, x.shape[0])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = wanted_depths(output_hidden_states, 1 + self.config.num_hidden_layers)
        depths, parts = self.read(x, mask, parts, all_depths=bool(wanted))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(depths[-1][:, kept])
        chosen: Any = None
        if wanted:
            chosen = tuple(h if i in wanted else None for i, h in enumerate(depths))
        loss = None
        if labels is not None:
            if mask is not None:
                # What is not read is no text, and what follows it is predicted by nothing.
                labels = labels.masked_fill(~mask, -100)
                labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options
            )
        if use_cache is None:
            use_cache = self.config.use_cache
        # At the end: a call that fails has not read, so that it may be made again.
        cache.memory.parts = parts
        cache.memory.seen += x.shape[1]
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=chosen,
        )

    def embed(
        self, tokens: Tensor | None, embeddings: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, dim), and which of the tokens to read, (B, T); None where that is all."""
        if (tokens is None) == (embeddings is None):
            raise ValueError("expected input_ids or inputs_embeds, and not both")
        given = tokens if embeddings is None else embeddings
        assert given is not None
        wanted = "(B, T)" if embeddings is None else f"(B, T, {self.config.hidden_size})"
        fits = isinstance(given, Tensor) and given.ndim == (2 if embeddings is None else 3)
        if not fits or given.shape[2:] not in ((), (self.config.hidden_size,)):
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            name = "input_ids" if embeddings is None else "inputs_embeds"
            raise ValueError(f"{name} must be a tensor of shape {wanted}, got {got}")
        if not given.shape[1]:
            raise ValueError(
                "no tokens to read: after a cache that has read, `generate` takes the whole text "
                "so far, or the new tokens and an attention_mask over all"
            )
        mask = None
        if attention_mask is not None:
            rows, length = given.shape[:2]
            seen = tuple(attention_mask.shape)
            if len(seen) != 2 or seen[0] != rows or seen[1] < length:
                raise ValueError(
                    f"attention_mask must be ({rows}, {length} or more), got {seen}: "
                    "1 for tokens to read, 0 for padding"
                )
            mask = attention_mask[:, -length:].bool()
            mask = None if mask.all() else mask
        if tokens is None:
            assert embeddings is not None
            return embeddings, mask
        if mask is not None:  # what stands in padding may lie outside the vocabulary
            tokens = tokens.masked_fill(~mask, 0)
        self.model.check_tokens(tokens)
        return self.model.embedding(tokens), mask

    def cache_of(self, given: Any, rows: int) -> tuple[TitansCache, tuple[Part, ...]]:
        """The cache to go on with, and what it holds; a state of one row is repeated for all."""
        if given is None:
            given = TitansCache()
        if not isinstance(given, TitansCache):
            raise ValueError(
                f"past_key_values must be a TitansCache, got {type(given).__name__}: "
                "this model's cache is its memory"
            )
        memory = given.memory
        if memory.batch_size == 1:
            return given, memory.selected([0] * rows)
        if memory.parts and memory.batch_size != rows:
            raise ValueError(f"the cache is for {memory.batch_size} rows, got tokens for {rows}")
        return given, memory.parts

    def read(
        self,
        x: Tensor,
        mask: Tensor | None,
        parts: Sequence[Part],
        *,
        all_depths: bool,
    ) -> tuple[list[Tensor], tuple[Part, ...]]:
        """The input of every block and of the head, (B, T, dim), the latter alone unless
        `all_depths`; and what every row remembers after it."""
        every = tuple(range(x.shape[0]))
        if mask is None and len(parts) <= 1:
            rows = parts[0].rows if parts else every
            hidden, state = self.read_rows(x, parts[0].state if parts else None, all_depths)
            return hidden, (Part(rows, state),)
        parts = parts or (Part(every, self.model.init_state(len(every))),)
        after, results, places = [], [], []
        for reading in self.readings(x, mask, parts):
            state = reading.state
            if reading.places.numel():
                tokens = x.flatten(0, 1)[reading.places].unflatten(0, (len(reading.rows), -1))
                hidden, state = self.read_rows(tokens, state, all_depths)
                results.append([h.flatten(0, 1) for h in hidden])
                places.append(reading.places)
            after.append(Part(reading.rows, state))
        if not results:  # e.g. the first piece of a prompt with padding
            return [torch.zeros_like(x)] * (1 + all_depths * len(self.model.blocks)), tuple(after)
        where = torch.cat(places)
        depths = []
        for found in zip(*results, strict=True):
            flat = torch.cat(found)
            spread = flat.new_zeros(x.shape[0] * x.shape[1], x.shape[2])
            depths.append(spread.index_copy(0, where, flat).unflatten(0, x.shape[:2]))
        return depths, tuple(after)

    def read_rows(
        self, x: Tensor, state: ModelState | None, all_depths: bool
    ) -> tuple[list[Tensor], ModelState]:
        depths: list[Tensor] | None = [] if all_depths else None
        output = self.model.read(x, state, inputs=depths)
        return [*(depths or []), output.hidden], output.state

    def readings(self, x: Tensor, mask: Tensor | None, parts: Sequence[Part]) -> list[Reading]:
        """The rows by what they have read and how many tokens they are to read now."""
        rows, length = x.shape[:2]
        every = torch.arange(rows * length, device=x.device).view(rows, length)
        counts = [length] * rows if mask is None else mask.sum(1).tolist()
        found = []
        for part in parts:
            for count in sorted({counts[row] for row in part.rows}):
                taken = [i for i, row in enumerate(part.rows) if counts[row] == count]
                some = part.pick(taken, [part.rows[i] for i in taken])
                index = torch.tensor(some.rows, device=x.device)
                places = every[index]
                places = places.flatten() if mask is None else places[mask[index]]
                found.append(Reading(some.rows, places, some.state))
        return found

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: keys and values are not what this model remembers."""
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """An empty `TitansCache` where `generate` was given none."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    "this model's cache is its memory: expected no cache_implementation, "
                    f"got {generation_config.cache_implementation!r}"
                )
            model_kwargs["past_key_values"] = TitansCache()
        mixin: Any = super()
        return mixin._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Beams and returned sequences: a cache of one row a prompt is repeated with the prompts.
        One that was repeated already stays as it is."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, TitansCache) and expand_size > 1:
            embeddings = model_kwargs.get("inputs_embeds")
            rows = len(input_ids if embeddings is None else embeddings)
            if cache.memory.batch_size == rows:
                cache.batch_repeat_interleave(expand_size)
        mixin: Any = super()
        return mixin._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )


def wanted_depths(given: bool | int | Sequence[int] | None, count: int) -> list[int]:
    """Which of the hidden states to return; below 0 they count from the end.

    Raises ValueError for one that there is not.
    """
    if given is None or isinstance(given, bool):
        return list(range(count)) if given else []
    indices = [given] if isinstance(given, int) else list(given)
    wrong = [i for i in indices if not -count <= i < count]
    if wrong:
        raise ValueError(f"output_hidden_states: there are {count}, got index {wrong[0]}")
    return [i % count for i in indices]
