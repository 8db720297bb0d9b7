# SPDX-License-Identifier: Apache-2.0
"""Registration with PEFT: twice, reloaded, pickled, and against names that somebody else holds."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_promptmoe
from peft_promptmoe import MEPTConfig, MEPTModel
from peft_promptmoe.registration import ensure_peft_type, register_tuner


def run_script(script: str) -> str:
    """Output of a script in a process of its own, where PEFT's tables can be spoilt."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_member_is_a_real_one() -> None:
    member = PeftType.MEPT
    assert member is PeftType["MEPT"] is PeftType("MEPT") is ensure_peft_type("MEPT")
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member == "MEPT" and member.value == "MEPT" and member.name == "MEPT" and hash(member) == hash("MEPT")
    assert list(PeftType).count(member) == 1 and member in PeftType and "MEPT" in PeftType.__members__
    assert str(member).rpartition(".")[2] == "MEPT"
    assert repr(member).startswith("<PeftType.MEPT")


def test_the_member_survives_pickle_copy_and_json() -> None:
    member = PeftType.MEPT
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is member and copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "MEPT"}'


def test_the_config_survives_pickle_copy_and_json(tmp_path: object) -> None:
    config = MEPTConfig(task_type="SEQ_CLS", target_modules=["b", "a"], num_experts=3, top_k=2)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert type(twin) is MEPTConfig and twin == config and twin.peft_type is PeftType.MEPT
    written = json.loads(json.dumps(config.to_dict()))
    assert written["peft_type"] == "MEPT" and written["target_modules"] == ["a", "b"]
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is MEPTConfig and loaded.to_dict() == config.to_dict()


def test_the_tables_of_peft_hold_our_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MEPT] is MEPTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MEPT] is MEPTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MEPT] == MEPTModel.prefix == "mept_"


def test_registering_the_same_classes_again_changes_nothing() -> None:
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    register_tuner(MEPTConfig, MEPTModel, "MEPT")
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)) == before


def test_reload_of_package_and_submodules() -> None:
    out = run_script("""
        import importlib, sys
        import torch
        from peft import PeftType, get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from transformers import BertConfig, BertModel
        import peft_promptmoe

        def forward():
            base = BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=16, vocab_size=20)).eval()
            ids = torch.tensor([[3, 4, 5]])
            with torch.no_grad():
                plain = base(ids).last_hidden_state
                model = get_peft_model(base, sys.modules["peft_promptmoe"].MEPTConfig())
                changed = not torch.equal(model(input_ids=ids).last_hidden_state, plain)
                assert torch.equal(model.unload()(ids).last_hidden_state, plain)
            return changed

        members = list(PeftType)
        old = peft_promptmoe.MEPTConfig
        assert forward()
        importlib.reload(peft_promptmoe)
        assert forward()
        # Everything, dependencies first, as an interactive session does after an edit.
        names = "adapter_state models.inspection models.sites routing.router config registration engine.projection " \\
                "engine.transformers_attention engine.prompt_layer engine.key_value engine.token_form " \\
                "engine.model_hooks checks tuner mept.config mept.layer mept.model mept".split()
        for name in names:
            importlib.reload(sys.modules[f"peft_promptmoe.{name}"])
        importlib.reload(peft_promptmoe)
        assert peft_promptmoe.MEPTConfig is not old
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MEPT] is peft_promptmoe.MEPTConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MEPT] is peft_promptmoe.MEPTModel
        assert list(PeftType) == members
        assert forward()
        # And from nothing, as after deleting it from sys.modules.
        for name in [n for n in sys.modules if n.startswith("peft_promptmoe")]:
            del sys.modules[name]
        import peft_promptmoe
        assert list(PeftType) == members and forward()
        print("done")
    """)
    assert out.strip() == "done"


def test_a_name_or_prefix_that_is_taken_is_an_error() -> None:
    out = run_script("""
        import sys
        from dataclasses import dataclass
        from peft import LoraConfig, PeftConfig, PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

        def fresh_import():
            for name in [n for n in sys.modules if n.startswith("peft_promptmoe")]:
                del sys.modules[name]
            import peft_promptmoe

        def refusal():
            before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING), \\
                dict(PEFT_TYPE_TO_PREFIX_MAPPING)
            try:
                fresh_import()
            except RuntimeError as error:
                assert before == (dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING),
                                  dict(PEFT_TYPE_TO_PREFIX_MAPPING))
                return str(error)
            raise AssertionError("not refused")

        @dataclass
        class StrangerConfig(PeftConfig):
            pass

        # Another package has made the same member, by the same trick.
        member = str.__new__(PeftType, "MEPT")
        member._name_ = member._value_ = "MEPT"
        PeftType._member_map_["MEPT"] = PeftType._value2member_map_["MEPT"] = member
        PeftType._member_names_.append("MEPT")
        type.__setattr__(PeftType, "MEPT", member)
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = StrangerConfig
        message = refusal()
        assert "StrangerConfig" in message and "'MEPT'" in message and "Uninstall" in message, message
        del PEFT_TYPE_TO_CONFIG_MAPPING[member]

        # Another method uses our parameter prefix, which PEFT itself never notices.
        PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] = "mept_"
        message = refusal()
        assert "'mept_'" in message and "LORA" in message, message
        PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] = "lora_"

        fresh_import()  # and the member that was already there is used
        assert sys.modules["peft_promptmoe"].MEPTConfig().peft_type is member
        print("done")
    """)
    assert out.strip() == "done"


def test_import_registers_once_in_a_fresh_process() -> None:
    assert peft_promptmoe.__version__
    assert [member for member in PeftType if member == "MEPT"] == [PeftType.MEPT]
