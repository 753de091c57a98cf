"""What megatron-core and torch do otherwise in this package: `replacements` lists every attribute that is replaced."""
