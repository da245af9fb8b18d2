"""How good a draft is: real speculative decoding with its verifier, and an estimate from samples.

No module here knows Ray; `jobs/evaluate.py` spreads the work. Reading order:

    prompts.py        JSONL lines, or held-out samples -> token ids to go on from
    served_draft.py   the folder a server loads -> a draft that guesses ahead, with keys and values kept
    decode.py         verifier alone, and verifier with draft: greedy, token for token the same
    estimate.py       a sample -> how many tokens in a row the draft gets right there, without generating any
    result.py         counts of all prompts -> shares with intervals, table, JSON
"""
