#!/usr/bin/env bash
# The paper's perplexity tables on this machine's GPU or TPU: sets up an environment for it, then runs
# scripts/paper_tables.py, which takes the arguments. Stopped, it goes on where it was when started again.
#   scripts/perplexity.sh llama-7b falcon-7b
#   scripts/perplexity.sh --model you/your-model --calib redpajama
#   ACCELERATOR=tpu scripts/perplexity.sh llama-7b
#   ACCELERATOR=cpu scripts/perplexity.sh --dry-run        the same steps on the demo model, no accelerator needed
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${ACCELERATOR:-gpu}
if [ "$kind" = cpu ]; then
  scripts/setup
  exec "${VENV:-.venv}/bin/python" scripts/paper_tables.py "$@"
fi
export VENV=${VENV:-.venv-accelerator}
PYTHON=${PYTHON:-$(scripts/newest_python)} scripts/setup
extra=$([ "$kind" = tpu ] && echo tpu || echo cuda13)
accelerated() { "$VENV/bin/python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' 2>/dev/null; }
if ! accelerated; then
  echo "perplexity: installing jax[$extra]"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "jax[$extra]"
fi
if ! accelerated; then
  echo "perplexity: JAX finds no accelerator here: is the driver installed? (nvidia-smi; or ACCELERATOR=cpu)" >&2
  exit 1
fi
exec "$VENV/bin/python" scripts/paper_tables.py "$@"
