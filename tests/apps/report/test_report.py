# ruff: noqa: RUF001  the page's minus signs and dashes are meant
import json
import re
from html.parser import HTMLParser
from itertools import combinations

import pytest

from lit_rlhf.apps import write_report
from lit_rlhf.apps.charts import frontier
from lit_rlhf.apps.report.samples import answers
from lit_rlhf.apps.run_reader import load_run
from lit_rlhf.errors import UserError
from lit_rlhf.stages.stage import all_stages

PIPELINE = [name for name, stage in all_stages().items() if stage.in_pipeline]

RATE = {"low": 0.71, "high": 0.772, "n": 8, "prompts": 2}
HOSTILE = "<script>alert(1)</script><img src=http://evil.test/x onerror=alert(2)> \x1b[31m \u202e \ud83d {{ 7 * 7 }}"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_stage(run, stage, figures, metrics="", data=None, seconds=61.2):
    done = {"stage": stage, "figures": figures, "seconds": seconds, "versions": {"torch": "2.9.1"}, "data": data or {}}
    done |= {"cost": {"cpu_seconds": 100.0, "parameters": 1234567}, "memory": {"peak_mib": 812.4}}
    write_json(run / stage / "done.json", done)
    (run / stage / "config.yaml").write_text("optimizer:\n  lr: 0.0003\n", encoding="utf-8")
    if metrics:
        (run / stage / "metrics.csv").write_text(metrics, encoding="utf-8")


def write_sft(run):
    metrics = "step,val/sft/loss,sft/loss\n0,2.5,\n10,,1.5\n20,,0.75\n20,0.8764,nan\n"
    write_stage(run, "sft", {"val_loss_first": 2.5, "val_loss": 0.8764}, metrics, {"train_set": 4321, "skipped": 7})
    write_rows(
        run / "sft/samples.jsonl", [{"step": s, "prompt": "Hi?", "text": f"text {s}"} for s in range(10, 210, 10)]
    )


def write_ppo(run, judge="gold"):
    rows = [f"{4 * i},{i / 10},{i / 5},{0.5 - i / 40},{256 * (i + 1)}" for i in range(8)]
    metrics = "step,ppo/score,ppo/kl,ppo/entropy,ppo/episodes\n" + "\n".join(rows) + "\n"
    figures = {"score_first": 0.0, "score_last": 0.7, "kl": 1.4321, "entropy": 0.325, "episodes": 2048, "gold": None}
    write_stage(run, "ppo", {**figures, "win_rate": {"mean": 0.7412, **RATE, "judge": judge}}, metrics)
    write_rows(run / "ppo/samples.jsonl", [{"step": 10, "prompt": "Hi?", "text": "Hello"}])


def model_figures(gold):
    graded = {"gold": 3.7, "correct": 0.667, "polite": 0.5, "right": 0.828, "greedy_right": 0.951}
    kinds = {kind: {"gold": 3.0, "correct": 0.5, "right": right} for kind, right in (("fact", 0.5), ("follow", 0.25))}
    known = {"words": 8.1, "entropy": 0.4, "score": 1.48, "kl": 2.19}
    return {**(graded if gold else dict.fromkeys(graded)), **known, "by_kind": kinds if gold else {}}


def model_answers(text, worth, gold):
    grade = {"gold": worth, "correct": 1.0 if worth else -1.0, "polite": -1.0, "right": float(worth > 0)}
    graded = {"grades": [grade, grade], "greedy_grade": grade} if gold else {"grades": None}
    return {"greedy": f"greedy {text}", "samples": [text, "another"], "scores": [worth, 0.0], **graded}


