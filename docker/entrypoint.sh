#!/bin/bash
# `train ...`, `demo`, `--help`: a verb of eagle3-ray; `ray ...`, `python ...`, `bash`: the program of that name.
if type -P -- "${1:-}" >/dev/null; then
    exec "$@"
fi
exec eagle3-ray "$@"
