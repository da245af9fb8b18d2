#!/bin/bash
# `train ...`, `demo`, `--help`: a verb of eagle3-ray; `ray ...`, `python ...`, `bash`: the program of that name.
if [ -n "$(type -P "${1:-}")" ]; then
    exec "$@"
fi
exec eagle3-ray "$@"
