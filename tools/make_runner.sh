#!/bin/sh
# Build qdeploy-run for architecture $2 (x86_64 or aarch64) into $1/device/$2 ($1: the virtual environment): the program,
# TVM's two runtime libraries, stripped, and their licences. Builds what changed; several may call it at once.
set -eu
venv=$(cd "$1" && pwd)
arch=$2
cross=$venv/cross
out=$venv/device/$arch
PATH=$cross/bin:$PATH
mkdir -p "$cross"
exec 9>"$cross/lock-$arch"
flock 9

if [ "$arch" = "$(uname -m)" ]; then
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    toolchain=
else
    packages=$cross/$arch
    toolchain=-DCMAKE_TOOLCHAIN_FILE=$PWD/runner/cmake/$arch.cmake
    if ! [ -d "$packages/tvm" ] || ! command -v "$arch-linux-gnu-g++" >/dev/null; then
        echo "error: building for $arch needs its compiler and libraries: run make cross" >&2
        exit 2
    fi
fi
command -v cmake >/dev/null || {
    echo "error: building the runner needs cmake: run make cross (or, on Debian, apt install cmake)" >&2
    exit 2
}
zlib=
[ -f "$cross/$arch/zlib/libz.a" ] && zlib=-DZLIB_ROOT=$cross/$arch/zlib
# a build folder remembers its compiler, also one that is not there any more
compiler=$(sed -n 's/^set(CMAKE_CXX_COMPILER "\(.*\)")$/\1/p' "$cross/build-$arch"/CMakeFiles/*/CMakeCXXCompiler.cmake \
    2>/dev/null || true)
[ -z "$compiler" ] || [ -x "$compiler" ] || rm -rf "$cross/build-$arch"
cmake -S runner -B "$cross/build-$arch" -DTVM_ROOT="$packages/tvm" -DTVM_FFI_ROOT="$packages/tvm_ffi" \
    $toolchain $zlib >"$cross/build-$arch.log" 2>&1 || {
    if grep -q 'Could not find ZLIB_' "$cross/build-$arch.log"; then
        echo "error: building the runner needs a static zlib: run make cross (or, on Debian, apt install zlib1g-dev)" >&2
        exit 2
    fi
    sed -n '/CMake Error/,$p' "$cross/build-$arch.log" >&2
    exit 2
}
cmake --build "$cross/build-$arch" -j 2 >"$cross/build-$arch.log" 2>&1 || {
    cat "$cross/build-$arch.log" >&2
    exit 2
}
# a program that runs keeps the files that it has mapped: whatever changed becomes a new folder under the old name
[ "$out/licenses/zlib/LICENSE" -nt "$cross/build-$arch/qdeploy-run" ] && exit 0
new=$out.new
rm -rf "$new" "$out.old"
cmake --install "$cross/build-$arch" --prefix "$new" >/dev/null
mkdir -p "$new/licenses/apache-tvm" "$new/licenses/apache-tvm-ffi" "$new/licenses/zlib" "$new/licenses/qdeploy"
cp LICENSE "$new/licenses/qdeploy/"
cp -R "$packages/tvm/LICENSE" "$packages/tvm/NOTICE" "$packages/tvm/licenses" "$new/licenses/apache-tvm/"
cp -R "$packages"/apache_tvm_ffi-*.dist-info/licenses/. "$new/licenses/apache-tvm-ffi/"
headers=$(sed -n 's/^ZLIB_HEADERS:PATH=//p' "$cross/build-$arch/CMakeCache.txt")
sed -n '1,/\*\//p' "$headers/zlib.h" >"$new/licenses/zlib/LICENSE"
[ ! -e "$out" ] || mv "$out" "$out.old"
mv "$new" "$out"
rm -rf "$out.old"
