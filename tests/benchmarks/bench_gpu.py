"""CounterFact on a GPU, from the call to the files: the table of `docs/reference/engine.md`.

    make bench-gpu                       # five minutes; one line where there is no GPU

Random models of the sizes of GPT-2 small (float32, bfloat16) and LLaMA-2 7B (bfloat16) score the
generic scheme at doses 0 to 5. Only the sizes matter for the time. In one process and in turns:

    engine    `hl.hijack`, without the store, and `save`
    padded    the plain model on length-sorted, right-padded batches of the same requests
    harness   lm-evaluation-harness's Hugging Face backend, if it is installed

The last two answer the requests of `HIJACKLENS_BENCH_SIDES_FACTS` facts (1000), and their time is
scaled by tokens. `of the chip` is the rate of the model's products, divided by that of one large
product of the same dtype on the same card. Then follow training, and fused attention with a tree
mask against FlexAttention by the length of a pack.

HIJACKLENS_BENCH_FACTS is a number or `all`; HIJACKLENS_BENCH_DEVICE=cpu runs the table on a CPU.
"""

from __future__ import annotations

import os
import time

import bench_engine
import bench_training
import pytest
import torch

pytestmark = pytest.mark.benchmark
DEVICE = os.environ.get("HIJACKLENS_BENCH_DEVICE", "cuda")
FACTS = os.environ.get("HIJACKLENS_BENCH_FACTS", "all")
FEW = int(os.environ.get("HIJACKLENS_BENCH_SIDES_FACTS", "1000"))
MODELS = os.environ.get("HIJACKLENS_BENCH_MODELS", "gpt2-small,llama-7b").split(",")
LENGTHS = (256, 512, 1024, 2048, 4096)
GPU = DEVICE == "cuda"


def wait():
    if GPU:
        torch.cuda.synchronize()


def seconds_of(work):
    """Seconds of one piece of work, and its result."""
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def matrix_rate(dtype):
    """Floating-point operations per second of one large product."""
    n = 8192 if GPU else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 * 5 / seconds_of(lambda: [a @ b for _ in range(5)])[0]


def random_model(name, vocabulary, dtype):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "gpt2-small":
        kind, config = GPT2LMHeadModel, GPT2Config(vocab_size=vocabulary)
    else:
        kind, config = LlamaForCausalLM, LlamaConfig(vocab_size=vocabulary)
    config.architectures = [kind.__name__]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def operations(plain, tokens, reads):
    """Floating-point operations of the products of a run; attention scores are left out."""
    unembedding = plain.get_output_embeddings().weight.numel()
    embeddings = {id(m): m for m in plain.modules() if isinstance(m, torch.nn.Embedding)}
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    inside = sum(p.numel() for p in plain.parameters()) - sum(
        m.weight.numel() for m in embeddings.values()
    )
    inside -= 0 if tied else unembedding
    return 2 * (tokens * inside + reads * unembedding)


def some(facts, n):
    return facts if n == "all" or int(n) >= len(facts) else facts.limit(int(n), seed=0)


