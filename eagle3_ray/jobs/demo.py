"""`demo`: a small verifier from text on this machine, a draft for it through the real verbs, and what was gained.

    verifier        documentation that comes with Python -> tokenizer and Llama          demo/verifier/
    conversations   held-out prompts, answered by the verifier itself                    demo/conversations.jsonl
    generate        the verifier's states on them                                        demo/data/
    vocab-mapping   the tokens the draft can say                                         demo/vocab/
    train           the draft, on CPU workers of a Ray of this machine                   demo/run/, demo/logs/
    evaluate        real decoding with the first epoch's draft, and with the best one    demo/run/*/evaluation.json

What is there whole is used again, so a demo that was interrupted goes on where it stopped. Nothing is downloaded.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from eagle3_ray.config import TrainSettings
from eagle3_ray.demo.conversations import TEMPERATURE, write_conversations
from eagle3_ray.demo.corpus import Corpus, build_corpus, read_documents
from eagle3_ray.demo.tiny_verifier import Quality, VerifierRecipe, make_verifier, read_quality
from eagle3_ray.errors import Eagle3RayError
from eagle3_ray.jobs import evaluate, generate, train, vocab_mapping
from eagle3_ray.jobs.cluster import CPUS_FOR_TASKS, check_outlives_job, ray_session
from eagle3_ray.machine import usable_cpus
from eagle3_ray.stopping import when_stopped
from eagle3_ray.storage import StoragePath
from eagle3_ray.training.run_folder import BEST, EVALUATION, INITIAL_METRICS, find_committed, follow_best
from eagle3_ray.training.startup import Laps
from eagle3_ray.verbs import DemoSettings, EvaluateSettings, GenerateSettings, VocabMappingSettings

TTT_STEPS = 3
FIRST_STEP, TOKENS, LOSS = "val/cond_acc_0", "val/expected_tokens", "val/loss"
REAL_TOKENS, SPEEDUP = "tokens_per_verification", "speedup"  # of evaluation.json

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class DemoPlan:
    """Sizes of everything.

    Attributes:
        verifier: the verifier's size and training.
        num_prompts: conversations at most; a tenth of them validates.
        max_new_tokens: an answer's length at most.
        draft_vocab_size: tokens the draft can say.
        total_seq_len: tokens in a bin.
        epochs: of the draft's training.
        lr: its peak rate; high, as the draft is tiny and its steps are few.
        least_first_accuracy: share (0..1) of first drafted tokens that must be right in the end.
    """

    verifier: VerifierRecipe
    num_prompts: int
    max_new_tokens: int
    draft_vocab_size: int
    total_seq_len: int
    epochs: int
    lr: float
    least_first_accuracy: float


FULL = DemoPlan(
    verifier=VerifierRecipe(hidden_size=128, intermediate_size=384, num_train_tokens=820_000),
    num_prompts=640,
    max_new_tokens=128,
    draft_vocab_size=320,
    total_seq_len=1024,
    epochs=6,
    lr=5e-3,
    least_first_accuracy=0.5,
)
SHORT = DemoPlan(
    verifier=VerifierRecipe(hidden_size=64, intermediate_size=192, num_train_tokens=200_000),
    num_prompts=160,
    max_new_tokens=96,
    draft_vocab_size=320,
    total_seq_len=512,
    epochs=3,
    lr=1e-2,
    least_first_accuracy=0.1,
)


@when_stopped("; what is there whole is used again, the same command goes on from there")
def run(settings: DemoSettings) -> None:
    """Make, train and show everything.

    Raises:
        Eagle3RayError: A part failed, or the trained draft does not beat the untrained one.
    """
    plan = SHORT if settings.short else FULL
    folder = settings.output_path.resolve()
    check_outlives_job(folder, "--output-path")
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of transformers, for files that are written in no time
    started = time.monotonic()
    corpus = build_corpus(read_documents(), settings.seed)
    with announced("1/6 verifier", "trained on the documentation that comes with Python"):
        prepare_verifier(folder, plan, corpus, settings.seed)
    with announced("2/6 conversations", f"held-out prompts, answered by the verifier (temperature {TEMPERATURE})"):
        prepare_conversations(folder, plan, corpus, settings.seed)
    # One more CPU than there are, where need be: the demo's two workers also run on a single core.
    with ray_session(max(usable_cpus(), settings.num_workers) + CPUS_FOR_TASKS):
        with announced("3/6 generate", "the verifier's hidden states"):
            generate.run(generate_settings(folder))
        with announced("4/6 vocab-mapping", "the tokens the draft can say"):
            vocab_mapping.run(vocab_settings(folder, plan))
        with announced("5/6 train", f"the draft, on {settings.num_workers} workers"):
            train.train_draft(train_settings(folder, plan, settings), Laps())
        with announced("6/6 evaluate", "real decoding of held-out prompts, with the draft of epoch 1 and the best one"):
            evaluate_drafts(folder, plan)
    results = read_results(folder / "run")
    print(f"\n{describe_results(results)}\n\n{describe_files(folder)}")
    print(f"\ntook {time.monotonic() - started:.0f} s in all")
    check_gain(results, plan)


@contextmanager
def announced(title: str, what: str) -> Iterator[None]:
    """Print a heading before a part, and what it took behind it."""
    print(f"\n=== {title}: {what}", flush=True)
    started = time.monotonic()
    yield
    print(f"took          {time.monotonic() - started:.0f} s", flush=True)


def prepare_verifier(folder: Path, plan: DemoPlan, corpus: Corpus, seed: int) -> Quality:
    """Train the verifier, or use the one that is there, and say how good it is.

    Raises:
        UsageError: The folder holds another verifier.
        Eagle3RayError: It does not predict better than token frequencies do.
    """
    verifier_dir = folder / "verifier"
    quality = read_quality(verifier_dir, plan.verifier, seed)
    if quality is None:
        progress = Progress("step", "loss")
        quality = make_verifier(verifier_dir, corpus, plan.verifier, seed, progress.show)
    else:
        print(f"there already {verifier_dir}")
    print(
        f"trained on    {quality.num_train_tokens:,} tokens; measured on {quality.num_held_out_tokens:,} held-out ones:"
    )
    rows = {"verifier": quality.verifier, "token frequencies": quality.unigram, "any token": quality.uniform}
    for name, found in rows.items():
        print(f"  {name:<20} next token right {found.accuracy:6.1%}   loss {found.loss:.2f} nats")
    if quality.verifier.accuracy < 2 * quality.unigram.accuracy or quality.verifier.loss >= quality.unigram.loss:
        raise Eagle3RayError(f"{verifier_dir}: the verifier is no better than chance. Remove it and start again.")
    return quality


def prepare_conversations(folder: Path, plan: DemoPlan, corpus: Corpus, seed: int) -> None:
    """Write conversations.jsonl if it is not there."""
    path = folder / "conversations.jsonl"
    if path.exists():
        print(f"there already {path}")
        return
    progress = Progress("prompts")
    prompts = corpus.prompts[: plan.num_prompts]
    write_conversations(path, folder / "verifier", prompts, plan.max_new_tokens, seed, progress.show)
    first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])["messages"]
    print("the first of them, shortened:")
    for message in first:
        lines = message["content"].strip("\n").splitlines()[:3]
        print("\n".join(f"  {message['role'] if n == 0 else '':<10} | {line}" for n, line in enumerate(lines)))


def generate_settings(folder: Path) -> GenerateSettings:
    """Return the settings of `generate`; the demo is one CPU run everywhere, whatever GPUs there are."""
    return GenerateSettings(
        verifier_name_or_path=str(folder / "verifier"),
        conversations_path=folder / "conversations.jsonl",
        output_path=folder / "data",
        num_workers=1,
        use_gpu=False,
    )


def vocab_settings(folder: Path, plan: DemoPlan) -> VocabMappingSettings:
    """Return the settings of `vocab-mapping`."""
    return VocabMappingSettings(
        token_freq_path=folder / "data" / "token_freq.pt",
        target_model_path=str(folder / "verifier"),
        draft_vocab_size=plan.draft_vocab_size,
        output_path=folder / "vocab",
    )


def train_settings(folder: Path, plan: DemoPlan, settings: DemoSettings) -> TrainSettings:
    """Return the settings of `train`."""
    return TrainSettings(
        verifier_name_or_path=str(folder / "verifier"),
        data_path=folder / "data",
        d2t_path=folder / "vocab" / "d2t.npy",
        t2d_path=folder / "vocab" / "t2d.npy",
        save_path=folder / "run",
        log_dir=folder / "logs",
        logger="tensorboard",
        epochs=plan.epochs,
        lr=plan.lr,
        warmup_frac=0.05,
        total_seq_len=plan.total_seq_len,
        ttt_steps=TTT_STEPS,
        num_workers=settings.num_workers,
        use_gpu=False,
        seed=settings.seed,
    )


def evaluate_drafts(folder: Path, plan: DemoPlan) -> None:
    """Decode with the first epoch's draft and with the best one, which may be the same; once each."""
    run_dir = folder / "run"
    for draft_path in dict.fromkeys((find_committed(run_dir)[0].path, follow_best(run_dir / BEST))):
        if (draft_path / EVALUATION).exists():
            print(f"there already {draft_path / EVALUATION}")
            continue
        evaluate.run(
            EvaluateSettings(
                draft_path=draft_path,
                data_path=folder / "data",
                num_prompts=plan.num_prompts // 10,
                max_new_tokens=plan.max_new_tokens,
                num_workers=1,  # two would take each other's time
                use_gpu=False,
            )
        )


