"""What the demo needs beside the real verbs: text, and a verifier small enough to be trained on the spot.

No module here knows Ray; `jobs/demo.py` calls them and then the same jobs as the command line. Reading order:

    corpus.py         the documentation that comes with Python -> passages to train on, passages and prompts held out
    muon.py           the optimizer that makes some hundred steps enough
    tiny_verifier.py  passages -> a transformers folder: byte-level BPE tokenizer, chat template, Llama
    conversations.py  held-out prompts -> JSONL with the verifier's own answers
"""
