"""From conversations to v1 samples: text -> ids and loss mask -> the verifier's states -> `.pt` files.

No module here knows Ray; `jobs/generate.py` spreads the work. Reading order:

    conversations.py   JSONL lines -> conversations, every problem of a line named
    loss_mask.py       conversation -> token ids and which of them are supervised
    hidden_states.py   ids -> states of the auxiliary layers and the last one before the final norm
    output_folder.py   data_config.json, data_<n>.pt: written whole or not at all, and never mixed
    work.py            what one task and one worker do with all of these
"""
