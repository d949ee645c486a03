#!/bin/sh
# The torch-free C++ under AddressSanitizer and UndefinedBehaviorSanitizer.
#   tests/sanitize.sh            PYTHON and CXX choose the programs; JOBS the compilers at once
set -eu
cd "$(dirname "$0")/.."
out=build/sanitize
mkdir -p "$out"
flags="-std=c++20 -O2 -g -fno-omit-frame-pointer -ffp-contract=off -DRS_SANITIZE -Wno-unknown-pragmas
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"

# Everything but the binding: a file that includes a torch header is not part of it.
sources=$(find csrc -name '*.cpp' -not -path 'csrc/cuda/*' | sort |
  xargs grep -L -E 'bind\.h|qat_linear\.h|<(ATen|torch|pybind11)/' )
for source in $sources tests/cpp/sanitize.cpp; do
  echo "$source $out/$(echo "$source" | tr / _).o"
done | xargs -P "${JOBS:-2}" -L 1 sh -c "${CXX:-c++} $(echo $flags) -c \"\$0\" -o \"\$1\""
for source in $sources tests/cpp/sanitize.cpp; do
  set -- "$@" "$out/$(echo "$source" | tr / _).o"
done
${CXX:-c++} $flags -o "$out/sanitize" "$@"

PYTHONPATH=.:tests "${PYTHON:-python3}" -c "
import walk
for codec in walk.ALL:
    if walk.one_term(codec) or codec in walk.DEFAULTS:
        print(codec.spec)
" >"$out/specs.txt"
"$out/sanitize" <"$out/specs.txt"
