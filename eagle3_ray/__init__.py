"""eagle3_ray trains EAGLE-3 draft models on Ray: from hidden states on disk to a folder that vLLM serves.

A *verifier* is the big model, a *draft* the small one that guesses its next tokens. A *sample* is one file with one
conversation's tokens and hidden states; a *bin* is a row of tokens packed from several samples; a *step* is one
update of the weights, a *ttt_step* one of the guesses in a row that a step trains.

    conversations -> generate -> samples (.pt) -> index -> packing -> bins -> ranks -> checkpoints -> vLLM
                     vocab-mapping: token counts -> d2t, t2d ------------------^

    cli.py  __main__.py     verbs and exit codes; imports a job only when its settings are whole
    config.py  verbs.py     every setting: name, default, meaning, checks; nothing else states a default
    schema.py               what every group of settings has in common
    flags.py                the schema as flags, and as the README's tables
    settings_file.py        the schema as YAML: --config and run.yaml
    errors.py               the errors raised on purpose, each with its exit code
    storage.py              paths that may lie on an object store
    console.py              what a command tells its user: text, or JSON
    stopping.py             signals that end a command with its work saved
    machine.py              what this machine, or its container, has
    background.py           work in a thread, for one that goes on meanwhile
    metrics.py  loggers.py  what is measured, and where it goes
    data/                   from bytes on disk to bins on a rank
    model/                  EAGLE-3; knows nothing of Ray, files or ranks
    training/               one rank's life
    generation/             a verifier's hidden states to samples on disk
    evaluation/             a draft decodes beside its verifier, as in serving
    export.py               a checkpoint to the folder a server loads
    report/                 what runs have logged, as one page
    jobs/                   a verb a file

Imports go down one way, cli -> jobs -> report, training, evaluation, generation, export -> data, model -> errors;
`tests/test_architecture.py` holds the table. Reading order: config, data/samples, data/batch, model/draft,
training/step, training/loop, jobs/train.
"""

import time

__version__ = "0.1.0"
BEGAN_S = time.time()  # of a command: nothing of it is imported before this
