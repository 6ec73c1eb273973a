"""Data: text, tokenizers, prepared shards, and one file per task's data."""
