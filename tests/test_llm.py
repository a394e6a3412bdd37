"""LLM as its users see it: prompts in, text out, over the shipped model and over one whose answer is written into its weights."""

import asyncio
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import autodeploy
from autodeploy import (
    LLM,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    ExecutionError,
    RequestError,
    RequestOutput,
    SamplingParams,
    _compile,
)
from autodeploy.executor.outputs import RequestHandle
from tests.models.families import make_model

DEMO = Path(autodeploy.__file__).parent / "demo_model"
END = 2
SCRIPT = "wörld漢🚀!"
"""What the scripted model says after "?"; no token comes twice, so each has one successor."""
QUESTIONS = ["What is 123+456?", "400+77=", "Reverse: abc", "Uppercase: hello", "Count from 3 to 6", "é漢"]


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(str(DEMO)) as llm:
        yield llm


@pytest.fixture(scope="module")
def eager_demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture(scope="module")
def scripted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layer adds nothing and whose head answers each token with the next one of the script, round and round."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    chain = [*tokenizer.encode("?" + SCRIPT, add_special_tokens=False), END]
    assert len(set(chain)) == len(chain)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=chain[3],  # in the middle of the script: only generation_config.json is right
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64))
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for token, successor in zip(chain, [*chain[1:], chain[1]], strict=True):
            model.lm_head.weight[successor] += embedding[token]
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.generation_config.eos_token_id = [END]
    folder = tmp_path_factory.mktemp("scripted")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scripted(scripted_folder: Path) -> Iterator[LLM]:
    with LLM(scripted_folder) as llm:
        yield llm


def ask(llm: LLM, **params: Any) -> Any:
    """The completion of "?"."""
    return llm.generate("?", SamplingParams(**params)).outputs[0]


def token_of(llm: LLM, text: str) -> int:
    (token,) = llm.tokenizer.encode(text, add_special_tokens=False)
    return token


def assert_no_pages_held(llm: LLM) -> None:
    llm.compiled.executor.scheduler.check()


# Prompts


def test_a_text_prompt_gives_one_output_with_its_text_and_tokens(demo: LLM) -> None:
    output = demo.generate(QUESTIONS[0])
    assert isinstance(output, RequestOutput)
    assert output.finished
    assert output.prompt == QUESTIONS[0]
    assert output.prompt_token_ids == demo.tokenizer.encode(QUESTIONS[0])
    completion = output.outputs[0]
    assert completion.text == demo.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert completion.length == len(completion.token_ids) > 0


def test_text_token_ids_and_both_dicts_are_the_same_prompt(demo: LLM) -> None:
    text, ids = QUESTIONS[0], demo.tokenizer.encode(QUESTIONS[0])
    texts = {demo.generate(prompt).outputs[0].text for prompt in (text, ids, {"prompt": text}, {"prompt_token_ids": ids})}
    assert len(texts) == 1


def test_a_list_gives_a_list_in_the_same_order(demo: LLM) -> None:
    mixed = [QUESTIONS[0], demo.tokenizer.encode(QUESTIONS[1]), {"prompt": QUESTIONS[2]}]
    outputs = demo.generate(mixed)
    alone = [demo.generate(prompt) for prompt in mixed]
    assert [output.prompt_token_ids for output in outputs] == [demo.tokenizer.encode(text) for text in QUESTIONS[:3]]
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in alone]


def test_a_list_of_one_gives_a_list_of_one(demo: LLM) -> None:
    outputs = demo.generate([QUESTIONS[0]])
    assert isinstance(outputs, list)
    assert len(outputs) == 1


def test_each_prompt_may_have_its_own_sampling_params(scripted: LLM) -> None:
    outputs = scripted.generate(["?"] * 3, [SamplingParams(max_tokens=n) for n in (1, 2, 3)])
    assert [output.outputs[0].length for output in outputs] == [1, 2, 3]


def test_as_many_sampling_params_as_prompts_are_needed(scripted: LLM) -> None:
    with pytest.raises(ConfigError, match="2 sampling_params for 3 prompts"):
        scripted.generate(["?"] * 3, [SamplingParams()] * 2)


