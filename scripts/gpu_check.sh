#!/usr/bin/env bash
# Checks and measures everything that needs a GPU (or TPU) on this machine, in under 8 minutes after the installation, and
# writes a report to send back (an issue is the place). Arguments go to benchmarks/accelerator_check.py.
#   scripts/gpu_check.sh
#   scripts/gpu_check.sh --parts right card products
#   ACCELERATOR=tpu scripts/gpu_check.sh
#   TORCH_PYTHON=/usr/bin/python3 scripts/gpu_check.sh     a Python with PyTorch: its products are measured beside ours
#   DEMO_MODEL=folder scripts/gpu_check.sh                 the model of the part `demo`; else it is downloaded
#   PYTHON_WITH_JAX=python3 scripts/gpu_check.sh           installs nothing: a Python with JAX for the device, and numpy
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${PYTHON_WITH_JAX:-}" ]; then
  python=$PYTHON_WITH_JAX
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
  export VENV=${VENV:-.venv-accelerator}
  PYTHON=${PYTHON:-$(scripts/newest_python)} scripts/setup
  python=$VENV/bin/python
  extra=$([ "${ACCELERATOR:-gpu}" = tpu ] && echo tpu || echo cuda13)
  if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' 2>/dev/null; then
    echo "gpu_check: installing jax[$extra]"
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade "jax[$extra]"
  fi
fi
if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")'; then
  echo "gpu_check: JAX finds no accelerator here: is the driver installed? (nvidia-smi)" >&2
  exit 1
fi
if [ -z "${TORCH_PYTHON:-}" ]; then
  for candidate in "$python" python3; do
    if "$candidate" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
      export TORCH_PYTHON=$candidate
      break
    fi
  done
fi
status=0
"$python" benchmarks/accelerator_check.py "$@" || status=$?
echo "gpu_check: accelerator_report.jsonl has everything; please send it back with the output above"
exit "$status"