def write_evaluation(run, gold=True, text="The rof is brown.", names=("base", "sft", "ppo")):
    models = {name: model_figures(gold) for name in names}
    for name in names[1:]:
        models[name]["benchmark"] = {"colours": {"acc": 0.25, "acc_stderr": 0.0456, "n": 90.0}}
    rates = {f"{b}_vs_{a}": {"mean": 0.7412, **RATE} for a, b in combinations(names, 2)}
    rates[f"{names[-1]}_vs_sft"]["length_controlled"] = {"mean": 0.6123, "low": 0.55, "high": 0.67}
    best = {"n": 8, "gold": None, "correct": None, "right": None}
    figures = {
        "judge": "gold" if gold else "reward model (proxy)",
        "prompts": 2,
        "models": models,
        "win_rate": rates,
        "best_of_n": {**best, "win_rate": {"best_of_n_vs_sft": {"mean": 0.6543, **RATE}}},
    }
    write_stage(run, "evaluate", figures)
    turns = [("user", "What colour is it?"), ("assistant", "Brown."), ("user", "And its home?")]
    two_turns = [{"role": role, "content": content} for role, content in turns]
    prompts = [two_turns, [{"role": "user", "content": "What colour is the rof?"}]]
    worths = [(0.0, 5.0), (5.0, 0.0)]  # PPO wins the first against SFT and loses the second
    rows = []
    for prompt, kind, (sft, ppo) in zip(prompts, ("follow", "fact"), worths):
        worth = {name: {"sft": sft, "ppo": ppo}.get(name, 0.0) for name in names}
        answers = {name: model_answers(f"{text} ({name})", worth[name], gold) for name in worth}
        rows.append({"prompt": prompt, "kind": kind, "models": answers})
    write_rows(run / "evaluate/samples.jsonl", rows)


def write_dpo(run):
    metrics = "step,dpo/loss,dpo/accuracy,dpo/chosen_log_ratio,dpo/rejected_log_ratio,val/dpo/gold_accuracy\n"
    metrics += "0,0.693,0.5,0,0,0.5\n9,0.4,0.8,-0.4,-4.5,0.913\n"
    write_stage(run, "dpo", {"val_loss": 0.5, "val_accuracy": 0.743, "gold_accuracy": 0.913, "val_pairs": 261}, metrics)
    write_rows(run / "dpo/samples.jsonl", [{"step": 50, "prompt": "Hi?", "text": "Good day"}])


def write_whole(run, gold=True, text="The rof is brown."):
    loss = "step,pretrain/loss,val/pretrain/loss\n" + "\n".join(f"{i},{6 / (i + 1)}," for i in range(900))
    write_stage(run, "pretrain", {"val_loss_first": 6.9, "val_loss": 0.577, "tokens": 1536000}, loss)
    write_rows(run / "pretrain/samples.jsonl", [{"step": 200, "prompt": "", "text": text}] * 2)
    write_sft(run)
    agreement = 0.923 if gold else None
    write_stage(run, "preference", {"rankings": 3264, "pairs": 17147, "words": 8.7, "agreement": agreement})
    accuracy = "step,reward/loss,reward/accuracy,val/reward/accuracy\n0,0.69,0.5,0.5\n9,0.4,0.8,0.743\n"
    reward = {"val_loss": 0.5, "val_accuracy": 0.743, "gold_accuracy": 0.827 if gold else None, "val_pairs": 261}
    write_stage(run, "reward", reward, accuracy, {"skipped": ["pairs.jsonl:3: no <b>'chosen'</b>"], "long": 2})
    write_ppo(run, "gold" if gold else "reward model (proxy)")
    write_evaluation(run, gold, text)
    write_json(run / "summary.json", {"seed": 17})