def test_a_prompt_dict_of_other_keys_is_refused(scripted: LLM) -> None:
    with pytest.raises(RequestError, match=r"'prompt' or 'prompt_token_ids'.*multi_modal_data"):
        scripted.generate({"prompt": "?", "multi_modal_data": None})


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (None, "NoneType"),
        ([3.5], "float"),
        ([3, "a"], "list of int and str"),
        (torch.tensor([3]), "Tensor"),
        ({"prompt": 3}, "int"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_type(prompt: Any, kind: str, scripted: LLM) -> None:
    with pytest.raises(RequestError, match=rf"text or a list of token ids, not {kind}; a tensor.*tolist"):
        scripted.generate(prompt)


def test_numpy_integers_are_token_ids(scripted: LLM) -> None:
    (ids,) = np.array([scripted.tokenizer.encode("?")])
    output = scripted.generate(list(ids))
    assert output.outputs[0].text == SCRIPT
    assert all(type(token) is int for token in output.prompt_token_ids)


def test_a_list_with_something_that_is_no_prompt_is_refused_before_any_of_it_runs(scripted: LLM) -> None:
    steps = scripted.compiled.executor.num_steps
    with pytest.raises(RequestError, match="not NoneType"):
        scripted.generate(["?", None])
    assert ask(scripted, max_tokens=1).length == 1
    assert scripted.compiled.executor.num_steps == steps + 1


def test_threads_may_share_an_llm(scripted: LLM) -> None:
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(scripted.generate, ["?"] * 12))
    assert [output.outputs[0].text for output in outputs] == [SCRIPT] * 12


def test_the_demo_model_adds(demo: LLM) -> None:
    assert demo.chat([{"role": "user", "content": "What is 123+456?"}]).outputs[0].text == "579"


def test_chat_goes_through_the_template_and_takes_several_conversations(demo: LLM) -> None:
    talks = [[{"role": "user", "content": text}] for text in QUESTIONS[:2]]
    single, several = demo.chat(talks[0]), demo.chat(talks)
    prompt = demo.tokenizer.apply_chat_template(talks[0], add_generation_prompt=True)["input_ids"]
    assert single.prompt_token_ids == several[0].prompt_token_ids == prompt
    assert single.outputs[0].token_ids == several[0].outputs[0].token_ids
    assert len(several) == 2


# Choosing tokens