def read_results(run_dir: Path) -> list[Metrics]:
    """Return what was measured: of the untrained draft, then after each epoch; by validation, and by decoding."""
    untrained: Metrics = json.loads((run_dir / INITIAL_METRICS).read_text(encoding="utf-8"))
    return [untrained, *({**found.metrics, **read_decoded(found.path)} for found in find_committed(run_dir))]


def read_decoded(checkpoint_path: StoragePath) -> Metrics:
    """Return what real decoding gave, if this draft was decoded with."""
    path = checkpoint_path / EVALUATION
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: found[name] for name in (REAL_TOKENS, SPEEDUP)}


def describe_results(results: list[Metrics]) -> str:
    """Return the table: a row for the untrained draft, and one an epoch."""
    steps = [f"val/cond_acc_{k}" for k in range(TTT_STEPS)]
    columns = {
        "loss": (LOSS, "{:.2f}"),
        **{f"step {k + 1}": (name, "{:.1%}") for k, name in enumerate(steps)},
        "tokens": (TOKENS, "{:.2f}"),
        "real": (REAL_TOKENS, "{:.2f}"),
        "speed": (SPEEDUP, "{:.2f}x"),
    }
    lines = ["draft       " + "".join(f"{title:>10}" for title in columns)]
    for number, metrics in enumerate(results):
        cells = [form.format(metrics[name]) if name in metrics else "-" for name, form in columns.values()]
        label = "untrained" if number == 0 else f"epoch {number}"
        lines.append(f"{label:<12}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(
        [
            "measured on validation conversations, which the draft was not trained on",
            *lines,
            "loss    KL from the verifier's distribution, in nats, summed over the steps",
            "step k  share of the k-th drafted tokens that are the verifier's first choice, among the tokens the draft "
            "can say, where all before were",
            f"tokens  per verification of a greedy chain of {TTT_STEPS}, simulated on those conversations; the "
            "verifier's own token is counted, so 1 is no gain",
            "real    the same of real greedy decoding, from the prompts of those conversations",
            "speed   of that, in times the verifier's alone",
        ]
    )


