#!/bin/sh
# What builds and runs aarch64 programs here, in $1/cross ($1: the virtual environment). The Makefile calls it. No root:
# Debian packages are unpacked, not installed, and only those whose programs are missing.
#
#   cross/usr        unpacked host packages; usr/bin/aarch64-linux-gnu-g++ works from there
#   cross/bin        programs for the PATH: the compiler, qemu-aarch64-static, proot and cmake, unless the system has them
#   cross/ARCH       tvm and tvm_ffi as far as a runner needs them (of aarch64), zlib's headers and libz.a
#   cross/root       a bare Debian for aarch64, whose programs run under proot and qemu
set -eu
venv=$(cd "$1" && pwd)
cross=$venv/cross
state=$cross/apt
rm -rf "$state"
mkdir -p "$cross/bin" "$state/lists/partial" "$state/cache/archives/partial"
host=$(dpkg --print-architecture 2>/dev/null) || {
    echo "error: make cross unpacks Debian packages and needs apt-get and dpkg (Debian 12 or later, or a derivative)" >&2
    exit 2
}

apt() { # apt-get with lists of its own, for this machine's architecture and arm64
    apt-get -qq -o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" -o Debug::NoLocking=1 \
        -o APT::Sandbox::User="$(id -un)" -o APT::Architectures::="$host" -o APT::Architectures::=arm64 "$@"
}

unpack() { # the files of packages $2... (name:architecture) into folder $1, through links that stand for folders
    folder=$1
    shift
    rm -rf "$state/debs"
    mkdir -p "$state/debs" "$folder"
    (cd "$state/debs" && apt download "$@")
    for file in "$state/debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$file" | tar -x -C "$folder" --keep-directory-symlink --no-same-owner
    done
}

closure() { # what apt would install for these packages, as name:architecture; $1 = none: on a system without any
    status=$1
    shift
    [ "$status" = none ] && status=/dev/null || status=/var/lib/dpkg/status
    apt -s -o Dir::State::status="$status" -o Dpkg::Use-Pty=0 --no-install-recommends install "$@" |
        sed -n "s/^Inst \([^ :]*\)\(:[a-z0-9]*\)\? (.*\[\([a-z0-9]\{1,\}\)\]).*/\1:\3/p" | sed "s/:all\$/:$host/" | sort -u
}

echo "reading Debian's package lists"
apt update

# --- programs for this machine -----------------------------------------------------------------------------------------

wanted=
command -v aarch64-linux-gnu-g++ >/dev/null || [ "$host" = arm64 ] || wanted="$wanted g++-aarch64-linux-gnu"
command -v qemu-aarch64-static >/dev/null || wanted="$wanted qemu-user-static"
command -v proot >/dev/null || wanted="$wanted proot"
if [ -n "$wanted" ]; then
    echo "unpacking$wanted and what they need"
    # shellcheck disable=SC2046,SC2086  # words
    unpack "$cross" $(closure system $wanted)
fi
if [ -e "$cross/usr/bin/qemu-aarch64-static" ]; then # static: no script, which proot could not start
    ln -sf ../usr/bin/qemu-aarch64-static "$cross/bin/qemu-aarch64-static"
fi
for program in "$cross"/usr/bin/aarch64-linux-gnu-* "$cross/usr/bin/proot"; do
    [ -e "$program" ] || continue
    name=$(basename "$program")
    case $name in
    *-g++) real=$name-$(ls "$cross/usr/bin" | sed -n "s/^$name-\([0-9]*\)\$/\1/p" | tail -n 1) more="--sysroot=$cross" ;;
    *) real=$name more= ;;
    esac
    cat >"$cross/bin/$name" <<SCRIPT
#!/bin/sh
LD_LIBRARY_PATH=$cross/usr/lib/$(uname -m)-linux-gnu\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH} exec "$cross/usr/bin/$real" $more "\$@"
SCRIPT
    chmod +x "$cross/bin/$name"
done
if [ -x "$cross/bin/aarch64-linux-gnu-g++" ]; then # where qdeploy compile looks for it
    ln -sf ../../bin/aarch64-linux-gnu-g++ "$cross/usr/bin/aarch64-linux-gnu-g++"
fi
if ! command -v cmake >/dev/null && ! [ -x "$cross/bin/cmake" ]; then
    echo "unpacking cmake"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --target "$cross/cmake" 'cmake>=3.20,<5'
    ln -sf "$cross/cmake/cmake/data/bin/cmake" "$cross/bin/cmake"
fi

# --- what a runner is linked with ---------------------------------------------------------------------------------------

for arch in "$host" arm64; do # Debian's libz.a: made for every architecture of one source, position-independent
    case $arch in amd64) name=x86_64 ;; arm64) name=aarch64 ;; *) continue ;; esac
    unpack "$state/zlib-$arch" "zlib1g-dev:$arch"
    mkdir -p "$cross/$name/zlib"
    find "$state/zlib-$arch" \( -name zlib.h -o -name zconf.h -o -name libz.a \) -exec cp {} "$cross/$name/zlib" \;
done
if [ "$(uname -m)" != aarch64 ]; then
    echo "fetching the runtime libraries for aarch64"
    "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --platform manylinux_2_28_aarch64 -c constraints.txt -d "$cross/wheels" apache-tvm apache-tvm-ffi
    "$venv/bin/python" - "$cross" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

cross = Path(sys.argv[1])
for wheel in sorted((cross / "wheels").glob("*aarch64.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            wanted = name.endswith(("lib/libtvm_runtime.so", "lib/libtvm_ffi.so")) or "/include/" in name
            if wanted or "licenses/" in name or name in ("tvm/LICENSE", "tvm/NOTICE"):
                archive.extract(name, cross / "aarch64")
PYTHON
    rm -rf "$cross/wheels"
fi

# --- a bare system to run packages on -----------------------------------------------------------------------------------

rm -rf "$cross/root"
for folder in bin sbin lib; do
    mkdir -p "$cross/root/usr/$folder"
    ln -s "usr/$folder" "$cross/root/$folder"
done
mkdir -p "$cross/root/tmp" "$cross/root/dev" "$cross/root/proc"
# shellcheck disable=SC2046  # words
unpack "$cross/root" $(closure none base-files:arm64 libc6:arm64 libgcc-s1:arm64 libstdc++6:arm64 dash:arm64 \
    coreutils:arm64 tar:arm64 gzip:arm64 sed:arm64 grep:arm64 | grep ':arm64$')
rm -rf "$state"
