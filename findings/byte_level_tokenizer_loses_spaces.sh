#!/usr/bin/env bash
# A byte-level tokenizer.json beside tokenizer_class LlamaTokenizerFast: transformers 5 builds the class anew from the
# vocabulary, by SentencePiece's rules, and the text loses its spaces; no error, no warning.
#
# Versions: transformers 5.19.0, tokenizers 0.23.3, Python 3.11; no torch needed.
# Behaviour: AutoTokenizer.from_pretrained(folder) gives other ids than tokenizers.Tokenizer.from_file(tokenizer.json),
#   and decodes them to the text without its spaces. With tokenizer_class PreTrainedTokenizerFast the ids are the file's.
# Output seen:
#   transformers 5.19.0
#   tokenizer.json itself                   'to be or not'
#   tokenizer_class LlamaTokenizerFast      'tobeornot'
#   tokenizer_class PreTrainedTokenizerFast 'to be or not'
# Exit status 0 while this is so, 1 when it changes.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"${PYTHON:-python3}" -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0
cat > "$room/show.py" <<'PY'
import json, sys
from pathlib import Path
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

folder, text = Path(sys.argv[1]), "to be or not"
letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
made.save(str(folder / "tokenizer.json"))
said = {"tokenizer.json itself": made.decode(made.encode(text).ids)}
for name in "LlamaTokenizerFast", "PreTrainedTokenizerFast":
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "bos_token": "<s>"}))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    said[f"tokenizer_class {name}"] = loaded.decode(loaded(text, add_special_tokens=False)["input_ids"])
print("transformers", transformers.__version__)
for name, decoded in said.items(): print(f"{name:39} {decoded!r}")
sys.exit(list(said.values()) != [text, text.replace(" ", ""), text])
PY
mkdir "$room/folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$room/venv/bin/python" "$room/show.py" "$room/folder"
