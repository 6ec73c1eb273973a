"""How a task of lm-eval wants its texts generated."""

from collections.abc import Mapping
from typing import Any

from titans.data.told import Until
from titans.generate import Sampling

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
FILTERS = ("top_k", "top_p", "min_p")
GREEDY = Sampling(temperature=0.0)


def parse_until(given: Mapping[str, Any]) -> Until:
    """A task's `generation_kwargs`: `until`, `max_gen_toks` (or one of its other
    names), `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`.

    Greedy unless `do_sample` or a temperature above 0 says otherwise; `do_sample: false`
    decides over a temperature. ValueError for anything else that would change the text.
    """
    unknown = sorted(set(given) - {"until", "do_sample", "temperature", *MAX_TOKENS, *FILTERS})
    if unknown:
        raise ValueError(
            f"generation setting {unknown[0]!r} is not supported: expected until, do_sample, "
            f"temperature, {', '.join(FILTERS)} or {MAX_TOKENS[0]}"
        )
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    limits = [given[name] for name in MAX_TOKENS if given.get(name) is not None]
    limit = int(limits[0]) if limits else Until.max_tokens
    if limit < 1:
        raise ValueError(f"{MAX_TOKENS[0]} must be at least 1, got {limit}")
    temperature = given.get("temperature")
    if given.get("do_sample", bool(temperature)):
        filters = {name: given[name] for name in FILTERS if given.get(name) is not None}
        warmth = 1.0 if temperature is None else float(temperature)
        sampling = Sampling(temperature=warmth, **filters)
    else:
        sampling = GREEDY
    return Until(stop=tuple(s for s in stop if s), max_tokens=limit, sampling=sampling)
