"""Train a minGRU or minLSTM language model:  python train.py configs/demo.yaml [section.key=value ...]

--help lists every key, --print-config shows what a command would train.
`accelerate launch [--config_file configs/accelerate/NAME.yaml] train.py ...` does the same on one or several devices.
The script reads top to bottom: config -> data -> model -> loop -> save. training/ holds what it calls.

B batch (windows of one process and micro-batch), T time (of the process, where several share a sequence).
"""

import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

from training.command_line import parse_command_line
from training.config import (
    MOST_SKIPPED_STEPS,
    InputError,
    RunConfig,
    TrainConfig,
    exit_with_one_line,
    load_config,
    one_line,
)

if __name__ == "__main__":  # a wrong setting is told before the imports below, which take seconds
    command_line = parse_command_line()

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, set_seed
from torch import nn
from torch.distributed.elastic.multiprocessing import errors
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from modeling_minrnn import NO_LOGITS, MinRNNConfig, MinRNNForCausalLM, sequence_chunked_backward
from training.allocator import keep_freed_memory
from training.checkpoint import (
    CARD_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    TrainingState,
    changed_settings,
    check_best_model,
    check_output_dir,
    load_checkpoint,
    open_output_dir,
    raise_on_all,
    save_best_model,
    save_checkpoint,
    sole_run,
    stop_on_signal,
)
from training.data import (
    IGNORED,
    ParallelStreams,
    RandomWindows,
    TokenStream,
    counted_stream,
    load_documents,
    streamed_windows,
    token_digests,
    token_stream,
)
from training.hub import check_repository, push_folder
from training.optimizers import make_optimizer
from training.parallel import Share, share_batch
from training.precision import SLOW_BF16, SLOW_MUON, WORTH_A_TRIAL, emulates_bf16, faster_products
from training.report import (
    MetricsLog,
    held_out_scores,
    next_steps,
    plot_loss_curve,
    read_metrics,
    write_end,
    write_model_card,
    write_nonfinite,
    write_start,
)
from training.sharded import gathered, gathered_model
from training.tasks import HeldOutQuestions, load_task
from training.tokenizers import load_tokenizer
from training.trackers import start_trackers, trackers_of

EVALUATION_CHUNK_TOKENS = 4096
FIRST_TOKENS = 1 << 16
EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it
EXIT_RESUME = 75  # by SIGTERM; EX_TEMPFAIL of sysexits.h: the same command with train.resume=true goes on


def main(path: str, overrides: list[str]) -> int:
    disable_progress_bar()  # of transformers: saving a model is no progress
    keep_freed_memory()

    # ---- Config
    config = load_config(path, overrides)
    train = config.train
    if unknown := set(train.trackers) - {str(name) for name in get_available_trackers()}:
        raise InputError(f"train.trackers: {', '.join(sorted(unknown))} unknown or not installed")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError("DeepSpeed steps by itself, past the checks and checkpoints of train.py: launch it without")
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    emulated = train.bf16 is True and cpu and emulates_bf16()
    if emulated:
        train.bf16 = False
    accelerator = Accelerator(
        cpu=cpu,  # or each of several CPU processes would start a run of its own
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        mixed_precision="bf16" if train.bf16 else "no",
        dynamo_backend="inductor" if train.compile else None,
        log_with=trackers_of(config) or None,
        project_dir=train.output_dir,
    )
    notes = [f"train.bf16=true: {SLOW_BF16} (train.bf16=force: bfloat16 all the same)"] if emulated else []
    if train.optimizer == "muon" and cpu and emulates_bf16():
        notes.append(f"train.optimizer=muon: {SLOW_MUON}")
    precision, found = torch.get_float32_matmul_precision(), None
    if cpu and not train.bf16 and train.steps * train.batch_size * train.sequence_length >= WORTH_A_TRIAL:
        # One answer for all processes, and through it for all that the run computes.
        (found,) = broadcast_object_list([faster_products() if accelerator.is_main_process else None])
    if found:
        notes.append(found)
    for note in notes:
        accelerator.print(note)
    share = share_batch(accelerator, train)
    if config.hub.push:
        with raise_on_all(f"hub.repository {config.hub.repository}"):
            if accelerator.is_main_process:
                check_repository(config.hub)
    command = shlex.join(["python", "train.py", path, *overrides])
    torch.set_float32_matmul_precision("medium" if found else precision)
    try:
        with sole_run(Path(train.output_dir), accelerator):
            return run(config, accelerator, share, command, notes)
    finally:
        torch.set_float32_matmul_precision(precision)


