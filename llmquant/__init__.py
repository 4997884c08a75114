"A literate workbench for post-training quantization of large language models."

__version__ = "0.1.0"

# vLLM imports this package in each of its processes to find the plugin, so nothing heavy is imported before it is
# asked for.
_ENTRY_POINTS = {"quantize": "llmquant.pipeline.run", "load": "llmquant.export.loading", "verify": "llmquant.evaluation.verification"}


def __getattr__(name):
    "Import an entry point when they are first used."
    if name not in _ENTRY_POINTS:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ENTRY_POINTS[name]), name)
