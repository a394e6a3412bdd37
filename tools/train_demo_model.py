"""Train the small model that ships in `autodeploy/demo_model`; the same seed gives the same questions, weights and score.

`--eval-only` scores the model already in `--out`.
"""

import argparse
import os
import random
import time
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from autodeploy.demo_questions import Question, check, held_out_questions, training_questions

BOS, END, PAD, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, END, USER, ASSISTANT]
PHRASES = ["What is ", "Reverse: ", "Repeat ", " times: ", "Uppercase: ", "Count from ", " to "]
VOCAB_SIZE = 384
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] in ('user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges the fixed phrases only: digits, letters and everything else stay one character each."""
    phrase_or_character = Regex("|".join(PHRASES) + r"|[\s\S]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(phrase_or_character, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(PHRASES, trainer)
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


Row = tuple[list[int], list[bool]]  # token ids, and which of them belong to an answer


def training_rows(tokenizer: PreTrainedTokenizerFast, num_questions: int, seed: int) -> Iterator[list[Row]]:
    """Batches of rows: mostly one-question chats, some chats of two or three turns, some bare prompts without the template."""
    rng = random.Random(f"rows {seed}")
    questions = training_questions(seed)
    while True:
        turns = rng.choice((1, 1, 1, 1, 2, 3))
        rows = []
        for _ in range(num_questions // turns):
            pieces: list[str] = [BOS]
            if turns == 1 and rng.random() < 0.15:
                question = next(questions)
                pieces = [question.prompt, question.answer + END]
            else:
                for question in islice(questions, turns):
                    pieces[-1] += USER + question.prompt + END + ASSISTANT
                    pieces += [question.answer + END, ""]
            ids, is_answer = [], []
            for i, encoding in enumerate(tokenizer.backend_tokenizer.encode_batch(pieces)):
                ids += encoding.ids
                is_answer += [i % 2 == 1] * len(encoding.ids)
            rows.append((ids, is_answer))
        yield rows


def pad_rows(rows: list[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows])
    is_answer = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in rows])
    return ids, is_answer


def backward(model: Qwen3ForCausalLM, rows: list[Row], pad_id: int) -> tuple[float, float]:
    """Accumulate gradients of the mean loss over answer tokens; two chunks by length save padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    num_targets = sum(sum(mask) for _, mask in rows)
    loss_sum = num_right = 0.0
    cut = len(rows) * 2 // 3
    for chunk in (rows[:cut], rows[cut:]):
        ids, is_answer = pad_rows(chunk, pad_id)
        targets = is_answer[:, 1:]
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[targets]
        logits, labels = model.lm_head(hidden), ids[:, 1:][targets]
        loss = functional.cross_entropy(logits, labels, reduction="sum") / num_targets
        loss.backward()
        loss_sum += loss.item()
        num_right += (logits.argmax(-1) == labels).sum().item()
    return loss_sum, num_right / num_targets


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding table and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98))]


def learning_rate_factor(step: int, steps: int) -> float:
    """Short warm-up, constant, then linear to zero over the last half."""
    return min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> float:
    optimizers = make_optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: learning_rate_factor(s, args.steps)) for o in optimizers]
    pad_id = tokenizer.convert_tokens_to_ids(PAD)
    start, losses, rates = time.monotonic(), [], []
    for step, rows in enumerate(islice(training_rows(tokenizer, args.batch, args.seed), args.steps), start=1):
        loss, rate = backward(model, rows, pad_id)
        losses, rates = [*losses[-199:], loss], [*rates[-199:], rate]
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % 200 == 0 or step == args.steps:
            mean, right = sum(losses) / len(losses), sum(rates) / len(rates)
            print(f"step {step:6d}  loss {mean:.5f}  tokens right {right:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            save(model, tokenizer, args.out)
    return sum(losses) / len(losses)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


@torch.inference_mode()
def greedy_answers(model, tokenizer, questions: list[Question], batch: int = 128) -> list[str]:
    """Plain greedy `generate` through the chat template, questions of one length together so that nothing is padded."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q.prompt}], add_generation_prompt=True, return_dict=False)
        for q in questions
    ]
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    for length, group in groupby(order, key=lambda i: len(prompts[i])):
        while indices := list(islice(group, batch)):
            ids = torch.tensor([prompts[i] for i in indices])
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
            for i, text in zip(indices, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True):
                answers[i] = text
    return answers


def evaluate(folder: Path) -> tuple[float, list[tuple[Question, str]]]:
    """Exact match on the 500 held-out questions, and the questions answered wrongly."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    questions = held_out_questions()
    answers = greedy_answers(model.eval(), tokenizer, questions)
    wrong = [(q, a) for q, a in zip(questions, answers, strict=True) if not check(q, a)]
    return 1 - len(wrong) / len(questions), wrong


README = """# Demo model

A {parameters:,}-parameter Qwen3 model ({layers} layers, hidden size {hidden}), trained from random weights by
`tools/train_demo_model.py`, so that the package can answer something without a download. fp32 weights, {megabytes:.1f} MB;
the package's license covers it.

It adds numbers of up to three digits (`What is 123+456?` or `123+456=`) and follows four patterns: `Reverse: abcd`,
`Uppercase: dog`, `Repeat 3 times: ok`, `Count from 3 to 7`, with words of up to six lower-case letters. It knows nothing else.
The score is for three-digit operands; shorter ones, and chats of more than three turns, go wrong now and then. The chat template
leaves system messages out.

| measured | |
|---|---|
| exact match, 500 held-out questions, fp32 greedy | {score:.1%} |
| steps, questions per step, seed | {steps}, {batch}, {seed} |
| training time, {threads} CPU thread(s) | {seconds:.0f} s |
| mean loss per answer token, last 200 steps | {loss:.6f} |

The questions and the split are in `autodeploy/demo_questions.py`: one content key in twenty is held out, in every wording.
To make it again: `python tools/train_demo_model.py --out autodeploy/demo_model --steps {steps} --batch {batch} --seed {seed}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "autodeploy" / "demo_model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128, help="questions per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-only", action="store_true", help="score the model in --out, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    facts = vars(args).copy()
    if not args.eval_only:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        start = time.monotonic()
        facts["loss"] = train(model, tokenizer, args)
        facts["seconds"] = time.monotonic() - start
        facts |= {"layers": model.config.num_hidden_layers, "hidden": model.config.hidden_size}
        facts["parameters"] = model.num_parameters()
    score, wrong = evaluate(args.out)
    print(f"exact match {score:.4f}")
    for question, answer in wrong[:20]:
        print(f"  {question.prompt!r}: {answer!r}, should be {question.answer!r}")
    if not args.eval_only:
        megabytes = (args.out / "model.safetensors").stat().st_size / 1e6
        (args.out / "README.md").write_text(README.format(score=score, megabytes=megabytes, **facts))


if __name__ == "__main__":
    main()
