"""Titans models as transformers models, and memories for models of transformers; needs the extra
`hf`.

Importing it registers them: `AutoModelForCausalLM.from_pretrained(folder)` then knows the type.
"""

from titans.hf.need import require_transformers

require_transformers()

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from titans.hf.adapter import AdaptedForCausalLM, adapt, load_adapter  # noqa: E402
from titans.hf.cache import MemoryLayer, TitansCache  # noqa: E402
from titans.hf.config import TitansHFConfig  # noqa: E402
from titans.hf.model import TitansForCausalLM  # noqa: E402

__all__ = [
    "AdaptedForCausalLM",
    "MemoryLayer",
    "TitansCache",
    "TitansForCausalLM",
    "TitansHFConfig",
    "adapt",
    "load_adapter",
]

AutoConfig.register(TitansHFConfig.model_type, TitansHFConfig, exist_ok=True)
AutoModelForCausalLM.register(TitansHFConfig, TitansForCausalLM, exist_ok=True)
