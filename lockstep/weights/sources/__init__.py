"""Models that are on this disk already: in the Hugging Face hub's cache, Ollama's store and LM Studio's folders."""
