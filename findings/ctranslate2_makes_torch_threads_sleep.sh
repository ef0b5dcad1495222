#!/usr/bin/env bash
# CTranslate2 4.8.5 beside torch 2.13.0 in one process: after the first translation torch's own operations take longer.
# Both have as many threads as there are cores. CTranslate2, imported second, uses the OpenMP library that torch has loaded
# (its own has the same interface), and that counts the threads of both teams. As they are more than cores, it no longer
# lets a thread wait by spinning at the end of a parallel part but puts it to sleep: every operation of torch then wakes
# its threads anew, although CTranslate2 is idle. Two engines compared in one process are thus not what each is alone.
# Needs Linux and at least two cores.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import os
import resource
import sys
import tempfile

import torch  # before ctranslate2: the order matters
import transformers
import ctranslate2


def switches(work):
    """Voluntary context switches of the whole process in a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before


def additions():
    for _ in range(2000):
        torch.add(left, right, out=out)


threads = len(os.sched_getaffinity(0))
torch.set_num_threads(threads)
left, right, out = torch.randn(3, 1 << 18)

config = transformers.M2M100Config(
    vocab_size=64, d_model=512, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=64,
)
spec = ctranslate2.converters.transformers.M2M100Loader().get_model_spec(transformers.M2M100ForConditionalGeneration(config))
tokens = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(60))]
spec.register_source_vocabulary(tokens)
spec.register_target_vocabulary(tokens)
spec.config.decoder_start_token = "</s>"
spec.validate()
spec.optimize()
with tempfile.TemporaryDirectory() as folder:
    spec.save(folder)
    translator = ctranslate2.Translator(folder, intra_threads=threads)
additions()
alone = min(switches(additions) for _ in range(3))
translator.translate_batch([["5", "6", "7", "</s>"]] * 32, max_decoding_length=8)
beside = min(switches(additions) for _ in range(3))
print(
    f"torch {torch.__version__}, CTranslate2 {ctranslate2.__version__}, {threads} threads each; voluntary context switches in "
    f"2000 additions of torch: {alone} before the first translation, {beside} after it"
)
assert beside > 1000 and beside > 20 * alone
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.56.2 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet ctranslate2==4.8.5
"$folder/venv/bin/python" "$folder/check.py"