def run(config: RunConfig, accelerator: Accelerator, share: Share, command: str, notes: list[str]) -> int:
    """The rest of main, in a folder that no other run writes to."""
    train = config.train
    output_dir = Path(train.output_dir)
    checkpoint = check_output_dir(config, accelerator.print)

    # ---- Data
    tokenizer, batches, held_out, digests = load_data(config, accelerator, share, checkpoint)

    # ---- Model
    set_seed(train.seed)
    model = build_model(config.model, tokenizer)
    optimizer = make_optimizer(model, train)
    # `model` stays the plain model; `training_model` may wrap it for several processes and the compiler.
    training_model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(train.seed, device_specific=True)  # dropout differs between processes

    # ---- Loop
    accelerator.wait_for_everyone()  # all have checked the folder before it changes
    state = TrainingState(model, optimizer, batches, digests, context_ranks=share.context_ranks)
    if config.data.tokenizer == "bpe" and not config.data.task:
        state.trained_tokenizer = tokenizer
    if train.carry_state:
        state.caches = [DynamicCache(config=model.config) for _ in range(train.gradient_accumulation_steps)]
    if checkpoint:
        load_checkpoint(accelerator, checkpoint, state)
        check_best_model(accelerator, output_dir, state, tokenizer)
    progress = state.progress
    if train.steps < progress.step:
        raise InputError(f"train.steps is {train.steps}: the run in {output_dir} is at step {progress.step}")
    patience = train.early_stopping_patience or float("inf")
    changed = changed_settings(checkpoint, config) if checkpoint else {}
    if progress.step == train.steps or progress.evaluations_since_best >= patience:
        # Nothing is left to train: the changed settings apply to no step.
        changed, config = {}, replace(load_config(str(checkpoint / SETTINGS_FILE), []), hub=config.hub)
        config.train.output_dir = train.output_dir
    if accelerator.is_main_process:
        open_output_dir(config)
        write_start(output_dir, command, accelerator, progress.step, changed, notes)
        metrics = MetricsLog(output_dir, progress.step)
    if not checkpoint:
        accelerator.wait_for_everyone()  # what was in the folder is gone
        save_checkpoint(accelerator, output_dir, config, state)  # whatever comes, there is one to go on from
    start_trackers(accelerator, config, resumed=progress.step > 0)
    step_tokens = train.batch_size * train.sequence_length
    all_tokens = progress.tokens + (train.steps - progress.step) * step_tokens
    accelerator.print(
        f"{model.num_parameters():,} parameters on {accelerator.num_processes} x {accelerator.device.type}; "
        f"{step_tokens:,} tokens a step, {all_tokens:,} in {train.steps:,} steps; "
        f"{len(held_out):,} held-out tokens"
    )

    def record(**values: float) -> None:
        accelerator.log(values, step=progress.step)
        if accelerator.is_main_process:
            metrics.write({"step": progress.step, **values})

    bar = tqdm(
        total=all_tokens,
        initial=progress.tokens,
        unit="token",
        unit_scale=True,
        mininterval=1,
        disable=not accelerator.is_main_process,
    )
    interrupted = False
    with bar, stop_on_signal(accelerator) as signals:
        losses, timer = [], time.perf_counter()
        while progress.step < train.steps and progress.evaluations_since_best < patience and not interrupted:
            model.train()
            batch = next(batches).to(accelerator.device)  # (2, rows of this process, T of the sequence)
            losses_of_parts = forward_and_backward(accelerator, training_model, batch, state, train, share, tokenizer)
            loss = accelerator.reduce(torch.stack(losses_of_parts).mean(), "mean")
            grad_norm = gradient_norm(model)
            share_of_rate = schedule(train, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = share_of_rate * group["initial_lr"]
            if (loss + grad_norm).isfinite():
                nn.utils.clip_grads_with_norm_(model.parameters(), train.grad_clip_norm, grad_norm)
                optimizer.step()
                losses.append(loss)
                progress.skipped_in_a_row = 0
            else:
                skip_step(config, accelerator, state, losses_of_parts)
                record(skipped_steps=progress.skipped_steps)
            optimizer.zero_grad()
            progress.step += 1
            progress.tokens += step_tokens
            bar.update(step_tokens)

            if progress.step % train.log_every_steps == 0 and losses:
                loss = torch.stack(losses).mean().item()
                steps_per_s = len(losses) / (time.perf_counter() - timer)
                record(
                    loss=loss,
                    learning_rate=share_of_rate * train.learning_rate,
                    grad_norm=grad_norm.item(),
                    tokens_per_s=steps_per_s * step_tokens,
                )
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                losses, timer = [], time.perf_counter()

            if progress.step % train.eval_every_steps == 0 or progress.step == train.steps:
                started = time.perf_counter()
                scores, lines = evaluate_and_keep(config, accelerator, state, tokenizer, held_out)
                record(**scores)
                for line in lines:
                    bar.write(line)
                timer += time.perf_counter() - started

            # After steps that were not finite the parameters may be the cause: keep the checkpoint from before.
            if progress.step % train.save_every_steps == 0 and not progress.skipped_in_a_row:
                save_checkpoint(accelerator, output_dir, config, state)
            interrupted = accelerator.check_trigger()
        save_checkpoint(accelerator, output_dir, config, state)

    # ---- Save
    if not interrupted and not progress.best_step:
        raise InputError(f"no evaluation had a finite loss, so {output_dir} holds no model: lower train.learning_rate")
    if interrupted:
        accelerator.print(f"stopped at step {progress.step}: the same command with train.resume=true continues it")
    elif accelerator.is_main_process:
        in_windows = ""
        if held_out.is_one_text:
            best = MinRNNForCausalLM.from_pretrained(output_dir).to(accelerator.device)
            end_token = tokenizer.eos_token_id if train.carry_state else None
            loss, _ = evaluate(best, held_out, end_token=end_token, window=train.sequence_length)
            if not any("held_out_window_loss" in row for row in read_metrics(output_dir, progress.step)):
                record(held_out_window_loss=loss)
            in_windows = f", in windows of {train.sequence_length} tokens {loss:.4f}"
        plot_loss_curve(output_dir)
        card = write_model_card(output_dir, config, model, progress)
        if card.name != CARD_FILE:
            print(f"{output_dir / CARD_FILE} was edited: it stays as it is, and {card.name} has the new card")
        print(
            f"{output_dir} holds the model of step {progress.best_step}, held-out loss {progress.best_loss:.4f}"
            + in_windows
        )
    exit_code = 0
    if interrupted:
        exit_code = EXIT_RESUME if SIGTERM in gather_object(signals) else EXIT_INTERRUPTED
    if accelerator.is_main_process:
        write_end(output_dir, progress.step, exit_code)
    # Delete DistributedDataParallel before the process group. As the group's last owner it would wait for the group's
    # threads while it holds the interpreter's lock: a deadlock if one of them needs the lock to free a tensor.
    del training_model
    accelerator.free_memory()
    accelerator.end_training()
    if not interrupted and accelerator.is_main_process:
        print(*next_steps(config, progress.step), sep="\n")
    if config.hub.push and not interrupted and accelerator.is_main_process:
        print(f"published as {push_folder(output_dir, config.hub)}")
    return exit_code


def forward_and_backward(
    accelerator: Accelerator,
    training_model: nn.Module,
    batch: torch.Tensor,
    state: TrainingState,
    train: TrainConfig,
    share: Share,
    tokenizer: PreTrainedTokenizerBase,
) -> list[torch.Tensor]:
    """Add the gradients of a batch (2, rows of this process, T of the sequence); the loss of each micro-batch."""
    losses = []
    for i, rows in enumerate(batch.chunk(train.gradient_accumulation_steps, dim=1)):
        inputs, targets = (share.chunk(tokens) for tokens in rows)  # (B, T)
        arguments = {
            "labels": targets,
            "shift_labels": targets,  # shifted already, so that each of the T positions predicts a token
            # The mean over processes is then one over tokens, though chunks differ in length.
            "num_items_in_batch": (rows[1] != IGNORED).sum() / share.context_ranks,
            "use_cache": False,
        }
        if train.carry_state:
            arguments |= {"past_key_values": state.caches[i], "reset_mask": inputs == tokenizer.eos_token_id}
        with accelerator.accumulate(training_model):
            if train.chunk_length:
                arguments["num_items_in_batch"] *= train.gradient_accumulation_steps
                loss = sequence_chunked_backward(training_model, inputs, chunk_size=train.chunk_length, **arguments)
                loss *= train.gradient_accumulation_steps
            else:
                loss = training_model(
                    inputs, context_parallel_group=share.context_group, logits_to_keep=NO_LOGITS, **arguments
                ).loss
                accelerator.backward(loss)
        losses.append(loss.detach())
        if train.carry_state:
            for layer in state.caches[i].layers:
                layer.detach()
    return losses


def skip_step(
    config: RunConfig, accelerator: Accelerator, state: TrainingState, losses_of_parts: list[torch.Tensor]
) -> None:
    """Count a step whose loss or gradients are not finite, and write a report of it.

    Raises InputError with train.on_nonfinite=stop, and after MOST_SKIPPED_STEPS in a row.
    """
    train, progress = config.train, state.progress
    report = write_nonfinite(accelerator, Path(train.output_dir), state, losses_of_parts)
    if train.on_nonfinite == "stop":
        raise InputError(
            f"the loss or a gradient is not finite at step {progress.step + 1}, see {report}: go on from the last "
            "checkpoint with train.resume=true and a lower train.learning_rate or train.on_nonfinite=skip"
        )
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row > MOST_SKIPPED_STEPS:
        raise InputError(
            f"the loss or a gradient was not finite in {progress.skipped_in_a_row} steps in a row, see {report}: go "
            "on with train.resume=true and a lower train.learning_rate"
        )
    for cache in state.caches:
        cache.reset()  # what made the loss infinite may be in the state


def load_data(
    config: RunConfig, accelerator: Accelerator, share: Share, checkpoint: Path | None
) -> tuple[PreTrainedTokenizerBase, Iterator[torch.Tensor], TokenStream | HeldOutQuestions, dict[str, str]]:
    """The tokenizer, the batches of this process, each (2, B, T) of inputs and targets, what is held out, digests."""
    data, train = config.data, config.train
    own_rows = slice(share.data_rank, None, share.data_ranks)
    if data.task:
        return *load_task(config, own_rows), {}
    with accelerator.main_process_first():  # the others then find the documents in the cache of datasets
        documents, held_out_documents = load_documents(data)
    tokenizer = None
    if accelerator.is_main_process:  # one tokenizer, trained once
        trained = checkpoint and (checkpoint / TOKENIZER_FILE).is_file() and checkpoint / TOKENIZER_FILE
        texts = (document["text"] for document in documents)
        tokenizer = load_tokenizer(data.tokenizer, texts, data.tokenizer_vocab_size, trained or None)
    (tokenizer,) = broadcast_object_list([tokenizer])
    with accelerator.main_process_first():
        model_config(config.model, tokenizer)  # what the two do not agree on is told before all is tokenised
        held_out = counted_stream(held_out_documents, tokenizer, data.held_out_tokens)
        if data.streaming:
            batches = streamed_windows(
                documents,
                tokenizer,
                train.sequence_length,
                train.batch_size // share.data_ranks,
                process=share.data_rank,
                processes=share.data_ranks,
                workers=data.workers,
            )
            # A stream is known by its beginning.
            beginning = token_stream(documents, tokenizer, FIRST_TOKENS)
            streams = {"first training tokens": beginning, "held-out tokens": held_out}
            return tokenizer, batches, held_out, token_digests(tokenizer, streams)
        stream = token_stream(documents, tokenizer)
    digests = token_digests(tokenizer, {"training tokens": stream, "held-out tokens": held_out})
    shape = train.sequence_length, train.batch_size
    if train.carry_state:
        return tokenizer, ParallelStreams(stream, *shape, tokenizer.eos_token_id, own_rows), held_out, digests
    return tokenizer, RandomWindows(stream, *shape, train.seed, own_rows), held_out, digests


def model_config(arguments: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> MinRNNConfig:
    """The configuration with these arguments; vocabulary and special tokens are the tokenizer's unless given."""
    of_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vocab_size = arguments.get("vocab_size", len(tokenizer))
    if isinstance(vocab_size, int) and vocab_size < len(tokenizer):
        raise InputError(f"model.vocab_size is {vocab_size}: the tokenizer has {len(tokenizer)} tokens")
    try:
        return MinRNNConfig(**of_tokenizer | arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"model: {one_line(error)}") from error


def build_model(arguments: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> MinRNNForCausalLM:
    """A model with the arguments of MinRNNConfig, see `model_config`. Raises InputError where it is too large."""
    config = model_config(arguments, tokenizer)
    try:
        return MinRNNForCausalLM(config)
    except (RuntimeError, TypeError, ArithmeticError, MemoryError) as error:
        raise InputError(f"model: it is too large to make: {one_line(error)[:100]}") from error


def schedule(train: TrainConfig, step: int) -> float:
    """The share of the highest learning rate for the step after so many, 0 <= step < train.steps.

    Linear up to train.warmup_steps, constant with "wsd", then along a cosine to the minimum after the last step. As
    in transformers, "cosine" warms up from 0 and "wsd" from the minimum.
    """
    wsd, lowest = train.schedule == "wsd", train.min_learning_rate_ratio
    if step < train.warmup_steps:
        share, lowest = step / train.warmup_steps, lowest if wsd else 0.0
    else:
        start = train.steps - train.decay_steps if wsd else train.warmup_steps
        share = 0.5 * (1 + math.cos(math.pi * max(0, step - start) / (train.steps - start)))
    return lowest + (1 - lowest) * share


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients, which stay as they are: a report of what is not finite needs them unclipped."""
    return gathered(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    held_out: TokenStream | HeldOutQuestions,
    chunk_tokens: int = EVALUATION_CHUNK_TOKENS,
    end_token: int | None = None,
    window: int | None = None,
) -> tuple[float, float]:
    """Mean loss in nats per target and the share of targets to which the model gives most probability.

    A stream is read in order with the recurrent state carried from chunk to chunk, so the result is that of a single
    forward pass over all of it: nothing is drawn at random, and batch and sequence length of training do not matter.

    end_token: begin anew at each of these, as training with train.carry_state does.
    window: begin anew after each so many targets of a stream, as models are measured that read no further back.
    """
    model.eval()
    loss, right, count, cache = 0.0, 0, 0, None
    carried = held_out.is_one_text and not window
    for inputs, targets in held_out.windows(window, chunk_tokens) if window else held_out.batches(chunk_tokens):
        inputs = inputs.to(model.device)
        reset_mask = None if end_token is None else inputs == end_token
        output = model(inputs, past_key_values=cache, use_cache=carried, reset_mask=reset_mask)
        cache = output.past_key_values
        scored = targets != IGNORED
        logits, targets = output.logits[scored].float(), targets[scored].to(model.device)
        loss += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
    return loss / count, right / count


def evaluate_and_keep(
    config: RunConfig,
    accelerator: Accelerator,
    state: TrainingState,
    tokenizer: PreTrainedTokenizerBase,
    held_out: TokenStream | HeldOutQuestions,
) -> tuple[dict[str, float], list[str]]:
    """Called by all processes: the held-out scores, the same on all, and what the main one has to say of them.

    The model goes to train.output_dir if it is the best so far.
    """
    train, progress = config.train, state.progress
    output_dir = Path(train.output_dir)
    model = gathered_model(state.model)
    scores, lines = None, []
    if accelerator.is_main_process:
        scores = evaluate(model, held_out, end_token=tokenizer.eos_token_id if train.carry_state else None)
    ((loss, accuracy),) = broadcast_object_list([scores])  # as an object: not all devices have float64
    progress.evaluations_since_best += 1
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
        progress.best_tokens = progress.tokens
        with raise_on_all(f"{output_dir}: the model cannot be written, the one from before is intact"):
            if accelerator.is_main_process:
                save_best_model(output_dir, model, tokenizer)
    scores = held_out_scores(loss, held_out) | {"held_out_accuracy": accuracy}
    if accelerator.is_main_process:
        bits = f"{scores['bits_per_byte']:.4f} bits per byte, " if "bits_per_byte" in scores else ""
        lines = [
            f"step {progress.step}: held-out loss {loss:.4f}, best {progress.best_loss:.4f}, {bits}"
            f"accuracy {accuracy:.1%}",
            *(sample(model, tokenizer, prompt, train.sample_tokens, train.seed) for prompt in train.sample_prompts),
        ]
    return scores, lines


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """The prompt and its random continuation, drawn without touching the random state of training."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        tokens = model.generate(**inputs, do_sample=True, max_new_tokens=max_new_tokens)
    return tokenizer.decode(tokens[0])


if __name__ == "__main__":
    with exit_with_one_line():
        # torchrun shows the error of a process that failed.
        sys.exit(errors.record(main)(command_line.config, command_line.overrides))
