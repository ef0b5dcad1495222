#!/usr/bin/env bash
# CTranslate2 4.8.5: the converter for M2M100 and NLLB models writes encoder_attention_heads for the decoder too. A model whose
# decoder has another number of heads is converted without a word and translates with other probabilities: the matrices are as
# large with 4 heads of 16 as with 8 of 8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import json
import pathlib
import sys

import ctranslate2
import sentencepiece
import torch
import transformers

transformers.logging.set_verbosity_error()
words = [f"{a} {b} river life" for a in ("the", "la", "der", "alpha") for b in ("house", "tree", "maison", "word")]
print(f"ctranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
off = {}
for encoder_heads, decoder_heads in ((4, 4), (8, 8), (8, 4), (4, 8)):
    folder = pathlib.Path(sys.argv[1]) / f"{encoder_heads}-{decoder_heads}"
    folder.mkdir()
    with open(folder / "sentencepiece.bpe.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, model_type="bpe", vocab_size=50, unk_id=0, bos_id=1,
            eos_id=2, minloglevel=2,
        )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size()))]
    files = [folder / "vocab.json", folder / "sentencepiece.bpe.model"]
    files[0].write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    tokenizer = transformers.M2M100Tokenizer(*map(str, files))
    languages = list(tokenizer.lang_code_to_token.values())
    tokenizer = transformers.M2M100Tokenizer(*map(str, files), additional_special_tokens=languages)
    torch.manual_seed(0)
    config = transformers.M2M100Config(
        vocab_size=len(vocabulary) + len(languages) + 8, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=encoder_heads,
        decoder_attention_heads=decoder_heads, max_position_embeddings=64, init_std=0.2,
    )
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(folder / "converted"))
    source = ["__en__", *vocabulary[9:15], "</s>"]
    target = ["__fr__", *vocabulary[20:25]]
    ids = tokenizer.convert_tokens_to_ids(target)
    with torch.no_grad():
        logits = model(
            torch.tensor([tokenizer.convert_tokens_to_ids(source)]), decoder_input_ids=torch.tensor([[2, *ids]])
        ).logits
    expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).flatten()
    scored = ctranslate2.Translator(str(folder / "converted"), device="cpu").score_batch([source], [target])[0]
    off[folder.name] = float((torch.tensor(scored.log_probs[: len(ids)]) - expected).abs().max())
    print(f"{encoder_heads} heads in the encoder, {decoder_heads} in the decoder: log-probabilities are off by up to "
          f"{off[folder.name]:.4f}")
assert off["4-4"] < 1e-3 and off["8-8"] < 1e-3 and off["8-4"] > 0.05 and off["4-8"] > 0.05
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5 sentencepiece==0.2.1 protobuf==6.33.0
"$folder/venv/bin/python" "$folder/check.py" "$folder"