def describe_files(folder: Path) -> str:
    """Return where things lie and how to serve the draft."""
    best = folder / "run" / BEST
    speculative = json.dumps(
        {"method": "eagle3", "model": str(best), "num_speculative_tokens": TTT_STEPS}, separators=(",", ":")
    )
    return (
        f"draft     {best} -> {best.resolve().name}\n"
        f"verifier  {folder / 'verifier'}\n"
        f"curves    tensorboard --logdir {folder / 'logs'}\n"
        f"serve     vllm serve {folder / 'verifier'} --speculative-config '{speculative}'"
    )


def check_gain(results: list[Metrics], plan: DemoPlan) -> None:
    """Refuse to call it a success if training did not pay.

    Raises:
        Eagle3RayError: Names what was expected and what was measured.
    """
    untrained, first, last = results[0], results[1], results[-1]
    problems = []
    if last[LOSS] >= untrained[LOSS]:
        problems.append(f"loss {last[LOSS]:.3f}, untrained {untrained[LOSS]:.3f}: it should be lower")
    if last[TOKENS] <= untrained[TOKENS]:
        problems.append(f"tokens per verification {last[TOKENS]:.3f}, untrained {untrained[TOKENS]:.3f}")
    if last[FIRST_STEP] < max(plan.least_first_accuracy, 2 * untrained[FIRST_STEP]):
        problems.append(
            f"first drafted token right {last[FIRST_STEP]:.1%}, untrained {untrained[FIRST_STEP]:.1%}; expected twice "
            f"that and at least {plan.least_first_accuracy:.0%}"
        )
    if len(results) > 2 and last[FIRST_STEP] <= first[FIRST_STEP]:
        problems.append(f"first drafted token right {last[FIRST_STEP]:.1%}, not more than after epoch 1")
    decoded = [metrics[REAL_TOKENS] for metrics in results if REAL_TOKENS in metrics]
    if len(decoded) > 1 and decoded[-1] <= decoded[0]:
        problems.append(f"real decoding {decoded[-1]:.3f} tokens per verification, {decoded[0]:.3f} after epoch 1")
    if problems:
        raise Eagle3RayError(
            "the trained draft does not clearly beat the untrained one:\n  "
            + "\n  ".join(problems)
            + "\nRemove the demo's folder and run it again; if this comes back, it is a bug."
        )


class Progress:
    """A line of progress: rewritten on a terminal, one each fifth elsewhere."""

    def __init__(self, unit: str, value_name: str = "") -> None:
        self._unit, self._value_name = unit, value_name
        self._last_fifth = 0

    def show(self, num_done: int, num_all: int, value: float = 0.0) -> None:
        """Show that `num_done` of `num_all` are done."""
        text = f"  {self._unit} {num_done:,} of {num_all:,}" + (
            f"  {self._value_name} {value:.2f}" if self._value_name else ""
        )
        fifth = num_done * 5 // num_all
        if sys.stdout.isatty():
            print(f"\r{text}", end="\n" if num_done == num_all else "", flush=True)
        elif fifth > self._last_fifth:
            print(text, flush=True)
        self._last_fifth = fifth
