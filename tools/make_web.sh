#!/bin/sh
# Fetch ONNX Runtime for browsers into qdeploy/web/device/vendor: one version, by its SHA-512, and of it the files that
# a page needs for WebAssembly on one thread. Does nothing when they are there. Needs npm.
set -eu

VERSION=1.30.0
SHA512=ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61
FILES="ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm"

cd "$(dirname "$0")/.."
VENDOR=qdeploy/web/device/vendor
if grep -qs "\"version\": \"$VERSION\"" "$VENDOR/onnxruntime-web.json"; then
  exit 0
fi
command -v npm > /dev/null || {
  echo "npm is not on PATH: install Node 20 or later with npm, then run this again" >&2
  exit 2
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
archive=$(cd "$work" && npm pack --silent "onnxruntime-web@$VERSION")
if ! echo "$SHA512  $work/$archive" | sha512sum --check --status; then
  echo "$archive has another SHA-512 than the pinned one: not used" >&2
  exit 1
fi
tar -xzf "$work/$archive" -C "$work"
rm -rf "$VENDOR"
mkdir -p "$VENDOR"
for file in $FILES; do
  cp "$work/package/dist/$file" "$VENDOR/$file"
done
cp "$work/package/package.json" "$VENDOR/onnxruntime-web.json" # names its version and its licence, MIT; copied last
echo "onnxruntime-web $VERSION is in $VENDOR"