def test_bare_sampling_params_are_greedy(demo: LLM, eager_demo: Any) -> None:
    output = demo.generate(QUESTIONS[0], SamplingParams(ignore_eos=True))
    ids, tokens = output.prompt_token_ids, output.outputs[0].token_ids
    with torch.no_grad():
        logits = eager_demo(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    assert len(tokens) == SamplingParams().max_tokens


def test_equal_seeds_draw_equal_tokens_whatever_runs_beside_them(demo: LLM) -> None:
    def draw(seed: int) -> SamplingParams:
        return SamplingParams(temperature=4.0, seed=seed, ignore_eos=True)

    alone = demo.generate(QUESTIONS[0], draw(7)).outputs[0].token_ids
    batch = demo.generate([QUESTIONS[0]] * 3, [draw(8), draw(7), draw(9)])
    assert batch[1].outputs[0].token_ids == alone
    assert len({tuple(output.outputs[0].token_ids) for output in batch}) == 3


def test_unseeded_draws_differ_between_requests(demo: LLM) -> None:
    outputs = demo.generate([QUESTIONS[0]] * 2, SamplingParams(temperature=4.0, ignore_eos=True))
    assert outputs[0].outputs[0].token_ids != outputs[1].outputs[0].token_ids


# Stopping


def test_the_end_of_sequence_token_is_that_of_generation_config(scripted: LLM) -> None:
    completion = ask(scripted)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (SCRIPT, "stop", None)
    assert completion.token_ids[-1] == END


def test_ignore_eos_goes_on(scripted: LLM) -> None:
    once = ask(scripted)
    completion = ask(scripted, ignore_eos=True, max_tokens=2 * once.length)
    assert (completion.text, completion.finish_reason) == (2 * SCRIPT, "length")


def test_max_tokens_ends_with_reason_length(scripted: LLM) -> None:
    completion = ask(scripted, max_tokens=3)
    assert (completion.text, completion.length, completion.finish_reason) == (SCRIPT[:2], 3, "length")


def test_max_tokens_none_goes_up_to_max_seq_len(scripted: LLM) -> None:
    output = scripted.generate("?", SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.prompt_token_ids) + output.outputs[0].length == scripted.compiled.max_seq_len == 512


def test_min_tokens_keeps_end_of_sequence_away(scripted: LLM) -> None:
    length = ask(scripted).length
    completion = ask(scripted, min_tokens=length + 2, max_tokens=length + 8)
    assert completion.length >= length + 2
    assert END not in completion.token_ids[: length + 2]


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(scripted: LLM) -> None:
    completion = ask(scripted, stop="d漢")
    assert len(scripted.tokenizer.encode("d漢")) > 2
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("wörl", "stop", "d漢")


def test_a_stop_string_stays_on_request(scripted: LLM) -> None:
    assert ask(scripted, stop=["🚀", "d漢"], include_stop_str_in_output=True).text == "wörld漢"


def test_a_stop_string_that_never_comes_changes_nothing(scripted: LLM) -> None:
    assert ask(scripted, stop="d漢!").text == SCRIPT


def test_a_stop_token_id_ends_the_request_and_is_named(scripted: LLM) -> None:
    stop = token_of(scripted, "l")
    completion = ask(scripted, stop_token_ids=[stop])
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("wör", "stop", stop)
    assert completion.token_ids[-1] == stop


# Streaming


def check_stream(outputs: list[RequestOutput]) -> None:
    """One output per token, each text the beginning of the script, and the diffs are all of it."""
    completions = [output.outputs[0] for output in outputs]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert [completion.length for completion in completions] == list(range(1, len(outputs) + 1))
    assert all(SCRIPT.startswith(completion.text) for completion in completions), "half a character"
    assert "".join(completion.text_diff for completion in completions) == completions[-1].text == SCRIPT
    assert [token for completion in completions for token in completion.token_ids_diff] == completions[-1].token_ids


def test_for_streams_every_token_and_no_half_characters(scripted: LLM) -> None:
    check_stream(list(scripted.generate_async("?", streaming=True)))


def test_async_for_streams_several_requests_at_once(scripted: LLM) -> None:
    async def collect() -> list[RequestOutput]:
        return [output async for output in scripted.generate_async("?", streaming=True)]

    async def both() -> list[list[RequestOutput]]:
        return await asyncio.gather(collect(), collect())

    for outputs in asyncio.run(both()):
        check_stream(outputs)


def test_await_gives_the_final_output(scripted: LLM) -> None:
    async def wait() -> RequestOutput:
        return await scripted.generate_async("?")

    assert asyncio.run(wait()).outputs[0].text == SCRIPT


def test_an_event_loop_that_is_closed_midway_harms_nobody(scripted: LLM) -> None:
    loop = asyncio.new_event_loop()
    handle = scripted.generate_async("?", SamplingParams(max_tokens=200, ignore_eos=True), streaming=True)
    unfinished = aiter(handle)
    loop.run_until_complete(anext(unfinished))
    loop.close()
    assert handle.result().outputs[0].length == 200
    assert ask(scripted).text == SCRIPT


def test_without_streaming_iteration_gives_the_final_output_alone(scripted: LLM) -> None:
    (output,) = scripted.generate_async("?")
    assert output.finished
    assert output.outputs[0].text_diff == SCRIPT


def test_diffs_of_random_bytes_join_to_the_text(demo: LLM) -> None:
    params = SamplingParams(temperature=9.0, seed=1, max_tokens=80, ignore_eos=True)
    completions = [output.outputs[0] for output in demo.generate_async(QUESTIONS[0], params, streaming=True)]
    text = "".join(completion.text_diff for completion in completions)
    assert text == completions[-1].text == demo.tokenizer.decode(completions[-1].token_ids, skip_special_tokens=True)


def test_abort_keeps_the_partial_text_and_frees_the_pages(scripted: LLM) -> None:
    handle = scripted.generate_async("?", SamplingParams(max_tokens=500, ignore_eos=True), streaming=True)
    for output in handle:
        if output.outputs[0].length == 5:
            handle.abort()
    final = handle.result().outputs[0]
    assert final.finish_reason == "abort"
    assert 5 <= final.length < 500
    assert (SCRIPT * 50).startswith(final.text.rstrip("\ufffd")) and final.text  # it may end within a character
    assert_no_pages_held(scripted)


def test_abort_after_the_end_changes_nothing(scripted: LLM) -> None:
    handle = scripted.generate_async("?")
    before = handle.result()
    handle.abort()
    assert handle.result() == before
    assert ask(scripted).text == SCRIPT


# Life and death


def test_requests_under_way_end_when_the_context_does_and_later_ones_are_refused(scripted_folder: Path) -> None:
    with LLM(scripted_folder) as llm:
        handle = llm.generate_async("?", SamplingParams(max_tokens=500, ignore_eos=True), streaming=True)
        next(iter(handle))
    assert handle.result(timeout=10).outputs[0].finish_reason == "abort"
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        llm.generate("?")
    llm.shutdown()
    handle.abort()


# Tokenizers


@pytest.mark.parametrize("kind", ["object", "text path", "Path"])
def test_a_model_in_memory_takes_a_tokenizer_as(kind: str, eager_demo: Any, demo: LLM) -> None:
    tokenizer = {"object": demo.tokenizer, "text path": str(DEMO), "Path": DEMO}[kind]
    with LLM(eager_demo, tokenizer=tokenizer, backend="pytorch") as llm:
        assert llm.generate(QUESTIONS[0]).outputs[0].text == demo.generate(QUESTIONS[0]).outputs[0].text


def test_a_folder_without_tokenizer_files_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    with pytest.raises(CheckpointError, match=r"no usable tokenizer \(its files are missing.*--tokenizer of the command"):
        LLM(str(tmp_path))


def test_a_model_in_memory_without_tokenizer_is_refused_with_the_remedy(eager_demo: Any) -> None:
    with pytest.raises(ConfigError, match=r"model in memory brings no tokenizer; pass tokenizer=.*skip_tokenizer_init=True"):
        LLM(eager_demo)


def test_what_is_no_model_is_refused_for_that_and_not_for_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="'model' is a int; give a checkpoint folder"):
        LLM(123)


