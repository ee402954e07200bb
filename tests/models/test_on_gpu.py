"""Whole models on an NVIDIA GPU: the kernels' tokens are those of the reference on the CPU."""

import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
if not torch.cuda.is_available():
    pytest.skip("runs whole models on a GPU", allow_module_level=True)

from transformers import AutoModelForCausalLM

import hwfuse
from hwfuse.integrations import quantized, transformers
from hwfuse.integrations._tiny_deepseek import tiny_deepseek_v3, write_w4afp8_checkpoint

NUM_TOKENS = 12
PROMPT = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(3))


def greedy(model, device):
    """Return the tokens of a greedy continuation and the logits of each step."""
    with torch.no_grad():
        out = model.to(device).generate(
            PROMPT.to(device),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, PROMPT.shape[1] :].cpu()
    return tokens, torch.cat(out.logits).float().cpu()


def tell(capsys, text, record):
    """Show a number and what ran; it belongs into the notes of a release."""
    ran = ", ".join(f"{op} {name} {n}x" for (op, name), n in sorted(record.calls.items()))
    with capsys.disabled():
        sys.stdout.write(f"\n  {text}; {ran}\n")


@pytest.mark.filterwarnings("ignore:fp8_blockscale_gemm runs the reference")  # it has no other
def test_w4afp8_checkpoint_generates_the_tokens_of_the_reference_on_the_cpu(tmp_path, capsys):
    """Every step's best token leads by more than the two devices' logits differ."""
    write_w4afp8_checkpoint(tiny_deepseek_v3(), tmp_path)
    with quantized.registered():
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, logits = greedy(model, "cpu")
    with hwfuse.record() as record:
        found, on_gpu = greedy(model, "cuda")
    best = logits.topk(2).values
    lead, error = (best[:, 0] - best[:, 1]).min(), (on_gpu - logits).abs().max()
    tell(capsys, f"smallest lead {lead:.4f}, largest difference {error:.4f}", record)
    assert lead > 2 * error
    assert found.tolist() == expected.tolist()
    assert not any(name == "reference/torch" for op, name in record.calls if op.startswith("w4a8"))


@pytest.mark.parametrize(
    "family", ["qwen3_next", "qwen3_5_dense", "gemma4_never", "kimi_linear"], indirect=True
)
def test_patched_model_generates_the_tokens_of_the_unpatched(family, capsys):
    """On the same GPU, through the kernels; float32, so that no near tie decides a token."""
    model = family.build(dtype=torch.float32)
    expected, logits = greedy(model, "cuda")
    transformers.patch(model, pack=family.pack)
    with hwfuse.record() as record:
        found, patched = greedy(model, "cuda")
    tell(capsys, f"largest difference {(patched - logits).abs().max():.2g}", record)
    assert found.tolist() == expected.tolist()
    assert record.calls
    assert not any(name == "reference/torch" for _, name in record.calls)
