"""NVFP4: floats of 4 bits with a scale for every 16, as GGUF stores them and with the scale of a whole tensor."""
