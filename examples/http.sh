#!/usr/bin/env bash
# Use the HTTP surface with curl: health, a completion, a streamed completion, metrics.
#
#     examples/http.sh http://127.0.0.1:8000
set -euo pipefail
url=${1:-http://127.0.0.1:8000}

curl --fail-with-body --silent "$url/health"; echo
curl --fail-with-body --silent "$url/v1/completions" \
    --header 'Content-Type: application/json' \
    --data '{"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}'; echo
curl --fail-with-body --silent --no-buffer "$url/v1/completions" \
    --header 'Content-Type: application/json' \
    --data '{"prompt": "Once upon a time", "max_tokens": 8, "stream": true}'
curl --fail-with-body --silent "$url/metrics" | grep '^moejax_'
