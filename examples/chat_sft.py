# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Tune a chat model
# MEPT, routed by token, with TRL's SFTTrainer on 11 dialogues: the model learns to repeat an order as a waiter does.
# Replace `DIALOGUES` by your own, as `{"prompt": [...], "completion": [...]}`; the loss is on the completion.

# %%
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from peft_promptmoe import MEPTConfig

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DISHES = ["soup", "steak", "tea", "bread", "cake", "risotto", "paella", "goulash", "ravioli", "tiramisu", "falafel"]
DIALOGUES = [
    {
        "prompt": [{"role": "user", "content": f"Could you bring me the {dish}, please?"}],
        "completion": [{"role": "assistant", "content": f"One {dish}. Anything else?"}],
    }
    for dish in DISHES
]

# %% Training
set_seed(0)
trainer = SFTTrainer(
    MODEL,
    args=SFTConfig(
        learning_rate=1e-3,
        max_steps=40,
        per_device_train_batch_size=4,
        logging_steps=10,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to="none",
    ),
    train_dataset=Dataset.from_list(DIALOGUES),
    peft_config=MEPTConfig(task_type="CAUSAL_LM"),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model("chat-adapter")

# %% Load the adapter; order dishes that were not in the training data, without the adapter and with it
model = AutoPeftModelForCausalLM.from_pretrained("chat-adapter").eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def answer(dish: str) -> str:
    asked = [{"role": "user", "content": f"Could you bring me the {dish}, please?"}]
    batch = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


for dish in ["lasagna", "coffee", "omelette"]:
    with model.disable_adapter():
        print(f"before: {answer(dish)}")
    print(f"tuned: {answer(dish)}\nright: One {dish}. Anything else?")
