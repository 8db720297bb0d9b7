# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Tune a model of four bits
# As QLoRA does: bitsandbytes holds the base model in 4 bits, and the adapter, MEPT routed by token, learns in float32.
# Runs on a GPU and, slowly, on a CPU. Replace `TEXTS` by your own. Needs `pip install bitsandbytes`.

# %%
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_promptmoe import MEPTConfig

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOWNS = ["Brest", "Cadiz", "Riga", "Bergen", "Varna", "Genoa", "Porto", "Gdansk", "Izmir", "Bari", "Turku", "Ghent"]
TEXTS = [f"The lighthouse of {town} was built in {1800 + 7 * number}." for number, town in enumerate(TOWNS)]

# %% The base model in 4 bits
set_seed(0)
bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=four_bits)
base = prepare_model_for_kbit_training(base)
model = get_peft_model(base, MEPTConfig(task_type="CAUSAL_LM"))
model.print_trainable_parameters()
print(f"the model in memory: {model.get_memory_footprint() / 1e6:.0f} MB")

# %% Training
tokenizer = AutoTokenizer.from_pretrained(MODEL)
args = TrainingArguments("outputs", learning_rate=1e-3, max_steps=20, per_device_train_batch_size=4, logging_steps=5)
data = Dataset.from_dict(dict(tokenizer(TEXTS)))
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model, args, train_dataset=data, data_collator=collator).train()
model.save_pretrained("four-bit-adapter")

# %% Load the adapter onto four bits again
model = AutoPeftModelForCausalLM.from_pretrained("four-bit-adapter", quantization_config=four_bits).eval()
batch = tokenizer("The lighthouse of", return_tensors="pt").to(model.device)
with torch.no_grad():
    tuned = model.generate(**batch, max_new_tokens=12, do_sample=False)
    with model.disable_adapter():
        before = model.generate(**batch, max_new_tokens=12, do_sample=False)
for name, ids in {"before": before, "tuned": tuned}.items():
    print(f"{name}: {tokenizer.decode(ids[0], skip_special_tokens=True)}")
