#!/usr/bin/env bash
# Builds the program in candle/, which times candle's quantized Llama, for this machine's own
# instructions, and prints its path. Everything lands outside the checkout; a second run returns at once.
#
# $PLANISH_CACHE moves the cache (default ~/.cache/planish).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${PLANISH_CACHE:-$HOME/.cache/planish}/candle
log=$cache/build.log
mkdir -p "$cache"
# Built from a copy, so that what cargo writes beside the manifest stays outside too; the versions are exact.
rm -rf "$cache/source/src" && mkdir -p "$cache/source"
cp -r "$here/candle/." "$cache/source"

# The flags are given here and nowhere else, so that a cargo configuration further up cannot weaken the peer.
RUSTFLAGS='-C target-cpu=native' nice -n 10 cargo build --release --quiet \
    --manifest-path "$cache/source/Cargo.toml" --target-dir "$cache/target" >"$log" 2>&1 || {
    printf 'candle.sh: the build failed; see %s\n' "$log" >&2
    exit 1
}
printf '%s\n' "$cache/target/release/candle-bench"
