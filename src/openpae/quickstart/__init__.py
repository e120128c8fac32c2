"""`pae quickstart`: emoji, a tokenizer, a generator and a report from one command."""