def test_skip_tokenizer_init_serves_token_ids_and_refuses_text(eager_demo: Any, demo: LLM) -> None:
    ids = demo.tokenizer.encode(QUESTIONS[0])
    with LLM(eager_demo, skip_tokenizer_init=True, backend="pytorch") as llm:
        completion = llm.generate(ids).outputs[0]
        assert completion.token_ids == demo.generate(ids).outputs[0].token_ids
        assert completion.text == ""
        with pytest.raises(RequestError, match=r"text prompt needs a tokenizer.*give token ids"):
            llm.generate(QUESTIONS[0])
        with pytest.raises(RequestError, match=r"stop strings need a tokenizer.*use stop_token_ids"):
            llm.generate(ids, SamplingParams(stop="x"))
        with pytest.raises(ConfigError, match=r"chat needs a tokenizer.*Use generate"):
            llm.chat([{"role": "user", "content": "x"}])


# What a request asks for ends none but itself


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-50}, {"temperature": 1e-50, "top_p": 0.5}, {"top_p": 1e-300}, {"top_p": 1e-300, "top_k": 5}]
)
def test_the_smallest_numbers_leave_the_most_likely_token(demo: LLM, extreme: dict[str, float]) -> None:
    assert demo.generate(QUESTIONS[0], SamplingParams(**extreme)).outputs[0].text == "579"


