#!/usr/bin/env bash
# transformers 5.24.0: NllbTokenizer.from_pretrained of a folder with a sentencepiece model and no tokenizer.json has no
# tokens of the languages. It says nothing: the source language in front of a text, and the target language that generate
# is to begin with, are <unk>. 4.56.2 adds the 202 languages and <mask>.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import json
import pathlib
import sys
import tempfile

import sentencepiece
import transformers

folder = pathlib.Path(tempfile.mkdtemp())
words = [f"{a} {b} river life" for a in ("the", "la", "der", "alpha") for b in ("house", "tree", "maison", "word")]
with open(folder / "sentencepiece.bpe.model", "wb") as model:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, model_type="bpe", vocab_size=50, unk_id=0, bos_id=1, eos_id=2,
        minloglevel=2,
    )
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NllbTokenizer"}))
tokenizer = transformers.NllbTokenizer.from_pretrained(str(folder), src_lang="eng_Latn", tgt_lang="fra_Latn")
first = tokenizer("the house")["input_ids"][0]
names = [tokenizer.convert_ids_to_tokens(x) for x in (first, tokenizer.convert_tokens_to_ids("fra_Latn"))]
print(f"transformers {transformers.__version__}: {len(tokenizer)} tokens; source and target language are {names}")
assert names == json.loads(sys.argv[1])
PY
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet "$@"; }
pip sentencepiece==0.2.1 protobuf==6.33.0
pip transformers==4.56.2
"$folder/venv/bin/python" "$folder/check.py" '["eng_Latn", "fra_Latn"]'
pip transformers==5.24.0
"$folder/venv/bin/python" "$folder/check.py" '["<unk>", "<unk>"]'
