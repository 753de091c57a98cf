"""Adapters to other trainers: they call `algorithms` and `vocab_parallel`, and hold no mathematics of their own."""
