"""All causal language models of the installed transformers, made tiny: does each compute here what it computes itself?

    python benchmarks/architectures.py [--only llama gemma2] [--write docs/models.md]

For each architecture a model of two layers or one of each kind, with random weights that are large enough for caps,
scales and windows (5 tokens) to matter, reads and writes texts of 8 to 20 tokens, and is compared with its own plain
forward pass of one text at a time: logits, the loss on packed texts, hidden states of packed texts, with and without
prompts that several texts share, log-probs of what was sampled, and greedy answers with transformers' ``generate``."""

from __future__ import annotations

import argparse
import copy
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_rlhf.errors import UserError
from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import next_token_logits, packed_hidden
from lit_rlhf.models.policy import packs, response_positions
from lit_rlhf.rollouts import Sampling, draw_seeds, generate
from lit_rlhf.rollouts.decoder import WholeDecoder
from lit_rlhf.rollouts.fast import make_decoder
from lit_rlhf.text.packing import Packed, pack

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, WIDTH, HEADS, CONTEXT, WINDOW = 96, 32, 4, 128, 5
TOLERANCE = 1e-3  # of float32 results of the size of 1
EQUAL, OWN_WAY = "equal", "own way (slower)"

# Settings by which configs say how large a model is; of those that a config has, these are set.
SIZES = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size"),
    (WIDTH, """hidden_size d_model n_embd dim emb_dim embedding_size model_dim word_embed_proj_dim intermediate_size
        ffn_dim n_inner d_ff ffn_hidden_size moe_intermediate_size inner_dim shared_expert_intermediate_size
        shared_intermediate_size decoder_ffn_dim encoder_ffn_dim attention_hidden_size lru_width embed_dim hidden_dim
        expert_ffn_hidden_size mlp_hidden_size moe_shared_expert_intermediate_size dense_intermediate_size
        intermediate_size_mlp hidden_size_per_layer_input moe_ffn_hidden_size mlp_dim input_embedding_size
        output_embedding_size"""),
    (HEADS, """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts num_decoder_attention_heads linear_num_value_heads
        mamba_num_heads num_encoder_attention_heads num_global_key_value_heads"""),
    (2, """num_key_value_heads num_kv_heads num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_experts_per_tok moe_topk moe_k num_decoder_layers top_k_experts linear_num_key_heads num_encoder_layers"""),
    (8, """head_dim kv_channels v_head_dim qk_nope_head_dim q_lora_rank kv_lora_rank linear_key_head_dim
        linear_value_head_dim mamba_head_dim mamba_chunk_size chunk_size mamba_d_state ssm_state_size state_size"""),
    (1, "n_group topk_group n_shared_experts moe_layer_start_index first_k_dense_replace"),
    (CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions"),
    (WINDOW, "sliding_window attention_window_size local_attention"),
]  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES for name in names.split()}
# Settings that a family needs besides, where sizes of its config must fit each other.
MORE: dict[str, dict[str, Any]] = {}


