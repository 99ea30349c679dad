#!/usr/bin/env bash
# The default tests, in two processes side by side: those with servers, and all others.  A server that starts, waits or
# reads leaves a core to the others, which use one.  The others are done sooner and go on with tests whose servers
# nobody else asks.  With arguments for pytest, a selection mostly: one process.
set -uo pipefail
cd "$(dirname "$0")/.."
test=("${VENV:-.venv}/bin/python" -m pytest -m "not slow")
if (($#)); then
  exec "${test[@]}" "$@"
fi
own_servers=(tests/e2e/test_{calibration,fp8,hybrids,matrix,real_model,served_flags}.py)
log=$(mktemp)
(
  "${test[@]}" --ignore=tests/e2e tests
  without=$?
  "${test[@]}" "${own_servers[@]}"
  with_own=$?
  exit $((without ? without : with_own))
) >"$log" 2>&1 &
others=$!
trap 'kill "$others" $(pgrep -P "$others") 2>/dev/null; rm -f "$log"' EXIT
"${test[@]}" tests/e2e "${own_servers[@]/#/--ignore=}"
with_servers=$?
wait "$others"
without=$?
cat "$log"
exit $((with_servers ? with_servers : without))
