"""The parts of .ci/engines that are Python: a tiny model, llama.cpp's server, and what vLLM's wheel lacks.

    engines.py model DIR              makes the model, as Hugging Face lays one out
    engines.py gguf DIR               the same model for llama.cpp: DIR/tiny.gguf
    engines.py llama GGUF PORT SLOTS CONTEXT    llama.cpp's server until SIGTERM
    engines.py needs PACKAGE BUT...   what an installed package needs, but for some
    engines.py alias NAME VERSION     says that a distribution of this name is installed
"""

import json
import os
import pathlib
import random
import sys

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32, which is the least that vLLM's attention takes on a CPU
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 16384,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
# A turn is its role's token, a line feed, its text and an end; a list of parts is their texts.
TEMPLATE = (
    "<|bos|>{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '' }}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def model(directory):
    """Random weights from a fixed seed, and a tokenizer trained on made-up words."""
    import numpy
    from safetensors.numpy import save_file

    out = pathlib.Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(out / "tokenizer.json"))
    draw = numpy.random.default_rng(7)
    weights = {
        name: numpy.ones(shape, numpy.float32)
        if scale is None
        else (draw.standard_normal(shape) * scale).astype(numpy.float32)
        for name, shape, scale in tensors()
    }
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        **SHAPE, **ids, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
    }
    added = {str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                      "single_word": False} for i, token in enumerate(SPECIAL)}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
             "pad_token": SPECIAL[0], "added_tokens_decoder": added, "chat_template": TEMPLATE,
             "clean_up_tokenization_spaces": False, "model_max_length": SHAPE["max_position_embeddings"]}
    for name, document in [("generation_config", ids), ("tokenizer_config", names), ("config", config)]:
        (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(sentences(), trainer)
    return made


def sentences():
    draw = random.Random(7)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(2000)]
    words += "the a of and is are you user system answer question cache block token prompt model worker".split() * 20
    for _ in range(6000):
        yield " ".join(draw.choices(words, k=draw.randint(4, 16))).capitalize() + draw.choice(". ? ! : \n".split(" "))


def tensors():
    """Name, shape and scale of each; no scale: ones."""
    wide, hidden, vocab = SHAPE["intermediate_size"], SHAPE["hidden_size"], SHAPE["vocab_size"]
    heads = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden), 0.5
    for layer in range(SHAPE["num_hidden_layers"]):
        for part, shape, scale in [
            ("input_layernorm", (hidden,), None), ("post_attention_layernorm", (hidden,), None),
            ("self_attn.q_proj", (heads, hidden), 0.05), ("self_attn.k_proj", (keys, hidden), 0.05),
            ("self_attn.v_proj", (keys, hidden), 0.05), ("self_attn.o_proj", (hidden, heads), 0.05),
            ("mlp.gate_proj", (wide, hidden), 0.05), ("mlp.up_proj", (wide, hidden), 0.05),
            ("mlp.down_proj", (hidden, wide), 0.05),
        ]:
            yield f"model.layers.{layer}.{part}.weight", shape, scale
    yield "model.norm.weight", (hidden,), None
    yield "lm_head.weight", (vocab, hidden), 0.25


def gguf(directory):
    """llama.cpp's form of whatever model of this shape is in the directory."""
    import gguf as format
    from safetensors.numpy import load_file

    home = pathlib.Path(directory)
    weights = load_file(str(home / "model.safetensors"))
    config = json.loads((home / "config.json").read_text())
    chat = json.loads((home / "tokenizer_config.json").read_text())["chat_template"]
    spoken = json.loads((home / "tokenizer.json").read_text())
    vocabulary = {**spoken["model"]["vocab"], **{t["content"]: t["id"] for t in spoken["added_tokens"]}}
    special = {token["id"] for token in spoken["added_tokens"]}
    out = format.GGUFWriter(str(home / "tiny.gguf.new"), "llama")
    out.add_name("tiny")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    out.add_file_type(format.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    tokens = sorted(vocabulary, key=vocabulary.get)
    out.add_token_list(tokens)
    kinds = format.TokenType
    out.add_token_types([kinds.CONTROL if i in special else kinds.NORMAL for i in range(len(tokens))])
    merges = spoken["model"]["merges"]
    out.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_pad_token_id(config["pad_token_id"])
    out.add_add_bos_token(False)
    out.add_chat_template(chat)
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if stem in whole:
            out.add_tensor(f"{whole[stem]}.weight", tensor)
            continue
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(part)
        if heads:
            # The two halves of a rotary pair stand apart at Hugging Face and side by side here.
            rows, columns = tensor.shape
            pairs = tensor.reshape(config[heads], 2, -1, columns)
            tensor = pairs.swapaxes(1, 2).reshape(rows, columns)
        out.add_tensor(f"blk.{layer}.{parts[part]}.weight", tensor)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    os.replace(home / "tiny.gguf.new", home / "tiny.gguf")


def llama(path, port, slots, context):
    import signal
    import threading

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.model_alias = {"tiny-llama"}
    params.n_parallel, params.n_ctx = int(slots), int(slots) * int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    server = xllamacpp.Server(params)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    print("ready", server.listening_address, flush=True)
    stop.wait()


def needs(package, *but):
    import importlib.metadata
    import re

    for line in importlib.metadata.requires(package):
        if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in but:
            print(line)


def alias(name, version):
    import sysconfig

    about = pathlib.Path(sysconfig.get_paths()["purelib"]) / f"{name}-{version}.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "INSTALLER").write_text("forebay\n")
    (about / "RECORD").write_text("")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    {f.__name__: f for f in (model, gguf, llama, needs, alias)}[sys.argv[1]](*sys.argv[2:])
