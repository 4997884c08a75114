"""Read packed weights with compressed-tensors' own library, whichever version this interpreter has.

python compressed_tensors_reader.py CASES.json FOLDER: each case names a file in FOLDER with the tensors of one layer
`l` and its quantization_config; `weight` and what the library calls them go to FOLDER/NAME.read.safetensors.
"""
import json
import sys
from pathlib import Path

import compressed_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file


def main(cases: Path, folder: Path):
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, config in json.loads(cases.read_text(encoding="utf-8")).items():
        scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
        tensors = {key.removeprefix("l."): t for key, t in load_file(folder/f"{name}.safetensors").items()}
        read = packer.decompress(tensors, scheme)
        save_file({"weight": read["weight"].contiguous()}, folder/f"{name}.read.safetensors")
    print(compressed_tensors.__version__)


if __name__ == "__main__": main(Path(sys.argv[1]), Path(sys.argv[2]))
