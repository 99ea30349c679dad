#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into an empty environment and runs the quick start there, from a folder that
# knows no checkout.  Needs the .venv of `make setup`; nothing is written outside a temporary folder.
#
#   scripts/check_wheel.sh          the wheel is installed, its dependencies are those of .venv: no network
#   FULL=1 scripts/check_wheel.sh   dependencies are installed too, as pip would: about 11 GB
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(cd "${VENV:-.venv}" && pwd)
constraints=$PWD/constraints.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== sdist, and the wheel from the sdist"
"$venv/bin/python" -m hatchling build --target sdist --directory "$work/dist" >/dev/null
mkdir "$work/source" "$work/elsewhere"
tar -xzf "$work"/dist/*.tar.gz -C "$work/source" --strip-components 1
(cd "$work/source" && "$venv/bin/python" -m hatchling build --target wheel --directory "$work/dist" >/dev/null)
ls -l "$work/dist"

echo "== an empty environment"
"$venv/bin/uv" venv --quiet --python "$venv/bin/python" "$work/env"
if [[ ${FULL:-0} == 1 ]]; then
  "$venv/bin/uv" pip install --quiet --python "$work/env/bin/python" --constraint "$constraints" "$work"/dist/*.whl
else
  "$venv/bin/uv" pip install --quiet --python "$work/env/bin/python" --no-deps "$work"/dist/*.whl
  # A folder that a .pth names is searched last, and .pth files in it are not read: the editable install stays unseen.
  site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"
fi

cd "$work/elsewhere"
unset PYTHONPATH
export PATH=$work/env/bin:$PATH
echo "== what is imported"
python - "$work/env" <<'PYTHON'
import sys
import vlcache_kernels, vlcache_policies, vlcache_sgl
from vlcache_sgl.client.bundled import bundled_model
for path in (vlcache_sgl.__file__, vlcache_policies.__file__, vlcache_kernels.__file__, str(bundled_model())):
    print(path)
    assert path.startswith(sys.argv[1]), f"not from the wheel: {path}"
PYTHON
model=$(python -c 'from vlcache_sgl.client.bundled import bundled_model; print(bundled_model())')

echo "== the quick start"
vlcache --version
vlcache policies | tail -n 4
vlcache plan --model "$model" --gpu-memory 24GB
vlcache inspect --output page
ls -l page.png page.html
vlcache eval --samples 4 --output answers
ls -l answers
vlcache demo
echo "the wheel works"
