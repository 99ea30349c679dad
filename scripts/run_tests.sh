#!/usr/bin/env bash
# The default tests, in two processes side by side: those with servers, and all others.  A server that starts, waits or
# reads leaves a core to the others, which use one.  With arguments for pytest, a selection mostly: one process.
set -uo pipefail
cd "$(dirname "$0")/.."
test=("${VENV:-.venv}/bin/python" -m pytest -m "not slow")
if (($#)); then
  exec "${test[@]}" "$@"
fi
log=$(mktemp)
"${test[@]}" --ignore=tests/e2e tests >"$log" 2>&1 &
others=$!
trap 'kill "$others" 2>/dev/null; rm -f "$log"' EXIT
"${test[@]}" tests/e2e
with_servers=$?
wait "$others"
without=$?
cat "$log"
exit $((with_servers ? with_servers : without))
