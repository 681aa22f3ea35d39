#!/usr/bin/env bash
# Checks the Pallas kernels on this machine's GPU or TPU, times them against dense 16-bit products, and writes a
# report to send back (an issue is the place). Arguments go to benchmarks/accelerator_check.py.
#   scripts/gpu_check.sh              a quarter of an hour or so
#   ACCELERATOR=tpu scripts/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv-accelerator}
PYTHON=${PYTHON:-$(scripts/newest_python)} scripts/setup
extra=$([ "${ACCELERATOR:-gpu}" = tpu ] && echo tpu || echo cuda13)
if ! "$VENV/bin/python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' 2>/dev/null; then
  echo "gpu_check: installing jax[$extra]"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "jax[$extra]"
fi
if ! "$VENV/bin/python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")'; then
  echo "gpu_check: JAX finds no accelerator here: is the driver installed? (nvidia-smi)" >&2
  exit 1
fi
status=0
"$VENV/bin/python" benchmarks/accelerator_check.py "$@" || status=$?
echo "gpu_check: accelerator_report.json has everything; please send it back with the output above"
exit "$status"
