"A literate workbench for post-training quantization of large language models."

__version__ = "0.1.0"

# vLLM imports this package in each of its processes to find the plugin, so nothing heavy is imported before it is
# asked for.
_FRONT_DOOR = {"quantize": "llmquant.pipeline.run", "load": "llmquant.export.loading", "verify": "llmquant.evaluation.proof"}


def __getattr__(name):
    "Import the front door's functions when they are first used."
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FRONT_DOOR[name]), name)