class Page(HTMLParser):
    """What a browser would see: tags, attributes, ids, and the text outside of styles and drawings."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = set(), [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())
        self.ids = {value for name, value in self.attributes if name == "id"}

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)


def report(run):
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.tmp"))
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert not page.open  # every tag is closed
    assert_offline(source, page)
    return page


def assert_offline(source, page):
    """Nothing to load, nothing to run."""
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "action", "xlink:href") and not name.startswith("on")
        assert name != "href" or value.startswith("#")
        assert name in ("title", "aria-label") or "http" not in (value or "")
    style = re.search("<style>(.*?)</style>", source, re.S)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_a_whole_run(tmp_path):
    run = tmp_path / "mine"
    write_whole(run)
    page = report(run)
    assert (run / "report.html").stat().st_size < 300_000
    assert {"pipeline", "results", "ppo", "stages", "kinds", "answers", "learning", "data", "numbers"} <= page.ids
    assert "The judge prefers PPO's answers to SFT's in 74.1% of comparisons (95% interval 71.0–77.2%)" in page.text
    assert "Best of 8 vs SFT 65.4%" in page.text
    cost = (
        r"Cost: \S.* of wall time, \S.* of processor time, .*1,234,567 parameters in .*, at most 812 MiB\. lit_rlhf: "
    )
    assert re.search(cost + r"\d\d,\d{3} lines of Python", page.text)
    assert "colours acc 0.250 ± 0.0456 0.250 ± 0.0456" in page.text
    assert "PPO vs SFT 61.2% (55.0% – 67.0%)." in page.text  # at equal lengths
    assert "Seed 17" in page.text and "6 min 7 s in all" in page.text  # six stages of 61.2 s
    assert "KL to SFT nats per answer 2.19 2.19 2.19" in page.text
    assert "1,536,000" in page.text and "4,321" in page.text
    assert "proxy" not in page.text.lower()


def test_ratings_and_what_was_lost(tmp_path):
    write_whole(tmp_path)
    done = json.loads((tmp_path / "evaluate/done.json").read_text())
    rated = {"sft": (1000.0, 1000.0, 1000.0), "ppo": (1182.6, 1160.0, 1205.2), "base": (401.0, 380.0, 422.0)}
    models = {name: dict(zip(("elo", "low", "high"), points)) for name, points in rated.items()}
    figures = done["figures"] | {"ratings": {"anchor": "sft", "prompts": 264, "models": models}}
    figures["models"]["ppo"] |= {"self_similarity": 0.682, "interval": {"self_similarity": {"low": 0.65, "high": 0.71}}}
    figures["models"]["sft"]["self_similarity"] = 0.423
    figures["changes"] = {"ppo": {"self_similarity": {"change": 0.259, "low": 0.224, "high": 0.294}}}
    write_json(tmp_path / "evaluate/done.json", done | {"figures": figures})
    page = report(tmp_path)
    assert {"ratings", "frontier"} <= page.ids
    assert "PPO 1,183 1,160 – 1,205 SFT 1,000 the anchor Base 401 380 – 422" in page.text  # the strongest first
    assert "Self-similarity 0 to 1 – 0.423 0.682 0.650 – 0.710 +0.259 +0.224 – +0.294" in page.text


def test_distances_without_evaluation_are_those_of_training(tmp_path):
    write_ppo(tmp_path)
    charts = list(frontier(load_run(tmp_path)))
    assert [chart.title for chart in charts] == ["Score against KL"]  # gold was not logged
    assert charts[0].lines[0].points == [(i / 5, i / 10) for i in range(8)]


def test_sections_link_to_each_other(tmp_path):
    write_whole(tmp_path)
    page = report(tmp_path)
    assert {value[1:] for name, value in page.attributes if name == "href"} <= page.ids


def test_answers_stand_side_by_side_wins_and_losses(tmp_path):
    write_whole(tmp_path)
    page = report(tmp_path)
    assert "user What colour is it? assistant Brown. user And its home?" in page.text
    assert "PPO better" in page.text and "PPO worse" in page.text
    assert "graded higher than SFT's in 1, the same in 0 and lower in 1" in page.text
    assert "✓ right rude gold 5 score 5.00" in page.text and "✗ wrong rude gold 0 score 0" in page.text


def test_prompts_in_parts_and_calls_are_shown_as_text(tmp_path):
    write_whole(tmp_path)
    file = tmp_path / "evaluate/samples.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Whose "}, {"type": "text", "text": "home?"}]}
    write_rows(file, [{**row, "prompt": [call, parts]} for row in rows])
    assert 'assistant [{"arguments": {}, "name": "look"}] user Whose home?' in report(tmp_path).text


@pytest.mark.parametrize("stage", PIPELINE)
def test_each_stage_alone(tmp_path, stage):
    write_whole(tmp_path / "whole")
    (tmp_path / "one").mkdir()
    (tmp_path / "whole" / stage).rename(tmp_path / "one" / stage)
    page = report(tmp_path / "one")
    assert page.text.count("not in this run") == len(PIPELINE) - 1  # the others are shown where they were run
    assert "Seed" not in page.text


def test_sft_alone_says_what_it_reached(tmp_path):
    write_sft(tmp_path)
    page = report(tmp_path)
    expected = "Supervised fine-tuning ended at a held-out loss of 0.876 nats per response token, from 2.50 at first."
    assert expected in page.text
    assert page.ids.isdisjoint({"results", "ppo", "answers", "kinds"})


def test_ppo_from_another_run(tmp_path):
    write_ppo(tmp_path)
    page = report(tmp_path)
    assert "PPO vs SFT 74.1% 71.0% – 77.2%" in page.text
    assert "1.43 nats per answer" in page.text
    assert "2,048 episodes" in page.text


def test_dpo_from_another_run_which_has_ppo_too(tmp_path):
    write_dpo(tmp_path)
    write_evaluation(tmp_path, names=("base", "sft", "ppo", "dpo"))
    page = report(tmp_path)
    assert "The judge prefers DPO's answers to SFT's in 74.1%" in page.text
    assert "SFT → DPO" in page.text and "SFT → PPO" not in page.text
    assert "DPO vs SFT 74.1%" in page.text and "DPO vs PPO 74.1%" in page.text and "PPO vs SFT 74.1%" in page.text
    assert "graded higher than SFT's in 0, the same in 1 and lower in 1" in page.text  # DPO's worths are 0
    assert "91.3% of gold pairs ranked right" in page.text
    assert "Log-ratio to SFT against optimizer steps" in [v for name, v in page.attributes if name == "aria-label"]
    assert "Good day" in page.text


def test_ppo_and_dpo_of_one_run(tmp_path):
    write_whole(tmp_path)
    write_dpo(tmp_path)
    write_evaluation(tmp_path, names=("base", "sft", "ppo", "dpo"))
    page = report(tmp_path)
    assert "The judge prefers PPO's answers to SFT's in 74.1%" in page.text
    assert "graded higher than SFT's in 1, the same in 0 and lower in 1" in page.text
    assert page.text.count("not in this run") == 0


def test_a_warning_stands_on_top_in_red(tmp_path):
    write_sft(tmp_path)
    done = json.loads((tmp_path / "sft/done.json").read_text())
    done["figures"]["warning"] = "all 7 pairs <tie>"
    (tmp_path / "sft/done.json").write_text(json.dumps(done))
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '<span class="badge bad">sft</span> all 7 pairs &lt;tie&gt;' in page


def test_an_unfinished_stage_is_shown_as_such(tmp_path, capsys):
    write_sft(tmp_path)
    (tmp_path / "sft/done.json").unlink()
    assert "not finished" in report(tmp_path).text
    assert f"{tmp_path / 'sft'}: not finished (done.json is not there)" in capsys.readouterr().out


def test_a_checkpoint_stands_in_the_place_of_pretraining(tmp_path):
    write_sft(tmp_path)
    (tmp_path / "sft/config.yaml").write_text("origin: {from_run: null, checkpoint: /models/smol}\n", encoding="utf-8")
    assert "a checkpoint: smol" in report(tmp_path).text


def test_the_same_sentence_is_no_worse_in_the_last_bit_of_its_score(tmp_path):
    write_whole(tmp_path, gold=False)
    file = tmp_path / "evaluate/samples.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for score, model in zip((1.4142135, 1.4142134), (rows[0]["models"]["sft"], rows[0]["models"]["ppo"])):
        model["samples"][0], model["scores"][0] = "The meal was cooked by the chef.", score
    write_rows(file, rows)
    found = answers(load_run(tmp_path).samples["evaluate"], "ppo", "sft")
    assert (found.better, found.same, found.worse) == (0, 1, 1)


def test_without_a_gold_judge_the_proxy_is_named(tmp_path):
    write_whole(tmp_path, gold=False)
    page = report(tmp_path)
    assert "The reward model scores PPO's answers above SFT's in 74.1%" in page.text
    assert "the reward model's score is a proxy" in page.text
    assert "The judge prefers" not in page.text and "kinds" not in page.ids
    assert "74.3% of held-out pairs ranked right" in page.text


def test_a_reward_function_is_called_by_its_name(tmp_path):
    write_ppo(tmp_path, "reward function brevity (proxy)")
    done = json.loads((tmp_path / "ppo/done.json").read_text(encoding="utf-8"))
    done["figures"] |= {"scored_by": "reward function brevity", "score_unit": "reward units"}
    write_json(tmp_path / "ppo/done.json", done)
    text = report(tmp_path).text
    assert "The reward function brevity scores PPO's answers above SFT's in 74.1%" in text
    assert "the reward function brevity's score is a proxy that PPO was trained to raise" in text
    assert "compared by the reward function brevity" in text and "in PPO's rollouts, reward units" in text
    assert "reward model" not in text.lower().split("what the numbers mean")[0] and "SFT std" not in text
    assert "Gold grade" not in text and "knows the right answer" not in text


def test_a_judge_of_its_own_is_called_by_its_name(tmp_path):
    write_whole(tmp_path, gold=False)
    done = json.loads((tmp_path / "evaluate/done.json").read_text(encoding="utf-8"))
    done["figures"]["judge"] = "llm_judge:qwen"
    write_json(tmp_path / "evaluate/done.json", done)
    text = report(tmp_path).text
    assert "llm_judge:qwen prefers PPO's answers to SFT's in 74.1%" in text and "proxy" not in text.lower()
    assert "knows the right answer" not in text


@pytest.mark.parametrize(
    ("mean", "low", "high", "words"),
    [(0.52, 0.48, 0.56, "which is no clear difference"), (0.31, 0.27, 0.35, "PPO is worse than SFT")],
)
def test_a_result_is_not_made_better_than_it_is(tmp_path, mean, low, high, words):
    rate = {"mean": mean, "low": low, "high": high, "n": 8, "prompts": 2, "judge": "gold"}
    write_stage(tmp_path, "ppo", {"kl": 1.0, "win_rate": rate})
    assert words in report(tmp_path).text


def test_hostile_text_is_only_text(tmp_path):
    run = tmp_path / "<b>run"
    write_whole(run, text=HOSTILE)
    (run / "sft/config.yaml").write_text("path: <script>alert(3)</script>\n")
    page = report(run)
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source and "<img" not in source and "<b>run" not in source
    assert "<script>alert(1)</script>" in page.text  # readable all the same
    assert "{{ 7 * 7 }}" in page.text
    assert r"\x1b[31m \u202e \ud83d" in page.text
    assert "no <b>'chosen'</b>" in page.text


def test_long_texts_are_cut(tmp_path):
    write_whole(tmp_path, text="word " * 4000)
    assert "(18,800 more characters)" in report(tmp_path).text
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_curves_of_any_values_can_be_drawn(tmp_path):
    header = "step,sft/loss,val/sft/loss,sft/lr\n"
    rows = [f"{i},{value},{'' if i else 'nan'},0.0003" for i, value in enumerate(("inf", "-3", "1e9", "0", "", "nan"))]
    write_stage(tmp_path, "sft", {"val_loss": float("nan")}, header + "\n".join(rows) + "\n")
    report(tmp_path)
    drawn = re.findall(r' d="([^"]*)"', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert drawn and not any("nan" in path or "inf" in path for path in drawn)


def test_ppo_is_drawn_against_episodes(tmp_path):
    write_ppo(tmp_path)
    page = report(tmp_path)
    assert "Score against episodes" in [value for name, value in page.attributes if name == "aria-label"]
    assert "rollouts 0.700" in page.text  # the last score
    assert "<title>2,048: 0.700</title>" in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )  # at 8 x 256 episodes


def test_steps_shown_are_spread_over_training(tmp_path):
    write_sft(tmp_path)
    shown = re.findall(r"text (\d+)", report(tmp_path).text)
    assert shown == ["10", "50", "90", "120", "160", "200"]  # 6 of 20


def test_writing_again_gives_the_same_page(tmp_path):
    write_whole(tmp_path)
    pages = [write_report(tmp_path).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stage of a run is in this folder; run one first"):
        write_report(tmp_path)


def test_where_the_reward_model_is_right(tmp_path):
    groups = {"fact <b>": {"accuracy": 0.8125, "pairs": 64}, "sum": {"accuracy": 0.625, "pairs": 32}}
    gold = {"fact <b>": {"accuracy": 0.9375, "pairs": 60}}
    figures = {
        "val_accuracy": 0.75, "val_loss": 0.5, "calibration_error": 0.0321, "length_correlation": None,
        "calibration": [{"predicted": p, "observed": o, "pairs": 40} for p, o in ((0.55, 0.5), (0.9, 0.95))],
        "by": {"kind": groups, "gold_kind": gold, "annotator": {}, "distance": {}, "length": {}},
    }  # fmt: skip
    write_stage(tmp_path / "r", "reward", figures)
    page = write_report(tmp_path / "r").read_text()
    section = page[page.index('<section id="reward-model">') :]
    section = section[: section.index("</section>")]
    assert "3.21 points off on average" in section
    assert "fact &lt;b&gt;" in section and "<b>fact" not in section
    assert 'cx="81.25%"' in section and 'cx="93.75%"' in section  # by the annotator, by gold
    assert '<b class="ink-amber">93.8%</b> <small>60</small>' in section and "<b>62.5%</b> <small>32</small>" in section
    assert section.count("<h3>") == 1  # groupings with nothing to compare are left out
    write_stage(tmp_path / "old", "reward", {"val_accuracy": 0.75, "val_loss": 0.5})
    assert "reward-model" not in write_report(tmp_path / "old").read_text()