def row(name, dtype, tokenizer, facts, folder):
    """One model: a line for each side."""
    import hijacklens as hl
    from hijacklens.prompts.schemes import get_scheme
    from hijacklens.prompts.wordings import make_prompts
    from hijacklens.scoring.items import make_items

    plain = random_model(name, len(tokenizer), dtype)
    model = hl.load_model(plain, tokenizer=tokenizer, device=DEVICE, dtype=dtype)
    execution = hl.Execution(store=False)
    hl.hijack(model, facts.limit(8), execution=execution, quiet=True)  # what happens once
    if GPU:
        torch.cuda.reset_peak_memory_stats()

    def score():
        hl.hijack(model, facts, execution=execution, quiet=True).save(folder)

    wall, _ = seconds_of(score)
    engine = hl.load_result(folder).settings.models[0].engine
    prompts, _ = make_prompts(facts, get_scheme("do-not-think"), range(6), tokenizer, seed=0)
    items, _ = make_items(prompts, tokenizer, context_length=1024)
    work = operations(plain, engine.forward_tokens, len(items.requests))
    rate = work / wall / matrix_rate(dtype)
    label = f"{name} {str(dtype).removeprefix('torch.')}"
    yield label, "engine", wall, engine.forward_tokens, rate, engine.peak_memory / 2**30

    few = some(facts, FEW)
    prompts, _ = make_prompts(few, get_scheme("do-not-think"), range(6), tokenizer, seed=0)
    part, _ = make_items(prompts, tokenizer, context_length=1024)
    times = items.naive_tokens / part.naive_tokens
    batch = 32_768 if GPU else 1_024
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    wall, _ = seconds_of(lambda: bench_engine.padded_logprobs(plain, part.requests, batch))
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0
    yield label, "padded", times * wall, items.naive_tokens, None, peak
    if bench_engine.available("harness"):
        from lm_eval.models.huggingface import HFLM

        backend = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=batch // 64)
        steps = [side for item in part for side in (item.true, item.false)]
        asked = [(("", ""), list(x[0][0]), [token for _, token in x]) for x in steps]
        wall, _ = seconds_of(lambda: backend._loglikelihood_tokens(asked, disable_tqdm=True))
        yield label, "harness", times * wall, items.naive_tokens, None, peak


def attention(length, compiled):
    """Milliseconds of attention with a tree mask: a dense mask, and blocks of it."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = (
        torch.randn(8, 12, length, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
    )
    prompt = torch.arange(length, device=DEVICE) // 20

    def ancestor(b, h, query, key):
        return (prompt[query] == prompt[key]) & (query >= key)

    order = torch.arange(length, device=DEVICE)
    dense = ancestor(0, 0, order[:, None], order)
    blocks = create_block_mask(ancestor, None, None, length, length, device=DEVICE)
    ways = (
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, dense),
        lambda: compiled(q, k, v, block_mask=blocks),
    )
    with torch.inference_mode():
        for work in ways:
            work()
        return [seconds_of(lambda work=work: [work() for _ in range(20)])[0] * 50 for work in ways]


def crossover():
    """From which length of a pack FlexAttention is faster."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    print("\nattention of 12 heads of 64, bfloat16, 8 packs of prompts of 20 tokens")
    print("  length   dense mask ms   blocks ms   ratio")
    for length in LENGTHS:
        dense, blocks = attention(length, compiled)
        print(f"  {length:6} {dense:15.3f} {blocks:11.3f} {dense / blocks:7.2f}")


def test_gpu(tmp_path):
    from transformers import AutoTokenizer

    import hijacklens as hl

    if GPU and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    tokenizer = AutoTokenizer.from_pretrained(bench_engine.COUNTERFACT / "tokenizers" / "gpt2")
    facts = some(
        hl.counterfact(bench_engine.COUNTERFACT / "counterfact" / "counterfact_21919.parquet"),
        FACTS,
    )
    print(f"\n{torch.cuda.get_device_name() if GPU else 'CPU'}, {len(facts):,} facts, doses 0 to 5")
    print("  model                 side         s      tokens   tokens/s  of the chip  peak GiB")
    kinds = [(name, torch.bfloat16) for name in MODELS]
    kinds = [("gpt2-small", torch.float32), *kinds] if "gpt2-small" in MODELS else kinds
    for name, dtype in kinds:
        if GPU:
            torch.cuda.empty_cache()
        folder = tmp_path / f"{name}-{dtype}"
        for label, side, wall, tokens, rate, peak in row(name, dtype, tokenizer, facts, folder):
            chip = f"{rate:.1%}" if rate else ""
            print(
                f"  {label:21} {side:8} {wall:6.1f} {tokens:11,} {tokens / wall:10,.0f} {chip:>12} "
                f"{peak:9.2f}",
                flush=True,
            )
    if GPU:
        bench_training.on_a_gpu()
        crossover()
