"""What users turn on in vLLM works with uneven query groups, a layer without attention and one without MLP."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers.serving import NUM_TOKENS, Geometry, assert_is_the_masked_model, engine, generate
from helpers.tiny import byte_tokenizer, converted, oracle, prompts
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from learner.finetune.finetune import finetune
from learner.finetune.job import FinetuneJob
from pruned_vllm.hf.loading import load_pruned

RAGGED = Geometry(((3, 1, 0, 4), (0, 0, 0, 0), (4, 3, 2, 1)), (51, 99, 0), group=4)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """The masked model, its masks, and the converted model with a tokenizer of one token for each byte."""
    model, masks = RAGGED.model_and_masks()
    directory = converted(tmp_path_factory.mktemp("ragged"), model, masks)
    model.save_pretrained(directory.parent / "dense")
    byte_tokenizer().save_pretrained(directory)
    return model, masks, directory


def test_prefix_caching_and_chunked_prefill(ragged):
    """Sixteen tokens a step cut the longer prompts to pieces; the second round finds them in the cache."""
    model, masks, directory = ragged
    options = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    with engine(directory, block_size=32, max_num_seqs=4, **options) as llm:
        assert_is_the_masked_model(generate(llm), model, masks)
        again = generate(llm, prompt_logprobs=None)
    assert max(output.num_cached_tokens for output in again) >= 32
    for prompt, output in zip(prompts(), again, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert oracle(model, masks, "product", prompt, tokens)[0] == tokens


def test_several_samples_of_one_prompt(ragged):
    model, masks, directory = ragged
    with engine(directory) as llm:
        sampled = generate(llm, n=3, temperature=1.0, seed=5, prompt_logprobs=None)
    for prompt, output in zip(prompts(), sampled, strict=True):
        assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
        for sample in output.outputs:
            tokens = list(sample.token_ids)
            _, expected = oracle(model, masks, "product", prompt, tokens)
            for position, (token, logprobs) in enumerate(zip(tokens, sample.logprobs, strict=True), len(prompt) - 1):
                assert abs(logprobs[token].logprob - expected[position, token].item()) < 1e-4


def test_structured_output(ragged):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "enum": [1, 22]}}, "required": ["n"]}
    params = [
        SamplingParams(temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])),
        SamplingParams(temperature=0, max_tokens=60, structured_outputs=StructuredOutputsParams(json=schema)),
    ]
    with engine(ragged[2], skip_tokenizer_init=False) as llm:
        choice, document = llm.generate(["Well?", "n:"], params, use_tqdm=False)
    assert choice.outputs[0].text in ("yes", "no")
    assert json.loads(document.outputs[0].text)["n"] in (1, 22)


@pytest.mark.parametrize("target", ["dense", "out"])
def test_speculative_decoding_with_the_pruned_model_as_draft(ragged, target):
    """The target decides every token; a pruned draft of the pruned target itself is always accepted."""
    model, masks, directory = ragged
    draft = {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 3}
    with engine(directory.parent / target, speculative_config=draft, disable_log_stats=False) as llm:
        outputs = generate(llm, logprobs=None, prompt_logprobs=None)
        counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == NUM_TOKENS
        assert oracle(model, masks if target == "out" else {}, "product", prompt, tokens)[0] == tokens
    assert counters["vllm:spec_decode_num_draft_tokens"] > 0
    if target == "out":
        accepted = counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_draft_tokens"]
        assert accepted > 0.8  # what is drafted beyond the last token is cut off


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(ragged, dtype):
    """Close to float32: log-probabilities of the prompts differ by the rounding of a dozen matrix products."""
    model, masks, directory = ragged
    with engine(directory, dtype=dtype) as llm:
        outputs = generate(llm)
    errors = [
        abs(logprob.logprob - expected[position, token].item())
        for prompt, output in zip(prompts(), outputs, strict=True)
        for expected in [oracle(model, masks, "product", prompt, [0])[1]]
        for position, logprobs in enumerate(output.prompt_logprobs[1:])
        for token, logprob in logprobs.items()
    ]
    assert sum(errors) / len(errors) < {"bfloat16": 0.05, "float16": 0.01}[dtype]


def train(model, parameters) -> None:
    """A few steps on one batch, from which every trained parameter moves."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    tokens = torch.tensor([prompts()[-1]])
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_adapter_trained_on_the_pruned_model(ragged, tmp_path):
    peft = pytest.importorskip("peft")
    directory = ragged[2]
    model = peft.get_peft_model(
        load_pruned(directory, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    )
    train(model, [parameter for parameter in model.parameters() if parameter.requires_grad])
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    with engine(directory, enable_lora=True, max_lora_rank=8) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5, detokenize=False, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
        adapter = LoRARequest("tuned", 1, str(tmp_path / "adapter"))
        with_adapter = llm.generate(inputs, params, use_tqdm=False, lora_request=adapter)
        without = llm.generate(inputs, params, use_tqdm=False)
        assert_adapters_that_do_not_fit_are_named(llm, ragged[0], directory, tmp_path)
    assert [o.outputs[0].token_ids for o in with_adapter] != [o.outputs[0].token_ids for o in without]
    assert_greedy_continuations_of(model.get_base_model(), with_adapter)


def assert_adapters_that_do_not_fit_are_named(llm, dense, directory, tmp_path) -> None:
    """Adapters of the dense model and of smaller layers; vLLM would stumble over one and fill up the other."""
    peft = pytest.importorskip("peft")

    def refusal(number: int, model, change=lambda name, weight: weight) -> str:
        path = tmp_path / f"adapter{number}"
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules="all-linear")).save_pretrained(
            path
        )
        file = path / "adapter_model.safetensors"
        save_file({name: change(name, weight).contiguous() for name, weight in load_file(file).items()}, file)
        with pytest.raises(ValueError) as error:
            llm.llm_engine.add_lora(LoRARequest(path.name, number, str(path)))
        return str(error.value)

    message = refusal(2, dense)
    assert "It fits the model before pruning" in message and "Train an adapter on the pruned model" in message
    assert "model.layers.0.self_attn.q_proj: the adapter is for [512, 96], the pruned model has [256, 96]" in message
    assert "model.layers.0.mlp.down_proj: the adapter is for [96, 100], the pruned model has [96, 51]" in message
    assert "model.layers.1.self_attn.k_proj: the adapter is for [128, 96], the pruned model has no such mod" in message
    assert "model.layers.1.mlp.up_proj: the adapter is for [100, 96], the pruned model has [99, 96]" in message
    assert len(message.splitlines()) == 1 + 3 * 7 - 2  # all but k_proj and v_proj of the last layer

    def smaller(name, weight):
        return weight[:-1] if "layers.1.mlp.up_proj.lora_B" in name else weight

    message = refusal(3, load_pruned(directory, dtype=torch.float32), smaller)
    assert message.count("\n") == 1 and "before pruning." not in message
    assert "model.layers.1.mlp.up_proj: the adapter is for [98, 96], the pruned model has [99, 96]" in message


def test_fine_tuned_model_is_served_again(ragged, tmp_path):
    """What finetune-pruned writes, as Transformers computes it."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    job = FinetuneJob(model=str(ragged[2]), data=[str(text)], steps=6, batch_size=4, micro_batch_size=4)
    finetune(replace(job, sequence_length=32, learning_rate=5e-3, lora_rank=4, device="cpu"), tmp_path / "tuned")
    before, model = (load_pruned(directory, dtype=torch.float32) for directory in (ragged[2], tmp_path / "tuned"))
    assert not torch.equal(
        before.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight
    )
    with engine(tmp_path / "tuned") as llm:
        outputs = generate(llm)
    assert_greedy_continuations_of(model, outputs)


def assert_greedy_continuations_of(model, outputs) -> None:
    """Tokens equal, log-probabilities within 1e-4."""
    for prompt, output in zip(prompts(), outputs, strict=True):
        tokens, expected = oracle(model, {}, "product", prompt, list(output.outputs[0].token_ids))
        assert list(output.outputs[0].token_ids) == tokens
        for position, logprobs in enumerate(output.outputs[0].logprobs, len(prompt) - 1):
            for token, logprob in logprobs.items():
                assert abs(logprob.logprob - expected[position, token].item()) < 1e-4
