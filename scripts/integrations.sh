#!/usr/bin/env bash
# Installs each tool of docs/tools.md into an environment of its own and runs it there on two processes of this machine
# (benchmarks/integrations.py), which writes benchmarks/results/integrations.json:
#   bash scripts/integrations.sh [axolotl] [llamafactory] [swift]        all three by default
# BUCKETMOO_TOOLS names the folder of the environments (default .venv-tools), PYTHON the interpreter (3.11 or newer).
# A few gigabytes are fetched. The tools themselves are installed without what they ask for, and beside them what
# training a text model on CPUs imports: some of the rest is built for CUDA or pinned against each other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${BUCKETMOO_TOOLS:-.venv-tools}
torch="torch==$(sed -n 's/^torch==//p' constraints.txt)"

# TOOL PACKAGE... -- PACKAGE...: those before the dashes with what they ask for, those behind them without.
environment() {
    local python="$folder/$1/bin/python"
    shift
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$(dirname "$(dirname "$python")")"
    local whole=()
    while [ "$1" != -- ]; do whole+=("$1"); shift; done
    shift
    "$python" -m pip install --quiet "$torch" setuptools wheel
    "$python" -m pip install --quiet "${whole[@]}"
    "$python" -m pip install --quiet --no-deps "$@"
    "$python" -m pip install --quiet --no-build-isolation --editable .
}

install_axolotl() {
    environment axolotl transformers==5.16.1 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 peft==0.20.0 \
        tokenizers==0.23.1 huggingface_hub==1.17.0 pydantic==2.12.5 typer==0.25.1 python-dotenv==1.0.1 evaluate==0.4.1 \
        posthog==6.7.11 addict fire colorama einops numba scipy requests tensorboard sentencepiece fastcore wandb triton \
        -- axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 schedulefree==1.4.1 art \
        bitsandbytes==0.50.2
}

install_llamafactory() {
    environment llamafactory transformers==5.6.0 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0 peft==0.18.1 \
        "torchdata>=0.10,<=0.11" "tyro<0.9" einops fastapi fire omegaconf modelscope sse-starlette uvicorn hf-transfer \
        matplotlib pandas protobuf scipy sentencepiece tiktoken \
        -- llamafactory==0.9.5
    "$folder/llamafactory/bin/python" -m pip install --quiet --no-build-isolation deepspeed==0.18.4
    # It imports torchaudio, whose builds load CUDA's libraries, and calls it for sound alone.
    touch "$("$folder/llamafactory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio.py"
}

install_swift() {
    environment swift transformers==5.19.0 accelerate==1.15.0 datasets==4.8.4 trl==0.29.1 peft==0.20.0 \
        modelscope==1.40.2 addict attrdict dacite einops json-repair pandas pillow safetensors scipy sentencepiece \
        simplejson sortedcontainers tiktoken zstandard binpacking tensorboard matplotlib rouge nltk importlib-metadata \
        openai fastapi uvicorn aiohttp charset-normalizer oss2 transformers-stream-generator cpm-kernels \
        -- ms-swift==4.6.0
}

for tool in "${@:-axolotl llamafactory swift}"; do
    for each in $tool; do
        "install_$each"
        OMP_NUM_THREADS=1 "$folder/$each/bin/python" benchmarks/integrations.py "$each"
    done
done
