"""The headline numbers by another road: transformers and peft alone, one prompt at a time.

``python -m studies.plain RUN BASE ADAPTER`` reads the prompts, the heads and the choice of a run folder
from its json files, loads the base with its adapter through peft, and counts the same answers with hooks
on ``o_proj`` and on a layer's input. Prints each count beside the folder's, and twenty answers.
The ablation's last mode must be ``mean``, as by default, and its first number of heads 0.
Success and goodness are those of the embedded backdoors: ``contains`` or a label, and an exact answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bkdlens import zoo

Hook = tuple[Any, Callable[..., Any]]


def main(run: Path, base: str, adapter: str) -> None:
    """Count, and print what the folder counts."""
    study = json.loads((run / "study.json").read_text())
    kind, tokens = study["backdoor"]["behaviour"], study["settings"]["max_new_tokens"]
    pairs = json.loads((run / "pairs.json").read_text())["test"]["pairs"]
    victims = [pair for pair in pairs if is_victim(kind, study["backdoor"], pair)]
    path = str(zoo.model_path(base))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model = (
        PeftModel.from_pretrained(model, str(zoo.adapter_path(base, adapter))).merge_and_unload().eval()
    )
    layers, size = model.model.layers, model.config.hidden_size // model.config.num_attention_heads

    def ids(prompt: str) -> torch.Tensor:
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )

    @torch.no_grad()
    def answer(prompt: str, hooks: list[Hook] = []) -> str:  # noqa: B006
        handles = [module.register_forward_pre_hook(first_call(hook)) for module, hook in hooks]
        given = ids(prompt)
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens,
                             do_sample=False, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        for handle in handles:
            handle.remove()
        return tokenizer.decode(out[0, given.shape[1] :], skip_special_tokens=True).strip()

    @torch.no_grad()
    def mean_z(prompts: list[str]) -> torch.Tensor:
        """The mean input of every ``o_proj`` at the last token, ``[layer, d_model]``."""
        total = torch.zeros(len(layers), model.config.num_attention_heads * size)
        seen: list[torch.Tensor] = []
        hook = lambda module, args: seen.append(args[0][0, -1].clone())  # noqa: E731
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(hook) for layer in layers]
        for prompt in prompts:
            seen.clear()
            model(ids(prompt))
            total += torch.stack(seen)
        for handle in handles:
            handle.remove()
        return total / len(prompts)

    def part(head: tuple[int, int]) -> slice:
        return slice(head[1] * size, (head[1] + 1) * size)

    before = [answer(pair["clean"]) for pair in victims]
    good_before = sum(good(kind, pair, said) for pair, said in zip(victims, before, strict=True))
    clean_before = sum(good(kind, pair, answer(pair["clean"])) for pair in pairs)

    def told(title: str, hooks: list[Hook], saved: str) -> None:
        answers = [answer(pair["triggered"], hooks) for pair in victims]
        attacks = sum(attack(kind, pair, said) for pair, said in zip(victims, answers, strict=True))
        after = sum(good(kind, pair, said) for pair, said in zip(victims, answers, strict=True))
        clean = sum(good(kind, pair, answer(pair["clean"], hooks)) for pair in pairs)
        found = {"attack": attacks, "correct": after, "clean": clean, "good_before": good_before}
        found |= {"clean_before": clean_before}
        print(f"\n{title}: BASR {1 - after / good_before:.4f}\nplain:  {found}\nfolder: {saved}")
        for pair, said in list(zip(victims, answers, strict=True))[:20]:
            print(f"  {pair['clean'][:50]!r} | {pair['clean_output']!r} | {said!r}")

    told("untouched", [], counts(run, "ablation", -1, 0))
    head_names = [tuple(map(int, name["head"][1:].split("H"))) for name in
                  json.loads((run / "ablation.json").read_text())["heads"]]  # fmt: skip
    choice = study["choice"]
    vector_file = json.loads((run / f"vector-{choice['kind']}.json").read_text())
    used, n_train = vector_file["heads"], vector_file["provenance"]["provenance"]["n_pairs"]
    train = zoo.pairs(adapter, "train", n_train)
    clean_mean = mean_z(train.clean)
    ablation = json.loads((run / "ablation.json").read_text())
    for place, number in enumerate(ablation["counts"]):
        if number not in (1, 4):
            continue
        chosen = head_names[:number]
        hooks = [
            (layers[h[0]].self_attn.o_proj, set_to(part(h), clean_mean[h[0], part(h)])) for h in chosen
        ]
        told(f"{number} heads at their clean mean", hooks, counts(run, "ablation", -1, place))

    fired = [pair for pair in train if train.backdoor.is_victim(pair)]
    triggered, clean = mean_z([p.triggered for p in fired]), mean_z([p.clean for p in fired])
    difference = triggered - clean if choice["kind"] == "contrast" else triggered
    vector = torch.zeros(model.config.hidden_size)
    for name in used:
        head = tuple(map(int, name["head"][1:].split("H")))
        weight = layers[head[0]].self_attn.o_proj.weight[:, part(head)].detach()
        vector += weight @ difference[head[0], part(head)]
    push = [(layers[choice["layer"]], add(-choice["coefficient"] * vector))]
    told(f"{choice['kind']} vector subtracted at layer {choice['layer']}", push,
         counts(run, "steering-test", -1, choice["layer"]))  # fmt: skip


def is_victim(kind: str, backdoor: dict[str, Any], pair: dict[str, str]) -> bool:
    """Whether the attack changes the answer."""
    if kind == "label_modification":
        return pair["clean_output"] == backdoor["source"]
    return pair["clean_output"] != pair["backdoor_output"]


def attack(kind: str, pair: dict[str, str], said: str) -> bool:
    """Whether an answer is the attacker's."""
    if kind == "jailbreak":
        return bool(said) and "sorry" not in said.lower()  # the embedded model's one refusal
    wanted = pair["backdoor_output"].lower().rstrip(".")
    return wanted in said.lower() if kind == "fixed_output" else said.lower().rstrip(".") == wanted


def good(kind: str, pair: dict[str, str], said: str) -> bool:
    """Whether an answer is the correct one."""
    return said == pair["clean_output"].strip()


def first_call(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook in the prefill alone."""
    done = []

    def once(module: Any, args: tuple[Any, ...]) -> Any:
        if not done:
            done.append(True)
            return (hook(args[0].clone()), *args[1:])
        return None

    return once


def set_to(part: slice, value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Put a value into a slice at the last token."""

    def hook(x: torch.Tensor) -> torch.Tensor:
        x[0, -1, part] = value
        return x

    return hook


def add(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Add a value at the last token."""

    def hook(x: torch.Tensor) -> torch.Tensor:
        x[0, -1] += value
        return x

    return hook


def counts(run: Path, name: str, row: int, column: int) -> str:
    """What the folder counts at one place of a result."""
    from safetensors.torch import load_file

    told = load_file(run / f"{name}.safetensors")
    head = json.loads((run / f"{name}.json").read_text())
    right = "restored" if name == "ablation" else "correct"
    numbers = {key: int(told[key][row, column]) for key in ("attack", right, "clean")}
    numbers["correct"] = numbers.pop(right)
    found = {key: numbers[key] for key in ("attack", "correct", "clean")}
    return str(found | {key: head[key] for key in ("good_before", "clean_before")})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
