"""How near the estimate on texts comes to real decoding, with the drafts of a demo: `make demo` first.

    python -m tests.benchmarks.estimate demo

Of the first epoch's draft and the best one: tokens per verification of real greedy decoding, of the estimate on the
held-out answers that the verifier had sampled, and of the estimate on its greedy answers to the same prompts. Prints
one JSON object.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eagle3_ray.demo.conversations import PROMPTS_PER_BATCH, TEMPERATURE, sample_answers, to_record
from eagle3_ray.jobs import evaluate, generate
from eagle3_ray.jobs.cluster import ray_session
from eagle3_ray.verbs import EvaluateSettings, GenerateSettings

GREEDY = 1e-4  # a temperature at which nothing but the likeliest token is sampled


def write_greedy_conversations(demo: Path, path: Path, max_new_tokens: int) -> None:
    """Answer every prompt of the demo's conversations anew, each with the likeliest tokens, in the same order."""
    lines = (demo / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["messages"][0]["content"] for line in lines]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo / "verifier")
    model = LlamaForCausalLM.from_pretrained(demo / "verifier", dtype=torch.float32).eval()
    records = []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch = tuple(prompts[start : start + PROMPTS_PER_BATCH])
        answers = sample_answers(model, tokenizer, batch, max_new_tokens, GREEDY)
        records += [json.dumps(to_record(*pair)) for pair in zip(batch, answers, strict=True)]
    path.write_text("\n".join(records) + "\n", encoding="utf-8")


def run_evaluate(draft_path: Path, data_path: Path, output_path: Path, max_new_tokens: int) -> dict[str, Any]:
    """Evaluate a draft with the samples that it was not trained on."""
    settings = EvaluateSettings(
        draft_path=draft_path,
        data_path=data_path,
        output_path=output_path,
        max_new_tokens=max_new_tokens,
        num_workers=1,
        use_gpu=False,
    )
    evaluate.run(settings)
    found: dict[str, Any] = json.loads(output_path.read_text(encoding="utf-8"))
    return found


def measure(demo: Path, folder: Path, max_new_tokens: int) -> dict[str, Any]:
    """Return the three figures of each draft, with what was decoded."""
    write_greedy_conversations(demo, folder / "greedy.jsonl", max_new_tokens)
    generate.run(
        GenerateSettings(
            verifier_name_or_path=str(demo / "verifier"),
            conversations_path=folder / "greedy.jsonl",
            output_path=folder / "greedy",
            num_workers=1,
            use_gpu=False,
        )
    )
    measured: dict[str, Any] = {}
    for name in ("0", "best"):
        draft_path = (demo / "run" / name).resolve()
        sampled = run_evaluate(draft_path, demo / "data", folder / "sampled.json", max_new_tokens)
        held_out = folder / "held_out"
        held_out.mkdir(exist_ok=True)
        for prompt in sampled["prompts"]:
            target = held_out / Path(prompt["name"]).name
            if not target.exists():
                os.link(folder / "greedy" / Path(prompt["name"]).relative_to(demo / "data"), target)
        greedy = run_evaluate(draft_path, held_out, folder / "greedy.json", max_new_tokens)
        measured[f"checkpoint {draft_path.name}"] = {
            "decoded": sampled["decoded"]["tokens_per_verification"],
            "estimate_on_sampled": sampled["estimate"]["tokens_per_verification"],
            "estimate_on_greedy": greedy["estimate"]["tokens_per_verification"],
            "speedup": sampled["speedup"],
            "num_prompts": len(sampled["prompts"]),
        }
    return measured


def main() -> None:
    """Measure the drafts of one demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of `make demo`")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens an answer is cut at; the demo's own")
    arguments = parser.parse_args()
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder, ray_session():
        measured = measure(arguments.demo.resolve(), Path(folder), arguments.max_new_tokens)
    row = {
        "benchmark": "estimate",
        "device": f"cpu x{os.cpu_count()}",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "temperature_sampled": TEMPERATURE,
        "max_new_tokens": arguments.max_new_tokens,
        "drafts": measured,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
