#!/usr/bin/env bash
# Builds llama.cpp, the engine that planish's GGUF files are held against, from the full source that
# the PyPI package llama-cpp-python carries. Everything lands outside the checkout, and a second run
# returns at once.
#
#   benches/peers/llamacpp.sh            builds what is missing, prints the directory of the native build
#   benches/peers/llamacpp.sh exact      the same, prints the directory of the exact build
#
# native  llama.cpp as its users build it: kernels of this machine, activations rounded to 8 bits.
#         Holds llama-quantize, llama-imatrix, llama-perplexity, llama-tokenize, llama-bench, llama-simple.
# exact   the same tools over a ggml whose products of 32 tokens and more run on dequantized f32
#         weights and f32 activations (OpenBLAS). That is what a GGUF file means, free of the rounding
#         that an engine adds for speed, so it is the reference of `kl.py`.
#
# Each directory holds the programs beside their shared libraries, and finds them by $ORIGIN.
# $PLANISH_CACHE moves the cache (default ~/.cache/planish), $PLANISH_JOBS sets the compile jobs
# (default: all cores).
set -euo pipefail

VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
TOOLS=(llama-quantize llama-imatrix llama-perplexity llama-tokenize llama-bench llama-simple)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${PLANISH_CACHE:-$HOME/.cache/planish}/llamacpp
home=$cache/$VERSION
jobs=${PLANISH_JOBS:-$(nproc)}
kind=${1:-native}
log=$cache/build.log

say() { printf '%s\n' "$*" >&2; }
die() { say "llamacpp.sh: $*"; exit 1; }

case $kind in native | exact) ;; *) die "unknown build '$kind': say native or exact" ;; esac

# Installs a Debian package when the thing that it gives is missing.
need() { # TEST PACKAGE
    eval "$1" >/dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "needs the package $2; install it and run again"
    say "installing $2"
    { apt-get update && apt-get install -y --no-install-recommends "$2"; } >>"$log" 2>&1 ||
        die "cannot install $2; see $log"
}

# CMake and Ninja come from PyPI: they are newer there than in most distributions and need no root.
toolchain() {
    need 'command -v g++' g++
    need 'python3 -m venv --help' python3-venv
    [ -x "$cache/venv/bin/ninja" ] || {
        say "installing cmake and ninja"
        python3 -m venv "$cache/venv"
        "$cache/venv/bin/pip" install -q cmake ninja >>"$log" 2>&1
    }
    PATH=$cache/venv/bin:$PATH
}

source_tree() {
    [ -f "$home/source/CMakeLists.txt" ] && return
    local archive=$cache/llama_cpp_python-$VERSION.tar.gz
    [ -f "$archive" ] || {
        say "downloading llama-cpp-python $VERSION"
        "$cache/venv/bin/pip" download -q --no-deps --no-binary llama-cpp-python -d "$cache" \
            "llama-cpp-python==$VERSION" >>"$log" 2>&1 || die "download failed; see $log"
    }
    echo "$SHA256  $archive" | sha256sum -c --quiet - || die "$archive is not the pinned file; delete it and run again"
    rm -rf "$home/unpack" && mkdir -p "$home/unpack"
    tar -xzf "$archive" -C "$home/unpack" --strip-components=1
    rm -rf "$home/source" && mv "$home/unpack/vendor/llama.cpp" "$home/source"
    rm -rf "$home/unpack"
}

configure_and_build() { # BUILD TARGETS... -- OPTIONS...
    local into=$1 targets=()
    shift
    while [ "$1" != -- ]; do targets+=(--target "$1"); shift; done
    shift
    cmake -S "$home/source" -B "$into" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
        -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
        "$@" >>"$log" 2>&1 ||
        die "configuration failed; see $log"
    nice -n 10 cmake --build "$into" -j "$jobs" "${targets[@]}" >>"$log" 2>&1 || die "build failed; see $log"
}

build_native() {
    [ -f "$home/native/.done" ] && return
    say "building llama.cpp (about five minutes on two cores; log in $log)"
    configure_and_build "$home/build-native" "${TOOLS[@]}" --
    install_build native "$home/build-native"
}

# Only ggml differs between the two builds, so the exact one borrows the native one's programs.
build_exact() {
    [ -f "$home/exact/.done" ] && return
    need 'ls /usr/include/*/cblas.h || ls /usr/include/cblas.h' libopenblas-dev
    need 'command -v pkg-config' pkg-config
    say "building ggml on OpenBLAS"
    configure_and_build "$home/build-exact" ggml -- -DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS \
        -DGGML_CPU_REPACK=OFF -DGGML_LLAMAFILE=OFF
    install_build exact "$home/build-native" "$home/build-exact"
}

# Gathers the programs and libraries of one or more builds, later ones over earlier ones, and links
# `logits` against them.
install_build() { # KIND BUILD...
    local into=$home/$1
    shift
    rm -rf "$into" && mkdir -p "$into"
    for build in "$@"; do
        cp -a "$build"/bin/*.so* "$into/"
        for tool in "${TOOLS[@]}"; do [ ! -x "$build/bin/$tool" ] || cp -a "$build/bin/$tool" "$into/"; done
    done
    touch "$into/.done"
}

# Rebuilt whenever its source is newer, so that an edit needs no cleaning.
build_logits() { # KIND
    local into=$home/$1
    [ "$into/logits" -nt "$here/logits.cpp" ] && return
    g++ -O2 -std=c++17 -Wall -Wextra -o "$into/logits" "$here/logits.cpp" \
        -I"$home/source/include" -I"$home/source/ggml/include" \
        -L"$into" -lllama -lggml -lggml-base -Wl,-rpath,'$ORIGIN' -Wl,--allow-shlib-undefined >>"$log" 2>&1 ||
        die "logits.cpp does not build; see $log"
}

mkdir -p "$home"
if [ ! -f "$home/native/.done" ] || [ ! -f "$home/exact/.done" ]; then
    toolchain
    source_tree
    build_native
    build_exact
fi
build_logits native
build_logits exact
printf '%s\n' "$home/$kind"
