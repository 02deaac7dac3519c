"""Serving: tokenizer, chat templates, finding models."""