def settings_of(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """Settings of a config that make its model tiny; of configs within it, too."""
    known = kind().to_dict()
    settings: dict[str, Any] = {}
    for name, value in known.items():
        if name in SIZE_OF and isinstance(value, int | list) and not isinstance(value, bool):
            settings[name] = SIZE_OF[name]
        elif name.endswith("_token_id") and value is not None:
            settings[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    for alias, name in kind.attribute_map.items():
        if name in settings:
            settings.pop(alias, None)
    kinds = list(dict.fromkeys(known.get("layer_types") or []))
    if len(kinds) > 1:  # one layer of each
        settings |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    for name, inner in (kind.sub_configs or {}).items():
        if isinstance(known.get(name), dict):
            model_type = known[name].get("model_type")
            inner = CONFIG_MAPPING.get(model_type, inner)
            if inner is not AutoConfig:
                settings[name] = settings_of(inner) | ({"model_type": model_type} if model_type else {})
    return settings


def tiny(architecture: str) -> PreTrainedModel:
    """A model of that architecture with random weights; raises whatever transformers does where that fails."""
    kind = CONFIG_MAPPING[architecture]
    config = kind(**settings_of(kind) | MORE.get(architecture, {}))
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > 2e7:
        raise ValueError(f"{size:,} parameters when made tiny")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        if not model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits.isfinite().all():
            raise ValueError("its logits are not finite")
    return model


@dataclass
class Row:
    """What came of one architecture: "equal", "own way (slower)", or why it is refused."""

    architecture: str
    kind: str = ""  # dense, mixture of experts, window, hybrid
    logits: str = ""
    loss: str = ""
    packed: str = ""
    shared_prompts: str = ""
    sampled_logprobs: str = ""
    greedy: str = ""

    @property
    def cells(self) -> list[str]:
        """As in a table."""
        return [str(getattr(self, field.name)) for field in fields(self)]


PROMPT = [11, 12, 13, 14, 15, 16, 17]
TEXTS = [[*PROMPT, *range(20, 29)], [*PROMPT, 30], [*PROMPT, *range(40, 46)], list(range(50, 63))]
ANSWERS = [len(text) - len(PROMPT) for text in TEXTS]


@torch.no_grad()
def examine(architecture: str, model: PreTrainedModel) -> Row:
    """The row of one model."""
    row = Row(architecture, kind_of(model))
    if model.base_model is model:
        row.logits = "refused: it does not name the part of it without the head"
        return row
    own = [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS]
    try:
        states = [model.base_model(input_ids=torch.tensor([text]), use_cache=False) for text in TEXTS]
        row.logits = compared([next_token_logits(model, s.last_hidden_state[0]) for s in states], own)
    except UserError as error:
        row.logits = f"refused: {str(error).partition(': ')[2]}"
        return row
    states = [s.last_hidden_state[0] for s in states]
    way = EQUAL if packs(model.base_model) else OWN_WAY
    rows = pack(TEXTS, 0)
    row.packed = compared(of_each(packed_hidden(model, rows), rows), states, way)
    before = torch.cat([cells[:-1] for cells in of_each(torch.arange(len(rows.tokens)), rows)])
    logprobs = token_logprobs(next_token_logits(model, packed_hidden(model, rows, at=before)), rows.tokens[before + 1])
    expected = torch.cat([of_text(logits, text) for logits, text in zip(own, TEXTS)])
    row.loss = compared([-logprobs.mean()[None]], [-expected.mean()[None]], way)
    shared = pack(TEXTS, 0, ANSWERS, share_prompts=True)
    row.shared_prompts = compared(of_each(packed_hidden(model, shared), shared), states, way)
    sampled(row, model)
    return row


def sampled(row: Row, model: PreTrainedModel) -> None:
    """Fill in what is sampled."""
    prompts = [text[:-1] for text in TEXTS]
    ends = {"eos_id": -7, "pad_id": 0, "seeds": draw_seeds(len(prompts), torch.Generator().manual_seed(0))}
    drawn = generate(model, prompts, Sampling(max_new_tokens=6), **ends)
    whole = [prompt + answer for prompt, answer in zip(prompts, drawn.token_lists())]
    own = [of_text(model(input_ids=torch.tensor([text]), use_cache=False).logits[0], text)[-6:] for text in whole]
    way = OWN_WAY if isinstance(make_decoder(model, 4, CONTEXT, 0, False), WholeDecoder) else EQUAL
    row.sampled_logprobs = compared(list(drawn.logprobs), own, way)
    greedy = generate(model, prompts, Sampling(max_new_tokens=6, temperature=0.0), **ends).tokens
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    try:
        theirs = [model.generate(torch.tensor([p]), **settings)[0, len(p) :] for p in prompts]
    except Exception as error:
        row.greedy = f"{way}; generate stops with {type(error).__name__}"
        return
    if all(torch.equal(a, b) for a, b in zip(greedy, theirs)):
        row.greedy = way
        return
    text = [prompt + answer for prompt, answer in zip(prompts, greedy.tolist())]
    best = [model(input_ids=torch.tensor([t]), use_cache=False).logits[0, -7:-1].argmax(-1) for t in text]
    same = all(torch.equal(a, b) for a, b in zip(greedy, best))
    row.greedy = f"{way}; generate differs from the model's own forward pass" if same else "DIFFERS"


def of_text(logits: Tensor, text: list[int]) -> Tensor:
    """Log-probs (T - 1,) of a text's tokens behind the first."""
    return token_logprobs(logits[:-1], torch.tensor(text[1:]))


def of_each(x: Tensor, rows: Packed) -> list[Tensor]:
    """Of each sequence what stands at its tokens."""
    places, there = response_positions(rows, rows.lengths)
    return [x[place[real]] for place, real in zip(places, there)]


def compared(found: list[Tensor], expected: list[Tensor], way: str = EQUAL) -> str:
    off = max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))
    size = max(1.0, max(b.double().abs().max().item() for b in expected))
    return way if off <= TOLERANCE * size else f"DIFFERS by {off:.2g}"


def kind_of(model: PreTrainedModel) -> str:
    """In words, from its config."""
    config = model.config.get_text_config()
    names = " ".join(name for name, value in config.to_dict().items() if value)
    kinds = set(getattr(config, "layer_types", None) or [])
    words = []
    if type(model)._is_stateful or kinds - {"full_attention", "sliding_attention"}:
        words.append("hybrid" if kinds else "recurrent")
    if re.search(r"num_experts|n_routed_experts|num_local_experts", names):
        words.append("experts")
    if "sliding_attention" in kinds or getattr(config, "sliding_window", None):
        words.append("window")
    return ", ".join(words) or "dense"


HEAD = ["architecture", "kind", "logits", "loss", "packed", "shared prompts", "sampled log-probs", "greedy"]
BEGIN, END = "<!-- architectures -->\n", "<!-- /architectures -->"


def table(rows: list[Row], left_out: dict[str, str]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *(row.cells for row in rows))]
    reasons = [f"- {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join([*lines, "", f"{len(rows)} made; not made, of {len(rows) + len(left_out)}:", "", *reasons, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows, left_out = [], {}
    for architecture in arguments.only:
        try:
            model = tiny(architecture)
        except Exception as error:
            left_out[architecture] = " ".join(f"{type(error).__name__}: {error}".split())[:140]
            continue
        rows.append(examine(architecture, model))
        print(" | ".join(rows[-1].cells), flush=True)
    text = table(rows, left_out)
    if arguments.write is None:
        print(text)
        return
    before, _, rest = arguments.write.read_text(encoding="utf-8").partition(BEGIN)
    arguments.write.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