class Picky:
    """A tokenizer that cannot turn one id into text, as some cannot where a head is padded."""

    def __init__(self, tokenizer: Any, unknown: int) -> None:
        self._tokenizer, self._unknown = tokenizer, unknown

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        if self._unknown in token_ids:
            raise IndexError("piece id is out of range")
        return self._tokenizer.decode(token_ids, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_that_fails_ends_its_own_request_alone(scripted: LLM, scripted_folder: Path, streaming: bool) -> None:
    fails = SamplingParams(max_tokens=60, ignore_eos=True)
    goes_on = SamplingParams(max_tokens=60, ignore_eos=True, detokenize=False)
    with LLM(scripted_folder, tokenizer=Picky(scripted.tokenizer, token_of(scripted, "!"))) as llm:
        other = llm.generate_async("?", goes_on)
        with pytest.raises(ExecutionError, match=r"tokenizer failed .* IndexError: piece id .*\. Use detokenize=False"):
            list(llm.generate_async("?", fails, streaming=streaming))
        assert other.result(timeout=60).outputs[0].token_ids == ask(scripted, max_tokens=60, ignore_eos=True).token_ids
        assert ask(llm, max_tokens=3).text == SCRIPT[:2]  # one of them has two tokens
        assert_no_pages_held(llm)


def test_who_stops_waiting_wants_no_answer_any_more(scripted: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[RequestHandle]()

    def interrupted(handle: RequestHandle, timeout: float | None = None) -> None:
        waited.append(handle)
        raise KeyboardInterrupt

    monkeypatch.setattr(RequestHandle, "output", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scripted.generate("?", SamplingParams(max_tokens=400, ignore_eos=True))
    monkeypatch.undo()
    assert waited[0].result(timeout=60).outputs[0].finish_reason == "abort"


def test_half_a_character_is_refused_by_its_place(demo: LLM) -> None:
    with pytest.raises(RequestError, match="character 1 of the prompt is half of one"):
        demo.generate("a\ud800")


def test_stop_strings_without_a_tokenizer_are_refused_by_a_compiled_model_too(demo: LLM) -> None:
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        demo.compiled.generate([5, 6], SamplingParams(stop="7"))


def test_the_size_of_the_pool_stays_what_it_was_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [8_000_000]
    monkeypatch.setattr(_compile, "free_memory", lambda device: free[0])
    config = {"max_bytes": 4_000_000, "free_memory_fraction": 0.25}
    with LLM(DEMO, kv_cache_config=config) as llm, LLM(DEMO, kv_cache_config={"max_bytes": 2_000_000}) as other:
        free[0] = 4_000_000
        llm.generate("1+1=")
        assert llm.compiled.num_pool_tokens == other.compiled.num_pool_tokens == llm.compiled.executor.scheduler.kv.num_tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused(eager_demo: Any) -> None:
    with pytest.raises(ConfigError, match=r"device='cuda:1': torch finds 0 GPUs here\. Use device='cpu'"):
        autodeploy.compile(eager_demo, device="cuda:1")


# The reference backend


def test_the_pytorch_backend_gives_the_same_greedy_tokens(demo: LLM) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with LLM(DEMO, backend="pytorch") as reference:
        expected = reference.generate(QUESTIONS, params)
    outputs = demo.generate(QUESTIONS, params)
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in expected]
    assert [output.outputs[0].text for output in outputs] == [output.outputs[0].text for output in expected]


def test_the_pytorch_backend_gives_the_same_greedy_tokens_for_gemma2_in_memory() -> None:
    model = make_model("gemma2", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    prompts = [list(range(3, 3 + n)) for n in (1, 12, 30)]
    tokens = []
    for backend in ("autodeploy", "pytorch"):
        with LLM(model, backend=backend, skip_tokenizer_init=True) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
            tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]


# Options


def test_other_spellings_of_options_mean_the_same(eager_demo: Any) -> None:
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 8}
    with LLM(eager_demo, skip_tokenizer_init=True, backend="pytorch", **options) as llm:
        args = llm.compiled.args
        assert (args.max_batch_size, args.max_num_tokens, args.max_seq_len) == (2, 16, 8)
        assert llm.generate([3, 4], SamplingParams(max_tokens=None, ignore_eos=True)).outputs[0].length == 6
        with pytest.raises(RequestError, match="max_seq_len is 8"):
            llm.generate([3] * 9, SamplingParams(max_tokens=1))


def test_an_unknown_option_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"no option 'max_batchsize'.*Did you mean 'max_batch_size'"):
        LLM("no such folder", max_batchsize=4)


def test_an_option_of_later_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"context_parallel_size=2 is not supported yet; leave"):
        LLM("no such folder", context_parallel_size=2)


# Logits and dtypes


def test_a_compiled_model_called_on_a_batch_gives_the_logits_of_eager(demo: LLM, eager_demo: Any) -> None:
    ids = torch.randint(5, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    logits = demo.compiled(ids)
    with torch.no_grad():
        expected = eager_demo(ids).logits
    assert logits.shape == (3, 7, 384)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_float64_computes_in_float64_everywhere() -> None:
    model = make_model("gpt2")  # a family whose own norms go down to float32 in no place
    ids = torch.randint(3, 256, (2, 11), generator=torch.Generator().manual_seed(0))
    compiled = autodeploy.compile(model, dtype=torch.float64)
    logits = compiled(ids)
    compiled.shutdown()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(ids).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() <= 1e-10
    assert {spec.dtype for spec in compiled.program.caches.values()} == {"float64"}


def test_bfloat16_by_name_computes_in_bfloat16(scripted_folder: Path) -> None:
    with LLM(scripted_folder, dtype="bfloat16") as llm:
        assert ask(llm).text == SCRIPT
        assert llm.compiled(torch.tensor([[3, 4]])).dtype == torch.bfloat16
        assert {spec.dtype for spec in llm.compiled.program.caches.values()} == {"bfloat16"}
