"""The architectures that can be trained, by the model_type of config.json: the class of the model, of its
configuration."""

from llama import Llama, LlamaConfig
from model import Model, ModelConfig

MODELS = {"qwen3_5_text": (Model, ModelConfig), "llama": (Llama, LlamaConfig)}


def make_model(name, values=None):
    """The model of a name, of the default shape or of the one that to_dict gave."""
    model_class, config_class = MODELS[name]
    return model_class(config_class(**(values or {})))
